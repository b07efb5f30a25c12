"""Every `auto` becomes a value with its reason; what the user gave stays."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.auto import AUTO_KEYS, EPOCHS_BY_ROWS, Facts, number, resolve
from tunesmith.config.budget import Needs
from tunesmith.config.load import flatten, recipe_from
from tunesmith.config.recipe import LoraConfig, Recipe, Strict
from tunesmith.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]

NEEDS = Needs(
    weight_bytes=1 << 30,
    optimizer_bytes=0,
    other_bytes=0,
    layers={"none": 1 << 17, "mlp": 1 << 16, "full": 1 << 13},
    num_layers=8,
)

FACTS = Facts(
    num_rows=1000,
    longest_tokens=300,
    context_tokens=2048,
    hidden_size=2048,
    device_kind="cpu",
    has_fast_bf16=False,
    memory_bytes=16 << 30,
    needs=NEEDS,
    tokens_per_row=100.0,
    seconds_per_token=1e-3,
    compiler="g++",
)


def recipe(**sections: Any) -> Recipe:
    return recipe_from({"model": "m", "data": "d", **sections})


def values(recipe: Recipe, **facts: Any) -> dict[str, Any]:
    resolved = resolve(recipe, dataclasses.replace(FACTS, **facts))
    return flatten(resolved.recipe.model_dump(mode="json"))


def test_every_auto_is_resolved_with_a_reason() -> None:
    asked = recipe()
    open_keys = {k for k, v in flatten(asked.model_dump(mode="json")).items() if v == "auto"}
    # These are looked up per sample, file or tokenizer; output is a name.
    looked_up = {"data.template", "data.thinking", "data.overlong", "evaluate.general", "output"}
    assert open_keys - set(AUTO_KEYS) == looked_up
    resolved = resolve(asked, FACTS)
    found = flatten(resolved.recipe.model_dump(mode="json"))
    assert set(resolved.reasons) == set(AUTO_KEYS) <= open_keys
    assert all(found[key] != "auto" for key in AUTO_KEYS)
    assert all(len(reason) > 10 for reason in resolved.reasons.values())
    assert resolve(resolved.recipe, FACTS).reasons == {}
    assert resolve(resolved.recipe, FACTS).recipe == resolved.recipe


def test_full_tuning_has_no_rank() -> None:
    resolved = resolve(recipe(method="full"), FACTS)
    assert set(resolved.reasons) == set(AUTO_KEYS) - {"method.rank", "method.alpha"}


GIVEN: dict[str, Any] = {
    "model.dtype": "bfloat16",
    "data.validation": 77,
    "data.max_length": 99,
    "method.rank": 3,
    "method.alpha": 5.0,
    "train.epochs": 4,
    "train.global_batch": 6,
    "train.micro_batch_tokens": 123,
    "train.checkpointing": "mlp",
    "train.checkpointed_layers": 2,
    "train.compile": "kernels",
    "train.learning_rate": 0.5,
    "checkpoint.every_steps": 9,
    "checkpoint.background": False,
    "guard.spike_sigma": 3.0,
}


def tree_of(keys: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "model": {"id": "m"},
        "data": {"train": "d"},
        "method": {"name": "lora"},
    }
    for key, value in keys.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return tree


@pytest.mark.parametrize("key", AUTO_KEYS)
def test_a_value_given_stays(key: str) -> None:
    given = {key: GIVEN[key]}
    if key == "train.checkpointed_layers":  # says nothing without a level
        given["train.checkpointing"] = "mlp"
    resolved = resolve(recipe_from(tree_of(given)), FACTS)
    assert flatten(resolved.recipe.model_dump(mode="json"))[key] == GIVEN[key]
    assert set(resolved.reasons) == set(AUTO_KEYS) - set(given)


def test_all_values_given_stay() -> None:
    asked = recipe_from(tree_of(GIVEN))
    resolved = resolve(asked, FACTS)
    assert (resolved.recipe, resolved.reasons) == (asked, {})


def test_alpha_follows_a_given_rank() -> None:
    method = resolve(recipe(method={"name": "lora", "rank": 5}), FACTS).recipe.method
    assert isinstance(method, LoraConfig)
    assert (method.rank, method.alpha) == (5, 10.0)


def test_dtype() -> None:
    assert values(recipe(), has_fast_bf16=True)["model.dtype"] == "bfloat16"
    assert values(recipe(), has_fast_bf16=False)["model.dtype"] == "float32"


@pytest.mark.parametrize(
    ("longest", "context", "expected"), [(300, 2048, 300), (9000, 2048, 2048), (3, 2048, 8)]
)
def test_max_length(longest: int, context: int, expected: int) -> None:
    found = values(recipe(), longest_tokens=longest, context_tokens=context)
    assert found["data.max_length"] == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, 0), (9, 0), (10, 1), (14, 1), (15, 2), (200, 20), (9_999, 1000), (10**6, 1000)],
)
def test_validation(rows: int, expected: int) -> None:
    assert values(recipe(), num_rows=rows)["data.validation"] == expected


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(1, 15), (100, 15), (1000, 10), (10_000, 2), (100_000, 1), (10**7, 1), (316, 13)],
)
def test_epochs(rows: int, epochs: int) -> None:
    # Rows to train on: what is held out does not count.
    found = values(recipe(data={"train": "d", "validation": 0}), num_rows=rows)
    assert found["train.epochs"] == epochs


def test_epochs_never_rise_with_rows() -> None:
    asked = recipe(data={"train": "d", "validation": 0})
    found = [values(asked, num_rows=int(1.3**n) + 1)["train.epochs"] for n in range(50)]
    assert found == sorted(found, reverse=True)
    assert {found[0], found[-1]} == {EPOCHS_BY_ROWS[0][1], EPOCHS_BY_ROWS[-1][1]}


def test_epochs_count_the_rows_that_are_trained_on() -> None:
    half = recipe(data={"train": "d", "validation": 0.5})
    assert values(half, num_rows=2000)["train.epochs"] == 10
    all_but_100 = recipe(data={"train": "d", "validation": 900})
    assert values(all_but_100, num_rows=1000)["train.epochs"] == 15
    own_file = recipe(data={"train": "d", "validation": "v.json"})
    assert values(own_file, num_rows=100)["train.epochs"] == 15


@pytest.mark.parametrize(
    ("rows", "batch"), [(1, 1), (400, 1), (1000, 2), (10_000, 20), (128_000, 256), (10**7, 256)]
)
def test_global_batch(rows: int, batch: int) -> None:
    found = values(recipe(data={"train": "d", "validation": 0}), num_rows=rows)
    assert found["train.global_batch"] == batch


def test_learning_rate() -> None:
    assert values(recipe())["train.learning_rate"] == 2e-4
    assert values(recipe(method="full"))["train.learning_rate"] == 2e-5
    assert values(recipe(), hidden_size=512)["train.learning_rate"] == 4e-4
    assert values(recipe(), hidden_size=8192)["train.learning_rate"] == 1e-4
    assert values(recipe(), hidden_size=576)["train.learning_rate"] == 3.8e-4


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, (2048, "none", 0)),
        ({"device_kind": "cuda"}, (13568, "none", 0)),  # 1 MiB a token, 13.4 GiB are free
        ({"device_kind": "cuda", "memory_bytes": 1 << 40}, (16384, "none", 0)),
        # The longest sample must go in, whatever it takes.
        ({"memory_bytes": 1 << 30}, (300, "full", 8)),
        ({"memory_bytes": 0}, (300, "full", 8)),
        ({"memory_bytes": 0, "longest_tokens": 5000}, (2048, "full", 8)),  # cut at max_length
        ({"memory_bytes": 3 << 30, "longest_tokens": 2000}, (2048, "mlp", 4)),
    ],
)
def test_memory(facts: dict[str, Any], expected: tuple[int, str, int]) -> None:
    found = values(recipe(), **facts)
    names = ("micro_batch_tokens", "checkpointing", "checkpointed_layers")
    assert tuple(found[f"train.{name}"] for name in names) == expected


def test_what_is_given_is_planned_around() -> None:
    given = recipe(train={"checkpointing": "full", "checkpointed_layers": 3})
    plan = resolve(given, FACTS).plan
    assert plan.levels == ("full",) * 3 + ("mlp",) * 5
    kept, again = 3 * (1 << 13) + 5 * (1 << 16), (1 << 17) - (1 << 13)
    assert plan.predicted_bytes == (1 << 30) + 2048 * (kept + again)


def test_off_is_not_false() -> None:
    assert recipe(train={"compile": False}).train.compile == "off"


def test_small_steps_need_little_memory() -> None:
    # A step of two samples, and one of five: those not listed count as the last one that is.
    facts = dataclasses.replace(FACTS, longest_samples=(300, 200, 100))
    plan = resolve(recipe(), facts).plan
    assert plan.micro_batch_tokens == 2048
    assert plan.predicted_bytes == (1 << 30) + 500 * 8 * (1 << 17)
    five = resolve(recipe(train={"global_batch": 5}), facts).plan
    assert five.predicted_bytes == (1 << 30) + 800 * 8 * (1 << 17)


def test_a_resolved_recipe_is_predicted_as_at_its_start() -> None:
    facts = dataclasses.replace(FACTS, memory_bytes=3 << 30, longest_tokens=2000)
    first = resolve(recipe(), facts)
    again = resolve(first.recipe, facts)
    assert (again.recipe, again.reasons) == (first.recipe, {})
    assert again.plan.levels == first.plan.levels
    assert again.plan.predicted_bytes == first.plan.predicted_bytes


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "kernels"),  # 100 rows a step of 100 tokens, 10 epochs: 900 s
        ({"seconds_per_token": 1e-4}, "off"),
        ({"compiler": None}, "off"),
    ],
)
def test_compile(facts: dict[str, Any], expected: str) -> None:
    resolved = resolve(recipe(), dataclasses.replace(FACTS, **facts))
    assert resolved.recipe.train.compile == expected
    assert "minutes of training" in resolved.reasons["train.compile"]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"epochs": 1, "global_batch": 10}, 9),  # 90 steps
        ({"epochs": 1, "global_batch": 900}, 1),
        ({"epochs": 100, "global_batch": 1}, 500),
        ({"max_steps": 55}, 6),
    ],
)
def test_checkpoints(train: dict[str, Any], expected: int) -> None:
    assert values(recipe(train=train))["checkpoint.every_steps"] == expected


def test_extreme_facts_still_give_a_valid_recipe() -> None:
    for rows in (1, 2, 10, 10**9):
        for hidden in (1, 65536):
            found = values(
                recipe(), num_rows=rows, hidden_size=hidden, longest_tokens=1, context_tokens=8
            )
            assert found["train.learning_rate"] > 0


def test_number() -> None:
    assert number(3) == 3
    with pytest.raises(ValueError, match="auto"):
        number("auto")


# The recipe's fields


def models(model: type[Strict] = Strict) -> list[type[Strict]]:
    return [inner for child in model.__subclasses__() for inner in (child, *models(child))]


def test_every_field_is_read_somewhere() -> None:
    text = "\n".join(
        file.read_text(encoding="utf-8")
        for file in (ROOT / "src" / "tunesmith").rglob("*.py")
        if file.name != "recipe.py"
    )
    fields = {name for model in models() for name in model.model_fields}
    assert len(fields) > 30
    unread = {name for name in fields if f".{name}" not in text and f'"{name}"' not in text}
    assert unread == set()


def test_every_field_is_explained() -> None:
    silent = {
        f"{model.__name__}.{name}"
        for model in models()
        for name, field in model.model_fields.items()
        if not field.description and name not in ("name", "kind")
    }
    assert silent == set()


def test_length_of_raw_text() -> None:
    facts = {"longest_tokens": 300, "longest_text_tokens": 9000, "context_tokens": 8192}
    assert values(recipe(), **facts)["data.max_length"] == 2048
    cut = recipe(data={"train": "d", "overlong": "cut_right"})
    assert values(cut, **facts)["data.max_length"] == 8192
    assert values(recipe(), **{**facts, "longest_tokens": 4000})["data.max_length"] == 4000


def test_epochs_follow_what_an_epoch_draws() -> None:
    facts = {"num_rows": 100_000, "draws_per_row": 0.01}
    few = values(recipe(), **facts)
    assert few["train.epochs"] > values(recipe(), num_rows=100_000)["train.epochs"]
    assert few["train.global_batch"] == 2


def test_layers_without_a_level_are_refused() -> None:
    with pytest.raises(RecipeError, match="together with `checkpointing`"):
        recipe(train={"checkpointed_layers": 3})


def test_an_unknown_optimizer_names_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="one of adamw, adamw_sr, adamw_bf16"):
        recipe(train={"optimizer": "adamw_4bit"})
