"""The token store and what is read from it: cache, problems, lengths, split and batches."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CHATML, make_byte_tokenizer, make_rows
from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data import plan
from tunesmith.data.build import open_store
from tunesmith.data.loader import Loader
from tunesmith.data.plan import Split, make_split
from tunesmith.data.sources import Source
from tunesmith.data.store import ARRAYS, StoreInputs, TokenStore
from tunesmith.data.templates import Renderer, RenderOptions
from tunesmith.data.templates.render import NO_END_MARK
from tunesmith.errors import DataError
from tunesmith.types import GlobalBatch, Origin, SilentReporter


class Builds(SilentReporter):
    """Counts how often rows are read: a store from the cache reads none."""

    def __init__(self) -> None:
        self.count = 0

    def measure(
        self, label: str, items: Iterable[Any], total: int, position: Callable[[], int]
    ) -> Iterator[Any]:
        self.count += 1
        return iter(items)


@pytest.fixture
def builds() -> Builds:
    return Builds()


@pytest.fixture
def inputs(tmp_path: Path) -> Callable[..., StoreInputs]:
    def make(
        *paths: Path, template: str = CHATML, arguments: Any = None, **settings: Any
    ) -> StoreInputs:
        tokenizer = make_byte_tokenizer()
        tokenizer.chat_template = template
        sources = [Source(SourceConfig(path=path.name, **settings), (path,)) for path in paths]
        renderer = Renderer(tokenizer, RenderOptions(arguments or {}))
        return StoreInputs(sources, renderer, folder=tmp_path / "stores")

    return make


@pytest.fixture
def store_of(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> Callable[..., TokenStore]:
    def build(rows: list[dict[str, Any]]) -> TokenStore:
        return open_store(inputs(write_jsonl(rows)), SilentReporter())

    return build


def chat(question: str, *answers: str, weight: float = 1) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for answer in answers:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "weight": weight})
    return {"messages": messages}


# Content


def test_samples_and_origins(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    one = write_jsonl([chat("a", "b"), chat("c", "d", "e")], "one.jsonl")
    two = write_jsonl([chat("你", "好")], "two.jsonl")
    two.write_text("\n\n" + two.read_text(encoding="utf-8"), encoding="utf-8")
    made = inputs(one, two)
    store = open_store(made, SilentReporter())
    assert store.num_samples == 3
    assert [store.origin(sample) for sample in range(3)] == [
        Origin(str(one), 1),
        Origin(str(one), 2),
        Origin(str(two), 3),
    ]
    assert store.folder.name == made.key()
    assert store.content_key == made.content_key()
    tokenizer = made.renderer.tokenizer
    texts = [tokenizer.decode(store.sequence(sample).ids) for sample in range(3)]
    assert texts[2] == "<|im_start|>user\n你<|im_end|>\n<|im_start|>assistant\n好<|im_end|>"
    assert [len(store.sequence(sample).runs) for sample in range(3)] == [1, 2, 1]


def test_a_sample_of_several_sequences(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    # Earlier answers look different from the last one, as with Qwen3's thinking blocks.
    is_early = "message['role'] == 'assistant' and not loop.last"
    template = CHATML.replace("+ '<|im_end|>'", f"+ ('~' if {is_early} else '') + '<|im_end|>'")
    path = write_jsonl([chat("a", "b"), chat("c", "d", "e", "f"), chat("g", "h")])
    store = open_store(inputs(path, template=template), SilentReporter())
    assert [list(store.sequences_of(sample)) for sample in range(3)] == [[0], [1, 2, 3], [4]]
    lengths = store.lengths()
    assert lengths.tolist() == [len(store.sequence(index).ids) for index in range(5)]
    assert store.longest_of_samples().tolist() == [lengths[0], lengths[1:4].max(), lengths[4]]


def test_equal_samples_have_equal_hashes(store_of: Callable[..., TokenStore]) -> None:
    store = store_of([chat("a", "b"), chat("a", "c"), {"prompt": "a", "completion": "b"}])
    first, second, third = store.sample_hashes.tolist()
    assert first == third
    assert first != second


def test_weights_survive(store_of: Callable[..., TokenStore]) -> None:
    store = store_of([chat("a", "b", weight=0.25)])
    assert [weight for _, _, weight in store.sequence(0).runs] == [0.25]


def test_max_length_cuts(store_of: Callable[..., TokenStore]) -> None:
    store = store_of([chat("question", "answer one", "answer two")])
    whole = store.sequence(0)
    (first, length, _), (last, _, _) = whole.runs
    assert store.sequence(0, (0, 10_000)).runs == whole.runs
    for limit in range(1, len(whole.ids) + 1):
        cut = store.sequence(0, (0, limit))
        assert cut.ids.tolist() == whole.ids[:limit].tolist()
        supervised = [at for start, n, _ in whole.runs for at in range(start, start + n)]
        found = [at for start, n, _ in cut.runs for at in range(start, start + n)]
        assert found == [at for at in supervised if at < limit]
        assert all(n > 0 for _, n, _ in cut.runs)
    assert len(store.sequence(0, (0, first + length)).runs) == 1
    assert len(store.sequence(0, (0, last)).runs) == 1
    assert store.sequence(0, (0, first)).runs == ()


def test_notes_are_kept(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path], builds: Builds
) -> None:
    template = CHATML.replace("+ '<|im_end|>'", "")
    made = inputs(write_jsonl(make_rows(3)), template=template)
    assert open_store(made, builds).notes == {NO_END_MARK: 3}
    assert open_store(made, builds).notes == {NO_END_MARK: 3}
    assert builds.count == 1


def test_notes_are_those_of_the_store_alone(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    made = inputs(write_jsonl(make_rows(3), "a.jsonl"), template=CHATML.replace("<|im_end|>", ""))
    open_store(made, SilentReporter())
    path = write_jsonl(make_rows(2), "b.jsonl")
    other = StoreInputs(
        [Source(SourceConfig(path="b"), (path,))], made.renderer, folder=made.folder / "other"
    )
    assert open_store(other, SilentReporter()).notes == {NO_END_MARK: 2}


# Cache


def test_the_cache_is_used(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path], builds: Builds
) -> None:
    path = write_jsonl(make_rows(5))
    first = open_store(inputs(path), builds)
    again = open_store(inputs(path), builds)
    assert builds.count == 1
    assert again.folder == first.folder
    assert again.sequence(4).ids.tolist() == first.sequence(4).ids.tolist()


def test_a_changed_byte_builds_anew(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path], builds: Builds
) -> None:
    path = write_jsonl(make_rows(5))
    before = open_store(inputs(path), builds)
    path.write_bytes(path.read_bytes().replace(b"answer 4", b"answer 5"))
    after = open_store(inputs(path), builds)
    assert builds.count == 2
    assert before.content_key != after.content_key
    assert before.sample_hashes.tolist() != after.sample_hashes.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{# another #}" + CHATML},
        {"arguments": {"enable_thinking": False}},
        {"limit": 4},
        {"encoding": "gb18030"},
        {"columns": {"messages": "messages"}},
        {"format": "messages"},
    ],
)
def test_each_setting_is_in_the_key(
    inputs: Callable[..., StoreInputs],
    write_jsonl: Callable[..., Path],
    builds: Builds,
    change: dict[str, Any],
) -> None:
    path = write_jsonl(make_rows(5))
    open_store(inputs(path), builds)
    open_store(inputs(path, **change), builds)
    open_store(inputs(path, **change), builds)
    assert builds.count == 2


def test_the_tokenizer_is_in_the_key(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(make_rows(1))
    made, other = inputs(path), inputs(path)
    other.renderer.tokenizer.add_tokens(["question"])  # type: ignore[attr-defined]
    assert inputs(path).key() == made.key() != other.key()


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in ARRAYS), "meta.json"])
def test_a_damaged_cache_is_built_anew(
    inputs: Callable[..., StoreInputs],
    write_jsonl: Callable[..., Path],
    builds: Builds,
    name: str,
) -> None:
    path = write_jsonl(make_rows(5))
    store = open_store(inputs(path), builds)
    expected = [store.sequence(index).ids.tolist() for index in range(5)]
    file = store.folder / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # the open store has it mapped
    file.write_bytes(content)
    again = open_store(inputs(path), builds)
    assert builds.count == 2
    assert [again.sequence(index).ids.tolist() for index in range(5)] == expected


@pytest.mark.parametrize("name", ["MANIFEST.json", "ids.npy"])
def test_an_unfinished_cache_is_built_anew(
    inputs: Callable[..., StoreInputs],
    write_jsonl: Callable[..., Path],
    builds: Builds,
    name: str,
) -> None:
    path = write_jsonl(make_rows(5))
    (open_store(inputs(path), builds).folder / name).unlink()
    assert open_store(inputs(path), builds).num_samples == 5
    assert builds.count == 2


# Problems


def test_problems_are_listed_and_counted(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"x": n} if n % 2 else chat("a", "b") for n in range(90)]
    path = write_jsonl(rows)
    with pytest.raises(DataError) as caught:
        open_store(inputs(path), SilentReporter())
    error = caught.value
    assert error.num_problems == 45
    assert [problem.where for problem in error.problems] == [
        f"{path}:{line}" for line in range(2, 42, 2)
    ]
    assert "... and 25 more problems (45 in all)" in str(error)
    assert list((tmp_path / "stores").iterdir()) == []


def test_problems_of_rows_and_of_the_template_together(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    template = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    path = write_jsonl([{"x": 1}, chat("no", "b"), chat("yes", "b")])
    with pytest.raises(DataError) as caught:
        open_store(inputs(path, template=template + CHATML), SilentReporter())
    found = {problem.where: problem.code for problem in caught.value.problems}
    assert found == {f"{path}:1": "data.columns", f"{path}:2": "data.template"}


def test_problems_of_several_files(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    paths = [write_jsonl([chat("a", "b"), {"x": 1}], f"{name}.jsonl") for name in "ab"]
    with pytest.raises(DataError) as caught:
        open_store(inputs(*paths), SilentReporter())
    assert [problem.where for problem in caught.value.problems] == [f"{p}:2" for p in paths]


def test_an_empty_array_is_an_error(inputs: Callable[..., StoreInputs], tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("[]")
    with pytest.raises(DataError) as caught:
        open_store(inputs(path), SilentReporter())
    assert (caught.value.code, caught.value.where) == ("data.empty-file", str(path))


def test_a_missing_file_is_an_error(inputs: Callable[..., StoreInputs], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_store(inputs(tmp_path / "none.jsonl"), SilentReporter())
    assert caught.value.code == "data.missing-file"


# The samples of a run


def split_of(store: TokenStore, max_length: int = 10_000, **data: Any) -> Split:
    settings = DataConfig.model_validate({"train": "d", "validation": 0, **data})
    return make_split(
        settings, [SourceConfig(path="d")], (store, None), max_length=max_length, seed=0
    )


LONG_AND_SHORT = [chat("q", "a" * size) for size in (1, 5, 50, 5, 90)] + [chat("q" * 80, "a")]


def test_overlong_samples_are_cut(
    store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MOST_WITHOUT_ANSWER", 0.5)
    split = split_of(store_of(LONG_AND_SHORT), max_length=60)
    # The last one's answer begins beyond the limit: it has nothing left to learn.
    assert split.train.tolist() == [0, 1, 2, 3, 4]
    assert (split.counts.truncated, split.counts.dropped, split.counts.unsupervised) == (2, 0, 1)


def test_many_prompts_beyond_the_limit_are_an_error(store_of: Callable[..., TokenStore]) -> None:
    """One in a hundred is left out, more are not what was meant."""
    rows = [chat("q" * 80, "a"), *[chat("q", f"a{number}") for number in range(99)]]
    assert split_of(store_of(rows), max_length=60).counts.unsupervised == 1
    with pytest.raises(DataError) as caught:
        split_of(store_of([*rows, chat("q" * 81, "a")]), max_length=60)
    assert (caught.value.code, caught.value.where) == ("data.overlong", "data.max_length")
    assert "2 of 101 samples" in caught.value.found
    assert "cut_left" in str(caught.value)


def test_a_weight_of_prompts_does_not_hide_lost_answers(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    rows = [chat("q" * 80, "a"), *[chat("q", f"a{number}") for number in range(99)]]
    made = inputs(write_jsonl(rows))
    weighed = StoreInputs(made.sources, made.renderer, prompt_weight=0.1, folder=made.folder)
    store = open_store(weighed, SilentReporter())
    assert split_of(store, max_length=60).counts.unsupervised == 1


def test_overlong_samples_are_dropped(store_of: Callable[..., TokenStore]) -> None:
    split = split_of(store_of(LONG_AND_SHORT), max_length=60, overlong="drop")
    assert split.train.tolist() == [0, 1, 3]
    assert (split.counts.truncated, split.counts.dropped, split.counts.unsupervised) == (0, 3, 0)


def test_nothing_to_learn(store_of: Callable[..., TokenStore]) -> None:
    with pytest.raises(DataError) as caught:
        split_of(store_of(LONG_AND_SHORT), max_length=8)
    assert caught.value.code == "data.nothing-to-learn"
    assert "8 tokens" in caught.value.found


def test_samples_of_weight_0_are_counted(store_of: Callable[..., TokenStore]) -> None:
    split = split_of(store_of([chat("a", "b"), chat("c", "d", weight=0)]))
    assert len(split.train) == 1
    assert split.counts.unsupervised == 1


def test_held_out_samples(store_of: Callable[..., TokenStore]) -> None:
    rows = make_rows(20)
    store = store_of([*rows, *rows])  # every row twice
    split = split_of(store, validation=0.25)
    assert sorted([*split.train, *split.validation]) == list(range(40))
    assert len(split.validation) in (10, 11)
    hashes = store.sample_hashes
    assert set(hashes[split.train].tolist()).isdisjoint(hashes[split.validation].tolist())
    assert split.validation_store is store


def test_validation_from_a_store_of_its_own(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    """Training rows that it has, too, are left out of training."""
    train = open_store(inputs(write_jsonl(make_rows(4), "t.jsonl")), SilentReporter())
    other = open_store(inputs(write_jsonl(make_rows(3), "v.jsonl")), SilentReporter())
    data = DataConfig.model_validate({"train": "t", "validation": "v.jsonl"})
    split = make_split(data, [SourceConfig(path="t")], (train, other), max_length=100, seed=0)
    assert split.validation_store is other
    assert (split.train.tolist(), split.validation.tolist()) == ([3], [0, 1, 2])
    assert split.counts.leaked == 3


# Batches


@pytest.fixture
def loader(store_of: Callable[..., TokenStore]) -> Loader:
    store = store_of(make_rows(30))
    return Loader(
        store=store,
        samples=np.arange(0, 30)[np.arange(30) != 7],  # sample 7 is held out
        global_batch=8,
        micro_batch_tokens=128,
        max_length=10_000,
        seed=0,
        share_prefixes=False,
    )


def same(one: GlobalBatch, other: GlobalBatch) -> bool:
    pairs = zip(one.micro_batches, other.micro_batches, strict=True)
    return (
        one.epoch,
        one.sample_ids,
        one.supervised_weight,
        one.num_supervised,
        one.num_tokens,
    ) == (
        other.epoch,
        other.sample_ids,
        other.supervised_weight,
        other.num_supervised,
        other.num_tokens,
    ) and all(
        a.ids_T.equal(b.ids_T)
        and a.row_N.equal(b.row_N)
        and a.sample_N.equal(b.sample_N)
        and a.segments.lengths == b.segments.lengths
        for a, b in pairs
    )


def test_each_epoch_has_each_sample_once(loader: Loader) -> None:
    assert loader.steps_per_epoch == 4
    orders: list[list[int]] = []
    for epoch in range(3):
        batches = [loader.batch(epoch * 4 + step) for step in range(4)]
        assert [batch.epoch for batch in batches] == [epoch] * 4
        assert [len(batch.sample_ids) for batch in batches] == [8, 8, 8, 5]
        orders.append([sample for batch in batches for sample in batch.sample_ids])
        assert sorted(orders[-1]) == [n for n in range(30) if n != 7]
    assert len({tuple(item) for item in orders}) == 3


def test_micro_batches_hold_the_samples(loader: Loader) -> None:
    batch = loader.batch(5)
    parts = batch.micro_batches
    assert len(parts) > 1
    assert all(part.num_tokens <= 128 for part in parts)
    assert {int(s) for part in parts for s in part.sample_N} == set(batch.sample_ids)
    lengths = sorted(length for part in parts for length in part.segments.lengths)
    assert lengths == sorted(len(loader.store.sequence(s).ids) for s in batch.sample_ids)
    runs = [run for s in batch.sample_ids for run in loader.store.sequence(s).runs]
    assert batch.num_supervised == sum(length for _, length, _ in runs)
    assert batch.supervised_weight == batch.num_supervised
    assert batch.num_tokens == sum(lengths)


def test_batches_are_pure_in_the_step(loader: Loader) -> None:
    forward = {step: loader.batch(step) for step in range(12)}
    fresh = Loader(
        TokenStore(loader.store.folder),
        loader.samples,
        global_batch=8,
        micro_batch_tokens=128,
        max_length=10_000,
        seed=0,
        share_prefixes=False,
    )
    for step in (11, 0, 6, 3, 6):
        assert same(fresh.batch(step), forward[step])
    assert not same(forward[0], forward[4])


def test_the_sum_of_weights(store_of: Callable[..., TokenStore]) -> None:
    store = store_of([chat("a", "bc", weight=0.5), chat("d", "e")])
    loader = Loader(store, np.arange(2), 2, 512, 100, seed=0)
    batch = loader.batch(0)
    assert batch.num_supervised == 3 + 2  # with one end token each
    assert batch.supervised_weight == 0.5 * 3 + 2


def test_batches_are_cut_at_max_length(store_of: Callable[..., TokenStore]) -> None:
    loader = Loader(
        store_of(LONG_AND_SHORT), np.arange(5), 5, 512, 40, seed=0, share_prefixes=False
    )
    (part,) = loader.batch(0).micro_batches
    assert max(part.segments.lengths) == 40


@pytest.mark.parametrize("global_batch", [1, 300])
def test_all_batches_give_every_sample_once(loader: Loader, global_batch: int) -> None:
    every = replace(loader, global_batch=global_batch, seed=3)
    batches = list(every.all_batches())
    found = sorted({int(s) for batch in batches for s in batch.sample_N})
    assert found == loader.samples.tolist()
    assert sum(len(batch.segments.lengths) for batch in batches) == 29
    assert all(batch.num_tokens <= 128 for batch in batches)


def test_origins_of_a_batch(loader: Loader) -> None:
    batch = loader.batch(2)
    lines = [origin.line for origin in loader.origins(batch.sample_ids)]
    assert lines == [sample + 1 for sample in batch.sample_ids]


def test_meta_names_the_files(store_of: Callable[..., TokenStore], tmp_path: Path) -> None:
    store = store_of(make_rows(1))
    meta = json.loads((store.folder / "meta.json").read_text(encoding="utf-8"))
    assert meta.pop("content_key") == store.content_key
    fingerprints = meta.pop("fingerprints")
    assert {"tokenizer", "chat template", "data.jsonl"} < set(fingerprints)
    assert fingerprints == store.fingerprints
    assert meta == {
        "files": [[str(tmp_path / "data.jsonl"), None]],
        "labels": [],
        "notes": {},
        "num_bad": 0,
        "num_rows": 1,
        "num_silent": 0,
        "problems": [],
        "prompt_weight": 0.0,
    }
