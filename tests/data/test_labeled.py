"""Rows with labels: recognized on request alone, encoded whole, numbered, split, packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_byte_tokenizer
from tunesmith.config.heads import ClassifyConfig, RewardConfig
from tunesmith.config.load import recipe_from
from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data import build
from tunesmith.data.build import open_store
from tunesmith.data.columns import to_sample
from tunesmith.data.encode import Pipeline
from tunesmith.data.labels import choose_labels
from tunesmith.data.loader import Loader
from tunesmith.data.plan import make_split
from tunesmith.data.sources import Source, find_recipe_sources
from tunesmith.data.store import StoreInputs, TokenStore
from tunesmith.data.templates import Renderer
from tunesmith.errors import DataError, Problem
from tunesmith.types import Conversation, Labeled, Origin, Rated, SilentReporter, Text

ORIGIN = Origin("mine.jsonl", 4)
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def parse(row: dict[str, Any], **settings: Any) -> Any:
    values: dict[str, Any] = {"path": "mine.jsonl", "format": "labeled", **settings}
    return to_sample(row, SourceConfig(**values), ORIGIN)


@pytest.mark.parametrize(
    "text", ["text", "sentence", "content", "input", "question", "文本", "内容"]
)
@pytest.mark.parametrize("label", ["label", "category", "class", "标签", "类别"])
def test_columns_under_their_names(text: str, label: str) -> None:
    assert parse({text: "so it is", label: "x"}) == Labeled(Text("so it is", ORIGIN), "x")


@pytest.mark.parametrize(
    ("given", "expected"), [("  x ", "x"), (3, "3"), (2.0, "2"), (True, "true"), (False, "false")]
)
def test_labels_are_texts(given: Any, expected: str) -> None:
    assert parse({"text": "t", "label": given}).label == expected


def test_conversations_and_mapped_columns() -> None:
    found = parse({"messages": CHAT, "kind": "x"}, columns={"label": "kind"})
    assert isinstance(found.content, Conversation)
    assert found.label == "x"
    assert isinstance(parse({"messages": CHAT[:1], "label": 1}).content, Conversation)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"text": "t"}, "data.columns"),
        ({"text": "t", "label": None}, "data.label"),
        ({"text": "t", "label": " "}, "data.label"),
        ({"text": "t", "label": 0.5}, "data.label"),
        ({"text": "t", "label": ["x"]}, "data.label"),
        ({"text": " ", "label": "x"}, "data.empty-text"),
        ({"messages": [], "label": "x"}, "data.empty-text"),
        ({"title": "t", "label": "x"}, "data.columns"),
        ({"messages": CHAT[:1] * 2, "label": "x"}, "data.role-order"),
    ],
)
def test_mistakes_have_a_line(row: dict[str, Any], code: str) -> None:
    found = parse(row)
    assert isinstance(found, Problem)
    assert (found.code, found.where) == (code, "mine.jsonl:4")


def test_other_formats_stay_what_they_are() -> None:
    assert isinstance(parse({"text": "t", "label": "x"}, format="auto"), Text)
    rated = {"prompt": "p", "completion": "c", "label": True}
    assert isinstance(parse(rated, format="auto"), Rated)


def test_a_recipe_that_classifies_asks_for_labels(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "t", "label": "x"}\n')
    for objective, expected in (("classify", "labeled"), ("sft", "auto")):
        tree = {"model": "m", "data": "d.jsonl", "objective": objective}
        recipe = recipe_from(tree, where="here")
        found = find_recipe_sources(recipe, lambda path: tmp_path / path, SilentReporter())
        assert found.train[0].config.format == expected


def test_settings() -> None:
    def objective(**values: Any) -> Any:
        tree: dict[str, Any] = {"model": "m", "data": "d", "objective": values}
        return recipe_from(tree, where="here").objective

    assert objective(name="classify", labels=[1, True, "c"]).labels == ["1", "true", "c"]
    assert objective(name="reward", center=0.01) == RewardConfig(name="reward", center=0.01)
    for labels in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="two labels"):
            ClassifyConfig(name="classify", labels=labels)


# Tokens


def test_texts_are_encoded_as_the_tokenizer_does() -> None:
    """With the special tokens that it adds itself; conversations as the template writes them."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    conversation = parse({"messages": CHAT, "label": "x"})
    samples = [Labeled(Text("so <|im_end|>", ORIGIN), "x"), conversation]
    found = [tokens for _, tokens in Pipeline(Renderer(tokenizer)).tokens_of(samples)]
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    expected = [tokenizer("so <|im_end|>")["input_ids"], rendered]
    for own, ids in zip(found, expected, strict=True):
        assert not isinstance(own, Problem)
        assert own[0].ids.tolist() == ids
        assert own[0].runs == ((0, len(ids), 1.0),)
    assert expected[0][0] == 256


@pytest.fixture
def store_of(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., TokenStore]:
    def make(rows: list[Any], name: str = "data.jsonl") -> TokenStore:
        path = write_jsonl(rows, name)
        source = Source(SourceConfig(path=path.name, format="labeled"), (path,))
        renderer = Renderer(make_byte_tokenizer())
        inputs = StoreInputs([source], renderer, ("Labeled",), folder=tmp_path / "stores")
        return open_store(inputs, SilentReporter())

    return make


def rows_of(*labels: str, count: int = 12) -> list[dict[str, Any]]:
    return [{"text": f"text {n}", "label": labels[n % len(labels)]} for n in range(count)]


def test_labels_in_the_store(
    store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SHARD_SAMPLES", 4)
    store = store_of(rows_of("z", "b", "q"))
    assert store.labels == ["z", "b", "q"]
    assert store.sample_labels.tolist() == [0, 1, 2] * 4
    assert not store.is_rated.any()


def test_every_last_token_predicts_its_label(store_of: Callable[..., TokenStore]) -> None:
    store = store_of(rows_of("z", "b"))
    samples = np.arange(store.num_samples)
    loader = Loader(store, samples, 12, 40, 64, 0, labels=("b", "z"), pad_to=8)
    batch = loader.batch(0)
    assert batch.supervised_weight == 12
    assert len(batch.micro_batches) > 1
    for micro in batch.micro_batches:
        assert micro.row_N.tolist() == micro.last_S.tolist()
        wanted = [1 if sample % 2 == 0 else 0 for sample in micro.sample_N.tolist()]
        assert micro.target_N.tolist() == wanted


def test_long_texts_are_cut_and_keep_their_label(store_of: Callable[..., TokenStore]) -> None:
    store = store_of([{"text": "x" * 50, "label": "a"}, {"text": "y", "label": "b"}])
    split = make_split(
        DataConfig.model_validate({"train": ["d"], "validation": 0}),
        [SourceConfig(path="d")], (store, None), max_length=9, seed=0,
    )  # fmt: skip
    assert split.counts.truncated == 1
    loader = Loader(store, split.train, 2, 100, 9, 0, labels=("a", "b"))
    (batch,) = loader.batch(0).micro_batches
    assert sorted(zip(batch.sample_N.tolist(), batch.target_N.tolist(), strict=True)) == [
        (0, 0),
        (1, 1),
    ]
    assert sorted(batch.segments.lengths) == [1, 9]


def test_validation_has_every_label(store_of: Callable[..., TokenStore]) -> None:
    labels = ["often"] * 8 + ["seldom"] * 2
    store = store_of(rows_of(*labels, count=100))
    split = make_split(
        DataConfig.model_validate({"train": ["d"], "validation": 10}),
        [SourceConfig(path="d")], (store, None), max_length=99, seed=0,
    )  # fmt: skip
    assert np.bincount(store.sample_labels[split.validation]).tolist() == [8, 2]


def test_labels_are_chosen(store_of: Callable[..., TokenStore]) -> None:
    auto, fixed = (
        ClassifyConfig(name="classify"),
        ClassifyConfig(name="classify", labels=["z", "b"]),
    )
    store = store_of(rows_of("z", "b"))
    assert choose_labels(auto, (), (store, None)) == ("b", "z")
    assert choose_labels(fixed, (), (store, store)) == ("z", "b")
    assert choose_labels(auto, ("z", "q", "b"), (store, None)) == ("z", "q", "b")
    assert choose_labels(RewardConfig(name="reward"), (), (store, None)) == ()
    others = store_of(rows_of("b", "new"), "others.jsonl")
    with pytest.raises(DataError) as caught:
        choose_labels(auto, (), (store, others))
    assert caught.value.code == "data.label"
    assert "others.jsonl:2" in str(caught.value)
    assert "'new'" in str(caught.value)
    alone = store_of([{"text": "t", "label": "x"}], "alone.jsonl")
    with pytest.raises(DataError, match="alone"):
        choose_labels(auto, (), (alone, None))
    with pytest.raises(DataError, match=r"objective\.labels"):
        choose_labels(fixed, (), (others, None))


def test_rows_for_another_objective(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl([{"messages": CHAT}])
    source = Source(SourceConfig(path=path.name, format="messages"), (path,))
    renderer = Renderer(make_byte_tokenizer())
    inputs = StoreInputs([source], renderer, ("Labeled",), folder=tmp_path / "stores")
    with pytest.raises(DataError, match="a text with a label"):
        open_store(inputs, SilentReporter())
    assert json.loads(path.read_text())
