"""Short names of methods, what goes together, and what `auto` makes of each."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config.adapter_kinds import ADAPTER_KINDS, REFUSED_KINDS, SHORT_METHODS
from tunesmith.config.load import recipe_from
from tunesmith.config.method import (
    KIND_RATES,
    AdapterConfig,
    FreezeConfig,
    LoraConfig,
    auto_alpha,
    base_learning_rate,
)
from tunesmith.errors import RecipeError


def read(method: object) -> Any:
    tree: dict[str, Any] = {"model": "m", "data": "d", "method": method}
    return recipe_from(tree).method


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("dora", {"name": "lora", "dora": True}),
        ("rslora", {"name": "lora", "rslora": True}),
        ("PiSSA", {"name": "lora", "init": "pissa"}),
        ({"name": "olora", "rank": 8}, {"name": "lora", "init": "olora", "rank": 8}),
        ("ia3", {"name": "adapter", "kind": "IA3"}),
        ("p-tuning-v2", {"name": "adapter", "kind": "PREFIX_TUNING"}),
        ({"name": "adapter", "kind": "lokr", "r": 8}, {"name": "adapter", "kind": "LOKR", "r": 8}),
        ({"rank": 8}, {"name": "lora", "rank": 8}),
    ],
)
def test_short_names(short: object, long: object) -> None:
    assert read(short) == read(long)


@pytest.mark.parametrize("name", SHORT_METHODS)
def test_a_method_written_down_reads_the_same(name: str) -> None:
    method = read(name)
    assert read(method.model_dump(mode="json")) == method


def test_settings_of_virtual_tokens() -> None:
    assert read("prompt_tuning").settings == {
        "prompt_tuning_init": "SAMPLE_VOCAB",
        "num_virtual_tokens": 20,
    }
    given = {"name": "p_tuning", "num_virtual_tokens": 5}
    assert read(given).settings == {"num_virtual_tokens": 5}
    assert read("prefix_tuning").is_prompt
    assert not read("ia3").is_prompt


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ({"name": "loftq", "dora": True}, "without `dora`"),
        ({"name": "adapter", "kind": "ADALORA"}, "after every step"),
        ({"name": "adapter", "kind": "lokrr"}, "did you mean LOKR?"),
        ({"name": "dora", "init": "pissa"}, "without `dora`"),
        ({"name": "lora", "init": "orthogonal", "rank": 3}, "even ranks"),
        ({"name": "lora", "plus_ratio": 0}, "greater than 0"),
        ({"name": "freeze", "layers": 0}, "something to train"),
    ],
)
def test_what_does_not_go_together(method: object, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(method)
    assert text in caught.value.expected


@pytest.mark.parametrize(
    ("key", "name", "text"),
    [
        ("method", "dorra", "did you mean `dora`?"),
        ("method", "loraa", "did you mean `lora`?"),
        ("method", "p-tunning", "did you mean `p_tuning`?"),
        ("method", "adalora", "PEFT must be called after every step"),
        ("objective", "orppo", "did you mean `orpo`?"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(key: str, name: str, text: str) -> None:
    tree: dict[str, Any] = {"model": "m", "data": "d", key: name}
    with pytest.raises(RecipeError) as caught:
        recipe_from(tree)
    assert caught.value.code == "recipe.bad-value"
    assert text in str(caught.value.try_)
    with pytest.raises(RecipeError) as caught:
        recipe_from({**tree, key: "zzzzzz"})
    assert caught.value.try_ is None


def test_freezing_by_place() -> None:
    assert read("freeze") == FreezeConfig(name="freeze", layers=2, norm=True)
    first = read({"name": "freeze", "first": 3})
    assert (first.layers, first.norm) == (0, False)
    both = read({"name": "freeze", "first": 3, "layers": 1})
    assert (both.layers, both.norm) == (1, True)


def test_rates_grow_where_less_is_trained() -> None:
    def rate(name: str) -> float:
        return base_learning_rate(read(name))

    assert rate("lora") < rate("delora") < rate("loha") < rate("unilora")
    assert rate("p_tuning") < rate("prefix_tuning")


def test_alpha_follows_the_method() -> None:
    assert auto_alpha(LoraConfig(), 8)[0] == 16
    assert auto_alpha(LoraConfig(rslora=True), 64)[0] == 8
    assert auto_alpha(LoraConfig(init="pissa"), 8)[0] == 8


def test_kinds_are_named_once() -> None:
    assert set(KIND_RATES) <= set(ADAPTER_KINDS)
    assert not set(ADAPTER_KINDS) & set(REFUSED_KINDS)
    oft = AdapterConfig(name="adapter", kind="OFT")
    assert base_learning_rate(oft) == base_learning_rate(LoraConfig())
