"""What docs/methods.md says is true: all methods stand there, and each row can be copied."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config.adapter_kinds import ADAPTER_KINDS
from tunesmith.config.load import recipe_from
from tunesmith.config.method import MUTATING_INITS, AdapterConfig, LoraConfig

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in row.split("|")[1:-1]] for row in TEXT.splitlines() if "| `m" in row
]


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
