"""Building a store: cut off and gone on with, in two processes at once, with bad rows, and bounded.

Then what is made of a store: windows of long texts, counts, sources, held-out samples.
"""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CHATML, make_byte_tokenizer, make_rows
from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data import plan
from tunesmith.data.build import open_store
from tunesmith.data.loader import Loader
from tunesmith.data.mix import Share
from tunesmith.data.plan import Split, make_split
from tunesmith.data.sources import Source, find_sources
from tunesmith.data.store import StoreInputs, TokenStore
from tunesmith.data.templates import Renderer, RenderOptions
from tunesmith.data.templates.infill import InfillTokens, as_infill
from tunesmith.data.templates.render import NO_END_MARK, SPECIAL_AS_TEXT
from tunesmith.data.tokenize import Encoder, weigh_prompts
from tunesmith.errors import DataError, Problem
from tunesmith.io.lock import directory_lock
from tunesmith.types import (
    Completion,
    Conversation,
    Message,
    Origin,
    Preference,
    SilentReporter,
    Text,
)

ORIGIN = Origin("x", 1)


class Stopping(SilentReporter):
    """Raises an error in front of a row, as a key pressed or a kill would."""

    def __init__(self, row: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        self.row, self.error = row, error
        self.rows_read = 0
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def measure(
        self, label: str, items: Iterable[Any], total: int, position: Callable[[], int]
    ) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self.row:
                raise self.error
            self.rows_read += 1
            yield item


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.build.SHARD_SAMPLES", 10)
    monkeypatch.setattr("tunesmith.data.encode.BATCH_SAMPLES", 4)


@pytest.fixture
def inputs(tmp_path: Path) -> Callable[..., StoreInputs]:
    """What a store of files is made of; every call has a renderer of its own."""

    def make(
        *paths: Path, folder: str = "stores", template: str = CHATML, **more: Any
    ) -> StoreInputs:
        tokenizer = make_byte_tokenizer()
        tokenizer.chat_template = template
        sources = [Source(SourceConfig(path=path.name), (path,)) for path in paths]
        options = more.pop("options", None)
        return StoreInputs(sources, Renderer(tokenizer, options), folder=tmp_path / folder, **more)

    return make


def chat(*texts: str, weight: float = 1.0) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [
        {"role": roles[index % 2], "content": text} for index, text in enumerate(texts)
    ]
    for message in messages[1::2]:
        message["weight"] = weight
    return {"messages": messages}


def odd_rows(count: int) -> list[dict[str, Any]]:
    """Good rows, silent ones, rows with special tokens, and bad ones, in no order."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        if index % 11 == 3:
            rows.append({"x": index})
        elif index % 7 == 2:
            rows.append(chat(f"q{index}", "silent", weight=0))
        elif index % 5 == 4:
            rows.append(chat(f"what is <|im_end|> {index}", "an end", "and", "<|im_start|>"))
        else:
            rows.append(chat(f"question {index}", "answer " * (index % 6 + 1), "ok?", " yes "))
    return rows


def contents_of(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


# Cut off


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("row", "error"),
    [
        pytest.param(row, error, marks=[] if row in often else [pytest.mark.slow])
        for error, often in ((KeyboardInterrupt, (0, 31, 99)), (OSError, (40,)), (MemoryError, ()))
        for row in (0, 3, 10, 14, 31, 40, 77, 98, 99)
    ],
)
def test_a_build_goes_on(
    inputs: Callable[..., StoreInputs],
    write_jsonl: Callable[..., Path],
    row: int,
    error: type[BaseException],
) -> None:
    template = CHATML.replace("+ '<|im_end|>'", "")  # adds a note to every sample
    files = [write_jsonl(odd_rows(60), "a.jsonl"), write_jsonl(odd_rows(40), "b.jsonl")]
    whole = open_store(
        inputs(*files, folder="whole", template=template, drop_bad=True), SilentReporter()
    )
    made = inputs(*files, template=template, drop_bad=True)
    with pytest.raises(error):
        open_store(made, Stopping(row, error))
    reporter = Stopping()
    again = open_store(inputs(*files, template=template, drop_bad=True), reporter)
    assert contents_of(again) == contents_of(whole)
    assert again.notes[NO_END_MARK] > 0
    rows = [*odd_rows(60), *odd_rows(40)]
    assert again.notes[SPECIAL_AS_TEXT] == sum("<|im" in str(row) for row in rows)
    if row < 10:
        assert reporter.notes == []
    if row >= 40:
        assert "going on behind row" in reporter.notes[0]
    assert [path.name for path in again.folder.parent.iterdir()] == [again.folder.name]


@pytest.mark.usefixtures("small_shards")
def test_a_build_cut_off_again_and_again(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(odd_rows(100))
    whole = open_store(inputs(path, folder="whole", drop_bad=True), SilentReporter())
    for row in (25, 26, 50, 50, 99):
        with pytest.raises(KeyboardInterrupt):
            open_store(inputs(path, drop_bad=True), Stopping(row))
    again = open_store(inputs(path, drop_bad=True), SilentReporter())
    assert contents_of(again) == contents_of(whole)


@pytest.mark.usefixtures("small_shards")
def test_an_unfinished_shard_is_made_again(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(odd_rows(100))
    whole = open_store(inputs(path, folder="whole", drop_bad=True), SilentReporter())
    made = inputs(path, drop_bad=True)
    with pytest.raises(KeyboardInterrupt):
        open_store(made, Stopping(60))
    shards = sorted((made.folder / f"{made.key()}.unfinished").glob("shard-*"))
    assert len(shards) >= 3
    (shards[-1] / "state.json").unlink()
    (shards[-1] / "ids.npy").write_bytes(b"half")
    reporter = Stopping()
    again = open_store(inputs(path, drop_bad=True), reporter)
    assert contents_of(again) == contents_of(whole)
    assert "going on behind row" in reporter.notes[0]
    assert not shards[0].exists()


@pytest.mark.usefixtures("small_shards")
def test_bad_rows_of_before_the_cut_are_counted(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_jsonl(odd_rows(100))
    bad = [n + 1 for n, row in enumerate(odd_rows(100)) if "x" in row]
    with pytest.raises(KeyboardInterrupt):
        open_store(inputs(path), Stopping(70))
    with pytest.raises(DataError) as caught:
        open_store(inputs(path), SilentReporter())
    assert caught.value.num_problems == len(bad)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:{n}" for n in bad]
    assert list((tmp_path / "stores").iterdir()) == []


def test_bad_rows_left_out(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    rows = odd_rows(100)
    store = open_store(inputs(write_jsonl(rows), drop_bad=True), SilentReporter())
    num_bad = sum("x" in row for row in rows)
    num_silent = sum("silent" in str(row) for row in rows)
    assert (store.num_bad, store.num_silent) == (num_bad, num_silent)
    assert store.num_samples == 100 - num_bad - num_silent
    lines = [store.origin(sample).line for sample in range(store.num_samples)]
    assert lines == [
        n for n, row in enumerate(rows, 1) if "x" not in row and "silent" not in str(row)
    ]
    split = split_of(store)
    assert (split.counts.bad, split.counts.unsupervised) == (num_bad, num_silent)


def test_nothing_but_bad_rows(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    rows = [{"x": 1}, chat("q", "a", weight=0), {"x": 2}]
    with pytest.raises(DataError) as caught:
        open_store(inputs(write_jsonl(rows), drop_bad=True), SilentReporter())
    assert caught.value.code == "data.nothing-to-learn"
    assert "2 bad rows, and 1" in caught.value.found


def test_a_sample_of_a_wrong_kind(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    rows = [chat("a", "b"), {"prompt": "q", "chosen": "good", "rejected": "bad"}]
    path = write_jsonl(rows)
    with pytest.raises(DataError) as caught:
        open_store(inputs(path), SilentReporter())
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("data.kind", f"{path}:2")
    assert problem.found == "a preference pair"
    store = open_store(inputs(path, drop_bad=True), SilentReporter())
    assert (store.num_samples, store.num_bad) == (1, 1)
    pairs = open_store(inputs(path, kinds=("Preference",), drop_bad=True), SilentReporter())
    assert pairs.num_samples == 1
    assert len(pairs.sequences_of(0)) == 2


# Two at once


def test_two_processes_build_the_same(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(make_rows(30))
    whole = open_store(inputs(path, folder="whole"), SilentReporter())
    made = inputs(path)
    finished: list[TokenStore] = []

    class Interrupted(SilentReporter):
        """In the middle of the first build, a second one starts and ends."""

        def measure(self, label: str, items: Any, total: int, position: Any) -> Iterator[Any]:
            for number, item in enumerate(items):
                if number == 15:
                    finished.append(open_store(inputs(path), SilentReporter()))
                    assert contents_of(finished[0]) == contents_of(whole)
                yield item

    first = open_store(made, Interrupted())
    assert contents_of(first) == contents_of(whole)
    # The second's maps stay readable, and nothing is left beside the store.
    assert finished[0].sequence(3).ids.tolist() == whole.sequence(3).ids.tolist()
    assert [item.name for item in made.folder.iterdir()] == [made.key()]


def test_a_held_workplace_is_left_alone(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(make_rows(5))
    made = inputs(path)
    shared = made.folder / f"{made.key()}.unfinished"
    shared.mkdir(parents=True)
    (shared / "shard-000000").mkdir()
    with directory_lock(shared):
        assert open_store(made, SilentReporter()).num_samples == 5
        assert (shared / "shard-000000").exists()
    assert {item.name for item in made.folder.iterdir()} == {made.key(), shared.name}


# Bounds


@pytest.mark.slow
def test_memory_is_bounded(
    inputs: Callable[..., StoreInputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows take no more memory: a shard and a few batches stand in it at a time.

    The smaller file is long enough to fill what is bounded: read-ahead and the caches.
    """
    monkeypatch.setattr("tunesmith.data.build.SHARD_SAMPLES", 100)
    monkeypatch.setattr("tunesmith.data.encode.BATCH_SAMPLES", 20)
    peaks: list[int] = []
    for count in (1000, 3000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for index in range(count):
                file.write(json.dumps(chat(f"q{index} " * 50, f"a{index} " * 150)) + "\n")
        made = inputs(path)
        tracemalloc.start()
        open_store(made, SilentReporter())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


# Raw text


def text_store(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path], texts: list[str]
) -> TokenStore:
    path = write_jsonl([{"text": text} for text in texts])
    return open_store(inputs(path), SilentReporter())


@pytest.mark.slow
def test_long_raw_texts(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    texts = ["长" * 300_000, "short", "line\n" * 100_000]
    store = text_store(inputs, write_jsonl, texts)
    tokenizer = make_byte_tokenizer()
    assert store.is_text.all()
    for sample, text in enumerate(texts):
        sequence = store.sequence(sample)
        assert tokenizer.decode(sequence.ids) == text + "<|im_end|>"
        assert sequence.runs == ((0, len(sequence.ids), 1.0),)


SETTINGS = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def three_texts(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("texts")
    path = folder / "d.jsonl"
    texts = ["".join(chr(97 + (n * 7) % 26) for n in range(size)) for size in (1, 90, 131)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = [Source(SourceConfig(path="d"), (path,))]
    made = StoreInputs(sources, Renderer(make_byte_tokenizer()), folder=folder / "stores")
    return open_store(made, SilentReporter())


@SETTINGS
@given(
    st.integers(2, 140), st.integers(1, 200), st.integers(1, 4), st.sampled_from(["auto", "split"])
)
def test_split_texts_predict_every_token_once(
    three_texts: TokenStore, max_length: int, budget: int, global_batch: int, overlong: str
) -> None:
    loader = Loader(
        three_texts, np.arange(3), global_batch, budget, max_length, seed=0, overlong=overlong,
        share_prefixes=False,
    )  # fmt: skip
    batches = [loader.batch(step) for step in range(loader.steps_per_epoch)]
    predicted: dict[int, list[int]] = {0: [], 1: [], 2: []}
    num_predicted = 0
    for batch in batches:
        for part in batch.micro_batches:
            assert max(part.segments.lengths) <= max_length
            for sample, target in zip(part.sample_N.tolist(), part.target_N.tolist(), strict=True):
                predicted[sample].append(target)
                num_predicted += 1
            # Every target stands behind its row, in the same piece.
            starts = set(part.segments.starts)
            assert not any(row + 1 in starts for row in part.row_N.tolist())
    for sample in range(3):
        expected = three_texts.sequence(sample).ids.tolist()[1:]
        assert Counter(predicted[sample]) == Counter(expected)
    assert num_predicted == sum(batch.num_supervised for batch in batches)


# Overlong samples

LONG = [chat("q", "a" * 20), chat("q" * 90, "a"), chat("q", "a" * 90), chat("q" * 40, "a" * 40)]


@pytest.mark.parametrize(
    ("overlong", "used", "counts"),
    [
        # truncated, split, dropped, unsupervised
        ("auto", [0, 2, 3], (2, 0, 0, 1)),
        ("cut_right", [0, 2, 3], (2, 0, 0, 1)),
        ("cut_left", [0, 1, 2, 3], (3, 0, 0, 0)),
        ("split", [0, 1, 2, 3], (0, 3, 0, 0)),
        ("drop", [0], (0, 0, 3, 0)),
    ],
)
def test_overlong_samples_are_counted(
    inputs: Callable[..., StoreInputs],
    write_jsonl: Callable[..., Path],
    overlong: str,
    used: list[int],
    counts: tuple[int, int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "MOST_WITHOUT_ANSWER", 0.5)
    store = open_store(inputs(write_jsonl(LONG)), SilentReporter())
    max_length = 80
    split = split_of(store, max_length=max_length, overlong=overlong)
    found = split.counts
    assert split.train.tolist() == used
    assert (found.truncated, found.split, found.dropped, found.unsupervised) == counts
    loader = Loader(store, split.train, 4, 500, max_length, seed=0, overlong=overlong)
    for part in loader.batch(0).micro_batches:
        assert max(part.segments.lengths) <= max_length
        assert set(part.sample_N.tolist()) <= set(used)
    parts = loader.batch(0).micro_batches
    assert {sample for part in parts for sample in part.sample_N.tolist()} == set(used)
    if overlong == "split":
        targets = Counter(target for part in parts for target in part.target_N.tolist())
        whole = [store.sequence(sample) for sample in range(4)]
        runs = [s.ids[first : first + n].tolist() for s in whole for first, n, _ in s.runs]
        assert targets == Counter(target for run in runs for target in run)


def test_text_is_split_and_chats_are_cut_by_default(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl([{"text": "t" * 100}], "t.jsonl")
    other = write_jsonl([chat("q", "a" * 100)], "c.jsonl")
    store = open_store(inputs(path, other), SilentReporter())
    counts = split_of(store, max_length=50, sources=2).counts
    assert (counts.split, counts.truncated) == (1, 1)


# Sources


def split_of(
    store: TokenStore,
    validation_store: TokenStore | None = None,
    *,
    max_length: int = 10_000,
    sources: int | list[dict[str, Any]] = 1,
    seed: int = 0,
    **data: Any,
) -> Split:
    given = [{}] * sources if isinstance(sources, int) else sources
    configs = [SourceConfig(path=f"d{n}", **settings) for n, settings in enumerate(given)]
    recipe = DataConfig.model_validate({"train": "d", "validation": 0, **data})
    stores = (store, validation_store)
    return make_split(recipe, configs, stores, max_length=max_length, seed=seed)


def numbered(start: int, stop: int) -> list[dict[str, Any]]:
    return [chat(f"question {number}", f"answer {number}") for number in range(start, stop)]


def test_weights_counts_and_replay(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    parts = [(0, 10), (10, 30), (30, 35), (35, 135)]
    paths = [write_jsonl(numbered(*p), f"{n}.jsonl") for n, p in enumerate(parts)]
    store = open_store(inputs(*paths), SilentReporter())
    sources = [{"weight": 2.5}, {"count": 7}, {"weight": 0.1}, {}]
    split = split_of(store, sources=sources, replay={"path": "r", "share": 0.25})
    draws = (25, 7, 1, 11)  # 11 of 44 are a quarter
    assert split.shares == tuple(
        Share(stop - start, n) for (start, stop), n in zip(parts, draws, strict=True)
    )
    loader = Loader(store, split.train, 8, 500, 1000, seed=1, shares=split.shares)
    assert loader.samples_per_epoch == 44
    for epoch in range(3):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        seen = [sample for step in steps for sample in loader.batch(step).sample_ids]
        found = Counter(int(store.sample_sources[sample]) for sample in seen)
        assert [found[source] for source in range(4)] == list(draws)


def test_replay_is_not_validated_on_and_shares_no_row_with_validation(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    own = write_jsonl(numbered(0, 40), "own.jsonl")
    general = write_jsonl([*numbered(0, 40), *numbered(100, 140)], "general.jsonl")
    store = open_store(inputs(own, general), SilentReporter())
    split = split_of(store, sources=2, validation=0.25, replay={"path": "r", "share": 0.5})
    assert set(store.sample_sources[split.validation].tolist()) == {0}
    hashes = store.sample_hashes
    assert not set(hashes[split.train].tolist()) & set(hashes[split.validation].tolist())
    assert split.counts.leaked == len(split.validation) == 10
    assert sum(share.size for share in split.shares) == len(split.train) == 120 - 20


def test_rows_of_a_validation_store_are_not_trained_on(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    store = open_store(inputs(write_jsonl(numbered(0, 20), "t.jsonl")), SilentReporter())
    other = open_store(inputs(write_jsonl(numbered(15, 25), "v.jsonl")), SilentReporter())
    split = split_of(store, other)
    assert split.train.tolist() == list(range(15))
    assert split.validation.tolist() == list(range(10))
    assert split.counts.leaked == 5
    assert split.shares == (Share(15, 15),)
    with pytest.raises(DataError) as caught:
        split_of(store, store)
    assert caught.value.code == "data.leak"
    assert "20 training samples, all of which" in caught.value.found


@SETTINGS
@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=20), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_copies_stay_on_one_side(
    tmp_path_factory: pytest.TempPathFactory, sources: list[list[int]], wanted: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("copies")
    paths = [folder / f"{number}.jsonl" for number in range(len(sources))]
    for path, numbers in zip(paths, sources, strict=True):
        rows = (json.dumps(chat(f"q{n}", f"a{n}")) + "\n" for n in numbers)
        path.write_text("".join(rows))
    found = [Source(SourceConfig(path=path.name), (path,)) for path in paths]
    made = StoreInputs(found, Renderer(make_byte_tokenizer()), folder=folder / "stores")
    store = open_store(made, SilentReporter())
    if wanted >= store.num_samples:
        with pytest.raises(DataError, match=r"data\.validation-size"):
            split_of(store, sources=len(sources), validation=wanted, seed=seed)
        return
    split = split_of(store, sources=len(sources), validation=wanted, seed=seed)
    hashes = store.sample_hashes
    inside, outside = hashes[split.train].tolist(), hashes[split.validation].tolist()
    assert not set(inside) & set(outside)
    assert sorted([*split.train, *split.validation]) == list(range(store.num_samples))
    assert [share.size for share in split.shares] == [
        int((store.sample_sources[split.train] == n).sum()) for n in range(len(sources))
    ]


def test_a_validation_split_of_its_own_is_found(
    tmp_path: Path, inputs: Callable[..., StoreInputs]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", numbered(0, 9)), ("validation", numbered(9, 12))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig.model_validate({"train": str(folder)})
    sources = find_sources(data, Path, SilentReporter())
    assert [file.name for source in sources.train for file in source.files] == ["train.jsonl"]
    assert [f.name for source in sources.validation for f in source.files] == ["validation.jsonl"]
    stores = [
        open_store(inputs(*(f for s in part for f in s.files)), SilentReporter())
        for part in (sources.train, sources.validation)
    ]
    split = split_of(*stores, validation="auto")
    assert (len(split.train), len(split.validation)) == (9, 3)
    none = find_sources(
        DataConfig.model_validate({"train": str(folder), "validation": 0}), Path, SilentReporter()
    )
    assert none.validation == ()


# Fill in the middle

TOKENS = InfillTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
NO_TOKENS = st.text(max_size=60).filter(lambda text: "fim_" not in text and text.isprintable())


@SETTINGS
@given(NO_TOKENS)
def test_the_text_of_an_infill_task_is_all_there(text: str) -> None:
    made = as_infill(text, 1.0, TOKENS)
    head, prefix, rest = made.partition(TOKENS.prefix)
    assert (head, prefix) == ("", TOKENS.prefix)
    start, suffix, rest = rest.partition(TOKENS.suffix)
    end, between, middle = rest.partition(TOKENS.middle)
    assert (suffix, between) == (TOKENS.suffix, TOKENS.middle)
    assert start + middle + end == text
    assert as_infill(text, 1.0, TOKENS) == made
    assert as_infill(text, 0.0, TOKENS) == text


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_infill_tasks(share: float) -> None:
    made = [as_infill(f"text number {number}", share, TOKENS) for number in range(2000)]
    found = sum(text.startswith(TOKENS.prefix) for text in made) / 2000
    assert abs(found - share) < 0.04
    # More of a share holds all of a lesser one: changing it changes few texts.
    more = [as_infill(f"text number {number}", share + 0.05, TOKENS) for number in range(2000)]
    pairs = zip(made, more, strict=True)
    assert all(one == other for one, other in pairs if one.startswith(TOKENS.prefix))


def test_infill_tokens_are_tokens(tokenizers_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers_folder / "qwen3")
    renderer = Renderer(tokenizer, RenderOptions(infill=(1.0, TOKENS)))
    text = "def add(a, b):\n    return a + b  # 加\n"
    segments = renderer.render(Text(text, ORIGIN))
    assert not isinstance(segments, Problem)
    ((sequence,),) = Encoder(tokenizer.backend_tokenizer).encode([segments])
    ids = sequence.ids.tolist()
    marks = [tokenizer.convert_tokens_to_ids(token) for token in vars_of(TOKENS)]
    assert [ids.count(mark) for mark in marks] == [1, 1, 1]
    first, second, third = (ids.index(mark) for mark in marks)
    assert first == 0 < second < third
    parts = ids[1:second], ids[third + 1 : -1], ids[second + 1 : third]
    assert "".join(tokenizer.decode(part) for part in parts) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert sequence.runs == ((0, len(ids), 1.0),)


def vars_of(tokens: InfillTokens) -> tuple[str, str, str]:
    return tokens.prefix, tokens.suffix, tokens.middle


@pytest.mark.slow
def test_infill_tokens_in_the_text_are_text(tokenizers_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers_folder / "qwen3")
    renderer = Renderer(tokenizer, RenderOptions(infill=(1.0, TOKENS)))
    segments = renderer.render(Text("the token <|fim_middle|> stands before the middle", ORIGIN))
    assert not isinstance(segments, Problem)
    ((sequence,),) = Encoder(tokenizer.backend_tokenizer).encode([segments])
    ids = sequence.ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids(TOKENS.middle)) == 1


# Which answers, and the prompts' weight


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("all", ["a1", "a2", "a3"]),
        ("last", ["a3"]),
        ((1,), ["a1"]),
        ((-1, 1), ["a1", "a3"]),
        ((3, -1), ["a3"]),
        ((2, 7, -9), ["a2"]),
        ((4,), []),
        ((-4, 0), []),
    ],
)
def test_which_answers_are_trained_on(train_on: Any, expected: list[str]) -> None:
    tokenizer = make_byte_tokenizer()
    renderer = Renderer(tokenizer, RenderOptions(train_on=train_on))
    messages = [
        message
        for n in (1, 2, 3)
        for message in (Message("user", f"q{n}"), Message("assistant", f"a{n}"))
    ]
    segments = renderer.render(Conversation(tuple(messages), ORIGIN))
    assert not isinstance(segments, Problem)
    (sequences,) = Encoder(tokenizer.backend_tokenizer).encode([segments])
    texts = [
        tokenizer.decode(sequence.ids[first : first + length]).removesuffix("<|im_end|>")
        for sequence in sequences
        for first, length, _ in sequence.runs
    ]
    assert texts == expected


def test_an_answer_of_weight_0_stays_silent_when_chosen() -> None:
    renderer = Renderer(make_byte_tokenizer(), RenderOptions(train_on="last"))
    messages = (Message("user", "q"), Message("assistant", "a", weight=0.0))
    assert renderer.render(Conversation(messages, ORIGIN)) == []


EARLY = "message['role'] == 'assistant' and not loop.last"
TEMPLATES = {
    "one sequence": CHATML,
    "a sequence for each answer": CHATML.replace(
        "+ '<|im_end|>'", f"+ ('' if {EARLY} else '~') + '<|im_end|>'"
    ),
}
WORDS = st.text(alphabet="ab ", min_size=1, max_size=5).filter(str.strip)


@pytest.mark.parametrize("name", TEMPLATES)
@SETTINGS
@given(
    texts=st.lists(WORDS, min_size=2, max_size=8),
    weights=st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=4, max_size=4),
)
def test_every_token_of_prompts_weighs_once(
    name: str, texts: list[str], weights: list[float]
) -> None:
    """Over all sequences of a sample, up to its last answer, each place is weighed once.

    Places are counted from the sample's last sequence, which has all of it: there an earlier
    sequence's tokens up to its answer are the same.
    """
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    texts = texts[: len(texts) // 2 * 2]
    messages = tuple(
        Message(("user", "assistant")[n % 2], text, weight=weights[n // 2] if n % 2 else 1.0)
        for n, text in enumerate(texts)
    )
    segments = Renderer(tokenizer).render(Conversation(messages, ORIGIN))
    assert not isinstance(segments, Problem)
    (plain,) = Encoder(tokenizer.backend_tokenizer).encode([segments])
    weighed = weigh_prompts(plain, 0.125)
    assert [s.ids.tolist() for s in weighed] == [s.ids.tolist() for s in plain]
    seen: Counter[tuple[int, ...]] = Counter()
    for before, after in zip(plain, weighed, strict=True):
        assert [run for run in after.runs if run[2] != 0.125] == list(before.runs)
        stops = [first + length for first, length, _ in after.runs]
        assert all(a <= b[0] for a, b in zip(stops, after.runs[1:], strict=False))
        # A place is all that stands before it: equal ones in two sequences are one.
        for first, length, weight in after.runs:
            if weight == 0.125:
                for place in range(first, first + length):
                    seen[tuple(after.ids[: place + 1].tolist())] += 1
    assert all(count == 1 for count in seen.values())
    answers = {
        tuple(s.ids[: place + 1].tolist())
        for s in plain
        for first, length, _ in s.runs
        for place in range(first, first + length)
    }
    places = {tuple(s.ids[: place + 1].tolist()) for s in plain for place in range(len(s.ids))}
    assert set(seen) | answers == places


def test_prompts_of_pairs_weigh_once() -> None:
    tokenizer = make_byte_tokenizer()
    answers = ("good", "goodness"), ("yes", "no"), ("same", "same")
    for chosen, rejected in answers:
        pair = Preference(
            (Message("user", "question"),),
            (Message("assistant", chosen),),
            (Message("assistant", rejected),),
            ORIGIN,
        )
        segments = Renderer(tokenizer).render(pair)
        assert not isinstance(segments, Problem)
        (plain,) = Encoder(tokenizer.backend_tokenizer).encode([segments])
        first, second = weigh_prompts(plain, 0.5)
        assert first.runs == ((0, plain[0].runs[0][0], 0.5), *plain[0].runs)
        assert second.runs == plain[1].runs


def test_prompt_weight_reaches_the_batches(
    inputs: Callable[..., StoreInputs], write_jsonl: Callable[..., Path]
) -> None:
    store = open_store(
        inputs(write_jsonl([chat("question", "answer", "more", "words")]), prompt_weight=0.25),
        SilentReporter(),
    )
    batch = Loader(store, np.arange(1), 1, 500, 500, seed=0).batch(0)
    num_answers = len("answer") + len("words") + 2
    num_others = store.length(0) - num_answers - 1  # the first token has no predictor
    assert batch.num_supervised == num_answers + num_others
    assert batch.supervised_weight == num_answers + 0.25 * num_others


def test_special_tokens_in_schemas_and_names_are_text() -> None:
    """Keys of a schema and the names of speakers are texts of the data, too."""
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + ' ' + (m.name or '') + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant \n' }}{% endif %}"
    )
    evil = "<|im_end|>"
    schema: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": "f",
            "description": f"about {evil}",
            "parameters": {"type": "object", "properties": {f"key {evil}": {"type": "string"}}},
        },
    }
    messages = (Message("user", "q", name=f"Ann{evil}"), Message("assistant", "a"))
    segments = Renderer(tokenizer).render(Conversation(messages, ORIGIN, (schema,)))
    assert not isinstance(segments, Problem)
    ((sequence,),) = Encoder(tokenizer.backend_tokenizer).encode([segments])
    assert (sequence.ids == tokenizer.convert_tokens_to_ids(evil)).sum() == 2
    assert tokenizer.decode(sequence.ids).count(evil) == 5


def test_completions_and_texts_have_their_special_tokens_as_text() -> None:
    tokenizer = make_byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    samples = [Completion("a<|im_end|>", "<|im_end|>b", ORIGIN), Text("<|im_end|>c", ORIGIN)]
    rendered = [Renderer(tokenizer).render(sample) for sample in samples]
    encoded = Encoder(tokenizer.backend_tokenizer).encode(rendered)  # type: ignore[arg-type]
    assert [(s.ids == end).sum() for (s,) in encoded] == [2, 1]


def make_spaced_tokenizer(scheme: str) -> Any:
    """A tokenizer in SentencePiece's way, whose token for the end takes white space along."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "▁", "\n", *(chr(code) for code in range(33, 127)), "▁a", "▁b"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges = [("▁", "a"), ("▁", "b")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.add_special_tokens(["<s>", AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>a {{ m.content }} b"
        "{% else %} {{ m.content }}</s> \n{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_special_token_in_a_text_changes_nothing_around_it(scheme: str) -> None:
    """A text with `<s>` in it has the tokens of a text with `<x>` in it but for that one letter."""
    tokenizer = make_spaced_tokenizer(scheme)
    found: list[list[str]] = []
    for word in ("<s>", "<x>"):
        messages = tuple(
            Message(role, f"{word}a {word} b{word}") for role in ("user", "assistant") * 2
        )
        segments = Renderer(tokenizer).render(Conversation(messages, ORIGIN))
        assert not isinstance(segments, Problem)
        (sequences,) = Encoder(tokenizer.backend_tokenizer).encode([segments])
        found.append([])
        for sequence in sequences:
            tokens = tokenizer.convert_ids_to_tokens(sequence.ids.tolist())
            found[-1] += [*tokens, str(sequence.runs)]
    assert found[0] == [token if token != "x" else "s" for token in found[1]]
    assert found[0].count("<s>") == found[1].count("<s>") > 0
