"""What docs/methods.md says is true: all methods stand there, and each row can be copied."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import TypeAdapter

from tunesmith.config.adapter_kinds import ADAPTER_KINDS
from tunesmith.config.load import recipe_from
from tunesmith.config.method import MUTATING_INITS, AdapterConfig, LoraConfig
from tunesmith.config.optimizer import SHORT_OPTIMIZERS, AnyOptimizer, optimizer_long_form
from tunesmith.config.recipe import Recipe, TrainConfig
from tunesmith.config.rewards import RewardFunctionConfig

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in row.split("|")[1:-1]]
    for row in TEXT.splitlines()
    if "| `method: " in row or "| `model: " in row
]
REWARD_ROWS = [
    [cell.strip() for cell in row.split("|")[1:-1]]
    for row in TEXT.splitlines()
    if row.endswith("}` |") and "| `{kind: " in row
]


OPTIMIZERS = [
    [cell.strip() for cell in row.split("|")[1:-1]]
    for row in TEXT.splitlines()
    if "| `train: {optimizer" in row
]


def recipe_of(snippet: str) -> Recipe:
    tree = {"model": "m", "data": "d.jsonl", "method": "full", **yaml.safe_load(snippet)}
    return recipe_from(tree, where="docs/methods.md")


def method_of(snippet: str) -> Any:
    tree = {"model": "m", "data": "d.jsonl", **yaml.safe_load(snippet)}
    return recipe_from(tree, where="docs/methods.md").method


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_recipes_in_the_tables_are_valid(row: list[str]) -> None:
    assert len(row) == 6
    method_of(row[3].strip("`"))
    assert re.fullmatch(r"[\d,]+", row[4])


def test_examples_are_valid() -> None:
    for example in re.findall(r"```yaml\n(.*?)```", TEXT, re.S):
        method_of(example)


def test_all_methods_stand_there() -> None:
    methods = [method_of(row[3].strip("`")) for row in ROWS]
    kinds = {method.kind for method in methods if isinstance(method, AdapterConfig)}
    assert kinds == set(ADAPTER_KINDS)
    assert {method.name for method in methods} == {"full", "freeze", "lora", "adapter"}
    inits = {method.init for method in methods if isinstance(method, LoraConfig)}
    assert inits >= {*MUTATING_INITS, "gaussian", "orthogonal"} - {"pissa_niter_16"}


@pytest.mark.parametrize("row", REWARD_ROWS, ids=lambda row: row[0])
def test_reward_functions_are_what_the_table_says(row: list[str]) -> None:
    kind, _, settings, example = row
    config = TypeAdapter[Any](RewardFunctionConfig).validate_python(yaml.safe_load(example[1:-1]))
    assert f"`{config.kind}`" == kind
    named = re.findall(r"`(\w+)`", settings)
    assert sorted(named) == sorted(config.settings())


def test_all_reward_functions_stand_there() -> None:
    from tunesmith.objectives.rewards import REWARDS

    assert [row[0].strip("`") for row in REWARD_ROWS] == list(REWARDS)


def test_all_optimizers_stand_there() -> None:
    assert all(len(row) == 6 for row in OPTIMIZERS)
    found = [recipe_of(row[3].strip("`")).train.optimizer for row in OPTIMIZERS]
    assert {type(optimizer) for optimizer in found} == set(get_args(AnyOptimizer))
    shorts = [optimizer_long_form(name) for name in SHORT_OPTIMIZERS if not name.endswith("_sr")]
    known = [TrainConfig.model_validate({"optimizer": short}).optimizer for short in shorts]
    assert all(optimizer in found for optimizer in known)


@pytest.mark.slow
def test_optimizers_keep_the_bytes_they_say() -> None:
    from tunesmith.config.recipe import ModelConfig
    from tunesmith.model.load import find_model, load_config
    from tunesmith.model.memory import measure_config
    from tunesmith.model.optimizer_bytes import optimizer_bytes
    from tunesmith.types import SilentReporter

    source = find_model(ModelConfig(id="builtin:smollm2-135m"), SilentReporter())
    sizes = measure_config(load_config(source), method_of("method: full"))
    for row in OPTIMIZERS:
        optimizer = recipe_of(row[3].strip("`")).train.optimizer
        kept = optimizer_bytes(sizes.trained, optimizer, is_bf16=True)
        assert row[4] == f"{kept / sizes.num_trained:.2f}", row[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's, on layers without a bias and on CUDA
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_trained_parameters_are_counted(row: list[str]) -> None:
    from tunesmith.config.recipe import ModelConfig
    from tunesmith.model.load import find_model, load_config
    from tunesmith.model.memory import measure_config
    from tunesmith.types import SilentReporter

    source = find_model(ModelConfig(id="builtin:smollm2-135m"), SilentReporter())
    sizes = measure_config(load_config(source), method_of(row[3].strip("`")))
    assert f"{sizes.num_trained:,}" == row[4]
