"""Builds a token store in shards: a build that is cut off goes on where its last shard ended."""

from __future__ import annotations

import json
import shutil
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tunesmith.data.columns import read_samples
from tunesmith.data.encode import Batch, Pipeline, Sourced
from tunesmith.data.hashes import hash_samples
from tunesmith.data.readers import Meter
from tunesmith.data.sources import Source
from tunesmith.data.store import ARRAYS, KINDS, StoreInputs, TokenStore, kind_of
from tunesmith.data.templates.skeleton import SkeletonMismatchError
from tunesmith.data.tokenize import TokenSequence
from tunesmith.errors import MAX_PROBLEMS, DataError, LockError, Problem, TunesmithError
from tunesmith.io.atomic import atomic_directory, write_atomic
from tunesmith.io.fault import fault
from tunesmith.io.lock import directory_lock
from tunesmith.io.manifest import find_damage, write_manifest
from tunesmith.io.redact import redact_tree
from tunesmith.types import Labeled, Origin, Rated, Reporter, Sample

SHARD_SAMPLES = 50_000
"""Samples between two points from which a build can go on."""


def open_store(inputs: StoreInputs, reporter: Reporter) -> TokenStore:
    """The store for these inputs, built if it is not in the cache or is damaged there.

    Raises:
        DataError: rows or files are wrong; up to MAX_PROBLEMS are listed, all are counted.
    """
    with reporter.waiting("Looking at the data files"):
        folder = inputs.folder / inputs.key()
        is_whole = find_damage(folder) is None
    if not is_whole:
        with _workplace(folder) as workplace:
            long_way = workplace / "long-way"
            if long_way.exists():
                inputs.renderer.skeletons = None
            try:
                _build(inputs, workplace, folder, reporter)
            except SkeletonMismatchError:
                reporter.note(
                    "the chat template treats some texts in a way of its own: every sample is "
                    "rendered by the template itself, which takes longer"
                )
                inputs.renderer.skeletons = None
                for shard in workplace.glob("shard-*"):
                    shutil.rmtree(shard)
                long_way.touch()  # a start after a kill must not take the shortcut again
                _build(inputs, workplace, folder, reporter)
    return TokenStore(folder)


@contextmanager
def _workplace(folder: Path) -> Generator[Path]:
    """The folder of unfinished shards; one of its own while a second process builds the same.

    What a kill leaves there stays for the next start; what ends by itself leaves nothing.
    """
    shared = folder.with_name(f"{folder.name}.unfinished")
    shared.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(directory_lock(shared))
            workplace = shared
        except LockError:
            workplace = Path(stack.enter_context(TemporaryDirectory(dir=folder.parent)))
        try:
            yield workplace
        except TunesmithError:
            shutil.rmtree(workplace, ignore_errors=True)
            raise
        shutil.rmtree(workplace, ignore_errors=True)


LARGE_BYTES = 8 << 20
"""From so much data on, a second spent on a faster tokenizer comes back."""

ARRAY_CODES: dict[Any, str] = {
    np.int16: "h",
    np.int32: "i",
    np.int64: "q",
    np.uint8: "B",
    np.uint64: "Q",
    np.float32: "f",
}
"""The codes of Python's own growing arrays."""


class _Columns:
    """Growing columns of a shard."""

    def __init__(self, progress: _Progress) -> None:
        self.arrays = {name: array(ARRAY_CODES[kind]) for name, kind in ARRAYS.items()}
        self.files, self.labels = progress.files, progress.labels

    @property
    def num_samples(self) -> int:
        return len(self.arrays["sample_line"])

    def add(self, rows: Sequence[tuple[int, Sample, Sequence[TokenSequence]]]) -> None:
        """Adds samples, each with its source and at least one token."""
        if not rows:
            return
        sequences = [sequence for _, _, own in rows for sequence in own]
        runs = [run for sequence in sequences for run in sequence.runs]
        ids = np.concatenate([sequence.ids for sequence in sequences])
        lengths = np.array([len(sequence.ids) for sequence in sequences])
        counts = np.array([len(own) for _, _, own in rows])
        for name, values in {
            "ids": ids,
            "lengths": lengths,
            "num_runs": [len(sequence.runs) for sequence in sequences],
            "run_first": [first for first, _, _ in runs],
            "run_length": [length for _, length, _ in runs],
            "run_weight": [weight for _, _, weight in runs],
            "num_sequences": counts,
            "sample_hash": hash_samples(ids, lengths, counts),
            "sample_line": [sample.origin.line for _, sample, _ in rows],
            "sample_file": [self._file(sample.origin) for _, sample, _ in rows],
            "sample_source": [source for source, _, _ in rows],
            "sample_kind": [KINDS.index(kind_of(sample)) for _, sample, _ in rows],
            "sample_label": [self._label(sample) for _, sample, _ in rows],
        }.items():
            self.arrays[name].frombytes(np.asarray(values, dtype=ARRAYS[name]).tobytes())

    def _file(self, origin: Origin) -> int:
        return self.files.setdefault((origin.path, origin.sheet), len(self.files))

    def _label(self, sample: Sample) -> int:
        if isinstance(sample, Labeled):
            return self.labels.setdefault(sample.label, len(self.labels))
        return int(isinstance(sample, Rated) and sample.is_good)

    def save(self, folder: Path) -> None:
        for name, values in self.arrays.items():
            np.save(folder / f"{name}.npy", np.asarray(values, dtype=ARRAYS[name]))


class _Progress:
    """What a build knows besides arrays; its state is saved with every shard."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.num_rows: int = state.get("num_rows", 0)
        self.num_silent: int = state.get("num_silent", 0)
        self.num_bad: int = state.get("num_bad", 0)
        self.problems = [Problem(**problem) for problem in state.get("problems", [])]
        self.notes = Counter[str](state.get("notes", {}))
        self.files = {(path, sheet): n for n, (path, sheet) in enumerate(state.get("files", []))}
        self.labels = {label: n for n, label in enumerate(state.get("labels", []))}
        # Of each source: all rows, and those of a kind that the objective cannot learn from.
        self.rows_of = Counter[int](dict(state.get("rows_of", [])))
        self.others_of = Counter[tuple[int, str]](
            {(source, kind): count for source, kind, count in state.get("others_of", [])}
        )

    def add(self, problem: Problem, source: int) -> None:
        self.num_bad += 1
        if problem.code == WRONG_KIND:
            self.others_of[source, problem.found] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def as_json(self) -> dict[str, Any]:
        problems = [
            {"where": p.where, "code": p.code, "found": p.found, "expected": p.expected}
            for p in self.problems
        ]
        return {
            "num_rows": self.num_rows,
            "num_silent": self.num_silent,
            "num_bad": self.num_bad,
            "problems": problems,
            "notes": dict(self.notes),
            "files": [list(file) for file in self.files],
            "labels": list(self.labels),
        }

    def state(self) -> dict[str, Any]:
        """What a build that goes on has to know besides what stays with the store."""
        return {
            **self.as_json(),
            "rows_of": list(self.rows_of.items()),
            "others_of": [[*key, count] for key, count in self.others_of.items()],
        }

    def check(self, inputs: StoreInputs) -> None:
        """Refuses what cannot be trained on."""
        is_nothing = self.num_rows == self.num_silent + self.num_bad
        foreign = self._foreign(inputs)
        if foreign and (is_nothing or not inputs.drop_bad):
            raise DataError(foreign, try_=self._other_objectives(inputs.kinds))
        if self.num_bad and not inputs.drop_bad:
            raise DataError(
                self.problems,
                num_problems=self.num_bad,
                try_=(
                    "correct these rows (`tunesmith check` shows them all, --fix leaves them out), "
                    "map other column names in the recipe (columns:), or set data.bad_rows=drop"
                ),
            )
        if is_nothing:
            found = "no rows"
            if self.num_rows:
                found = f"{self.num_bad} bad rows, and {self.num_silent} whose answers all weigh 0"
            code = "data.nothing-to-learn" if self.num_rows else "data.empty-file"
            where = str(inputs.sources[0].files[0])
            raise DataError([Problem(where, code, found, "at least one row to learn from")])

    def _foreign(self, inputs: StoreInputs) -> list[Problem]:
        """A problem for each source that has no row of a kind that the objective learns from."""
        others: dict[int, Counter[str]] = {}
        for (number, kind), count in self.others_of.items():
            others.setdefault(number, Counter())[kind] = count
        wanted = ", or ".join(f"{SPOKEN[kind]} ({SHAPES_OF[kind]})" for kind in inputs.kinds)
        return [
            Problem(
                str(inputs.sources[number].files[0]),
                WRONG_KIND,
                f"rows of other kinds alone: {_listed(kinds)}",
                f"for this objective {wanted}",
            )
            for number, kinds in sorted(others.items())
            if kinds.total() == self.rows_of[number]
        ]

    def _other_objectives(self, kinds: Sequence[str]) -> str:
        """What to try with data of other kinds."""
        spoken = {text: kind for kind, text in SPOKEN.items()}
        found = dict.fromkeys(spoken[text] for _, text in self.others_of)
        fitting = dict.fromkeys(OBJECTIVES_FOR[kind] for kind in found)
        tries = [f"objective={name}, which learns from such rows" for name in fitting]
        if "Rated" in found and "Completion" in kinds:
            tries.append("`format: completion` or another, which reads rows without their label")
        return "; or ".join([*tries, "data as docs/data.md shows it"])


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common())


def _build(inputs: StoreInputs, workplace: Path, folder: Path, reporter: Reporter) -> None:
    shards = _finished_shards(workplace)
    progress = _Progress(_state_of(shards[-1]) if shards else None)
    if shards:
        reporter.note(f"going on behind row {progress.num_rows:,} of an unfinished preparation")
    rows = islice(read_sources(inputs.sources, reporter), progress.num_rows, None)
    num_bytes = sum(source.num_bytes for source in inputs.sources)
    pipeline = Pipeline(inputs.renderer, inputs.prompt_weight, is_large=num_bytes > LARGE_BYTES)
    columns = _Columns(progress)
    for batch in pipeline.run(_accepted(rows, inputs.kinds)):
        fault("data.tokenize", rows=progress.num_rows)
        _add(batch, columns, progress)
        if columns.num_samples >= SHARD_SAMPLES:
            shards.append(_save_shard(workplace, len(shards), columns, progress))
            columns = _Columns(progress)
    if columns.num_samples or not shards:
        shards.append(_save_shard(workplace, len(shards), columns, progress))
    progress.check(inputs)
    with atomic_directory(folder) as temporary:
        _join(shards, temporary)
        meta = {
            **progress.as_json(),
            "content_key": inputs.content_key(),
            "fingerprints": inputs.fingerprints,
            "prompt_weight": inputs.prompt_weight,
        }
        write_atomic(temporary / "meta.json", json.dumps(redact_tree(meta), ensure_ascii=False))
        write_manifest(temporary)


def read_sources(
    sources: Sequence[Source], reporter: Reporter, label: str = "Reading and tokenizing"
) -> Iterator[Sourced]:
    """All samples of all sources, with their numbers, under a bar of the bytes read."""
    meter = Meter()
    total = sum(source.num_bytes for source in sources)
    rows = (
        (number, row)
        for number, source in enumerate(sources)
        for row in read_samples(source.config, source.files, meter)
    )
    return reporter.measure(label, rows, total, lambda: meter.bytes_read)


def _accepted(rows: Iterable[Sourced], kinds: tuple[str, ...]) -> Iterator[Sourced]:
    """Samples of kinds that the objective cannot learn from become problems."""
    for number, row in rows:
        if isinstance(row, Problem) or kind_of(row) in kinds:
            yield number, row
        else:
            found = SPOKEN[kind_of(row)]
            wanted = ", ".join(SPOKEN[kind] for kind in kinds)
            if kind_of(row) == "Rated":
                wanted += " (`format: completion` or another reads the row without its label)"
            yield number, Problem(str(row.origin), WRONG_KIND, found, wanted)


WRONG_KIND = "data.kind"
"""The code of a row that the objective cannot learn from."""

SPOKEN = {
    "Conversation": "a conversation",
    "Completion": "a prompt with its completion",
    "Text": "raw text",
    "Preference": "a preference pair",
    "Rated": "a rated answer",
    "Labeled": "a text with a label",
}

SHAPES_OF = {
    "Conversation": "`messages` with an assistant's answer",
    "Completion": "a `prompt` and its `completion`",
    "Text": "a `text`",
    "Preference": "a `prompt` with a `chosen` and a `rejected` answer",
    "Rated": "a `prompt`, its `completion` and a `label` (true or false)",
    "Labeled": "a `text` and its `label`",
}
"""How rows of a kind are written, in the shortest of their forms."""

OBJECTIVES_FOR = {
    "Conversation": "sft",
    "Completion": "sft",
    "Text": "pretrain",
    "Preference": "dpo",
    "Rated": "kto",
    "Labeled": "classify",
}
"""The usual objective for each kind."""


def _add(batch: Batch, columns: _Columns, progress: _Progress) -> None:
    progress.notes += batch.notes
    progress.num_rows += len(batch.rows)
    kept: list[tuple[int, Sample, Sequence[TokenSequence]]] = []
    for source, sample, result in batch:
        progress.rows_of[source] += 1
        if isinstance(result, Problem):
            progress.add(result, source)
        elif not isinstance(sample, Problem) and any(sequence.runs for sequence in result):
            kept.append((source, sample, result))
        else:
            progress.num_silent += 1
    columns.add(kept)


def _save_shard(workplace: Path, number: int, columns: _Columns, progress: _Progress) -> Path:
    folder = workplace / f"shard-{number:06d}"
    with atomic_directory(folder) as temporary:
        columns.save(temporary)
        state = json.dumps(progress.state(), ensure_ascii=False)
        (temporary / "state.json").write_text(state, encoding="utf-8")
        write_manifest(temporary)
    return folder


def _finished_shards(workplace: Path) -> list[Path]:
    """The shards of an earlier start, up to the first that is damaged."""
    shards = sorted(workplace.glob("shard-*"))
    return list(takewhile(lambda shard: find_damage(shard) is None, shards))


def _state_of(shard: Path) -> dict[str, Any]:
    return json.loads((shard / "state.json").read_text(encoding="utf-8"))


def _join(shards: Sequence[Path], folder: Path) -> None:
    """Lays the arrays of all shards end to end, a shard in memory at a time."""
    for name, kind in ARRAYS.items():
        parts = [np.load(shard / f"{name}.npy", mmap_mode="r") for shard in shards]
        size = sum(len(part) for part in parts)
        whole = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=kind, shape=(size,)
        )
        at = 0
        for part in parts:
            whole[at : at + len(part)] = part
            at += len(part)
        whole.flush()
