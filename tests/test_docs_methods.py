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
from tunesmith.config.objective import ObjectiveConfig
from tunesmith.config.optimizer import SHORT_OPTIMIZERS, AnyOptimizer, optimizer_long_form
from tunesmith.config.policy import GroupConfig, PpoConfig, SamplingConfig, policy_presets
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


REWARD_CONFIGS = get_args(get_args(RewardFunctionConfig)[0])

OPTIMIZERS = [
    [cell.strip() for cell in row.split("|")[1:-1]]
    for row in TEXT.splitlines()
    if "| `train: {optimizer" in row
]


def table(first: str) -> list[list[str]]:
    """The rows of the table whose heading begins with these cells."""
    (rows,) = re.findall(rf"^\| {re.escape(first)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.M)
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines()]


def words(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


OBJECTIVE_ROWS = table("objective | what it is for")
COST_ROWS = table("objective | forwards")
PRESET_ROWS = table("objective | `kl_weight`")
FIGURE_ROWS = table("figure | meaning")

DATA_OF = {
    "Conversation": ("conversations, prompts with completions, text", "as `sft`", "prompts"),
    "Text": ("raw text",),
    "Preference": ("pairs",),
    "Rated": ("rated answers",),
    "Labeled": ("texts with labels",),
}


def objective_of(name: str) -> Any:
    """The defaults of an objective, with what has none."""
    needed: dict[str, dict[str, Any]] = {
        "distill": {"teacher": "t"},
        "exo": {"label_smoothing": 0.1},
        **{row[0].strip("`"): {"rewards": "math"} for row in PRESET_ROWS},
    }
    tree = {"name": name, **needed.get(name, {})}
    return TypeAdapter[Any](ObjectiveConfig).validate_python(tree)


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

    known = {get_args(kind.model_fields["kind"].annotation)[0] for kind in REWARD_CONFIGS}
    assert [row[0].strip("`") for row in REWARD_ROWS] == [*REWARDS, "model"]
    assert {*REWARDS, "model"} == known


@pytest.mark.parametrize("row", OBJECTIVE_ROWS, ids=lambda row: row[0])
def test_objectives_are_what_the_table_says(row: list[str]) -> None:
    from tunesmith.objectives import OBJECTIVES

    first, _, data, settings, papers = row
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in papers.split(", ") if papers)
    for name in words(first):
        known = objective_of(name).model_dump()
        assert set(words(settings)) - {"kto", "dft"} <= set(known) | {"variant"}
        assert data in DATA_OF[OBJECTIVES[name].kinds[0]]


def test_all_objectives_stand_there() -> None:
    from tunesmith.objectives import OBJECTIVES

    named = [name for row in OBJECTIVE_ROWS for name in words(row[0])]
    assert set(named) == set(OBJECTIVES)
    assert sorted(named) == sorted([*OBJECTIVES, "sft"])  # dft has a row of its own


def test_what_every_objective_costs_stands_there() -> None:
    from tunesmith.objectives import OBJECTIVES

    assert sorted(name for row in COST_ROWS for name in words(row[0])) == sorted(OBJECTIVES)
    for names, forwards, memory in COST_ROWS:
        for name in words(names):
            asks = OBJECTIVES[name].needs_reference
            is_as_grpo = memory.startswith("as `grpo`")
            assert asks == ("reference" in forwards and ("reference" in memory or is_as_grpo))


@pytest.mark.parametrize("row", PRESET_ROWS, ids=lambda row: row[0])
def test_what_auto_becomes(row: list[str]) -> None:
    heading = ["kl_weight", "clip", "clip_high", "scale", "averaging", "drop_equal"]
    config = objective_of(row[0].strip("`"))
    assert isinstance(config, GroupConfig | PpoConfig)
    told = {key: cell.split(",")[0] for key, cell in zip(heading, row[1:], strict=True) if cell}
    found = {key: yaml.safe_load(cell) for key, cell in told.items()}
    assert found == policy_presets(config)
    if config.kl_weight == "auto" and found["kl_weight"]:
        is_in_reward = config.name in ("rloo", "ppo")
        assert row[1].endswith("in the reward" if is_in_reward else "in the loss")


def test_presets_of_all_policies_stand_there() -> None:
    from tunesmith.config.policy import PRESETS

    assert [row[0].strip("`") for row in PRESET_ROWS] == list(PRESETS)
    section = TEXT.partition("## Answers of its own")[2].partition("\n## ")[0]
    assert set(SamplingConfig.model_fields) >= set(words(section)) & {"updates", "mini_batches"}


def test_figures_of_policies_stand_there() -> None:
    from tunesmith.objectives.policy import PolicyForm, PolicyObjective, ValueHead

    objective = PolicyObjective(PolicyForm(kl_weight=1.0), value_head=ValueHead(1))
    named = {name for row in FIGURE_ROWS for name in words(row[0])}
    assert set(objective.metric_names) <= named


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
