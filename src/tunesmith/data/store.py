"""The token store: every sample tokenized once, in memory-mapped arrays under a content hash."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.config.recipe import SourceConfig
from tunesmith.data.columns import read_samples
from tunesmith.data.templates import Renderer, Segment
from tunesmith.data.tokenize import TokenSequence, encode_samples
from tunesmith.errors import MAX_PROBLEMS, DataError, Problem
from tunesmith.io.atomic import atomic_directory
from tunesmith.io.manifest import file_sha256, find_damage, write_manifest
from tunesmith.types import Json, Origin, Reporter, Sample

STORE_VERSION = 3
"""Goes into the key: raise it when rendering or tokenization changes."""

BATCH_SAMPLES = 1000
"""Samples per parallel encode call: enough to fill all cores, little memory."""

ARRAYS = {
    "ids": np.int32,  # tokens of all sequences, end to end
    "offsets": np.int64,  # first token of each sequence, and the end
    "run_offsets": np.int64,  # first supervised run of each sequence, and the end
    "run_first": np.int32,  # within its sequence
    "run_length": np.int32,
    "run_weight": np.float32,
    "sample_offsets": np.int64,  # first sequence of each sample, and the end
    "sample_hash": np.uint64,  # of its token ids: equal samples have equal hashes
    "sample_line": np.int64,
    "sample_file": np.int32,  # index into meta.json's list of files
}


class TokenStore:
    """Read access to a built store; sequences and samples are numbered from 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}

    @property
    def content_key(self) -> str:
        """Hash of all that decides the tokens; where the files are is not part of it."""
        return self.meta["content_key"]

    @property
    def notes(self) -> dict[str, int]:
        """What rendering had to say, and for how many samples."""
        return self.meta["notes"]

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self._arrays["ids"].max(initial=0))

    @property
    def num_silent(self) -> int:
        """Samples of the files that are not in the store: none of their answers carries loss."""
        return self.meta["num_silent"]

    @property
    def num_samples(self) -> int:
        """Samples in the store."""
        return len(self._arrays["sample_line"])

    @property
    def sample_hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of each sample's tokens."""
        return self._arrays["sample_hash"]

    def origin(self, sample: int) -> Origin:
        """Where a sample came from."""
        files: list[str] = self.meta["files"]
        file = files[int(self._arrays["sample_file"][sample])]
        return Origin(file, int(self._arrays["sample_line"][sample]))

    def sequences_of(self, sample: int) -> range:
        """The sequences of one sample."""
        first, stop = self._arrays["sample_offsets"][sample : sample + 2]
        return range(int(first), int(stop))

    def sequence(self, index: int, max_length: int | None = None) -> TokenSequence:
        """One sequence, its end cut off beyond `max_length` tokens."""
        start, stop = (int(x) for x in self._arrays["offsets"][index : index + 2])
        if max_length is not None:
            stop = min(stop, start + max_length)
        first, last = (int(x) for x in self._arrays["run_offsets"][index : index + 2])
        runs: list[tuple[int, int, float]] = []
        for run in range(first, last):
            at = int(self._arrays["run_first"][run])
            length = min(int(self._arrays["run_length"][run]), stop - start - at)
            if length > 0:
                runs.append((at, length, float(self._arrays["run_weight"][run])))
        return TokenSequence(self._arrays["ids"][start:stop], tuple(runs))

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every sequence, nothing cut off."""
        return np.diff(self._arrays["offsets"])

    def first_supervised_of_samples(self) -> npt.NDArray[np.int64]:
        """Place of each sample's earliest supervised token in its sequence; huge if it has none."""
        starts, stops = self._arrays["run_offsets"][:-1], self._arrays["run_offsets"][1:]
        first = np.full(len(starts), np.iinfo(np.int64).max)
        has_runs = stops > starts
        first[has_runs] = self._arrays["run_first"][starts[has_runs]]
        return np.minimum.reduceat(first, self._arrays["sample_offsets"][:-1])

    def longest_of_samples(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample's longest sequence."""
        return np.maximum.reduceat(self.lengths(), self._arrays["sample_offsets"][:-1])


@dataclass(frozen=True)
class StoreInputs:
    """All that decides a store's content."""

    sources: Sequence[tuple[SourceConfig, Path]]
    renderer: Renderer
    folder: Path = field(compare=False)
    """Where stores are cached."""

    def key(self) -> str:
        """Name of the store in the cache: its content and, for the origins, the files' places."""
        places = [str(path) for _, path in self.sources]
        return hashlib.sha256(json.dumps([self.content_key(), places]).encode()).hexdigest()[:24]

    def content_key(self) -> str:
        """Hash of file contents, source settings, template, its arguments, and tokenizer."""
        tokenizer = self.renderer.tokenizer
        parts: list[Json] = [
            STORE_VERSION,
            str(tokenizer.chat_template),
            [str(tokenizer.bos_token), str(tokenizer.eos_token)],
            json.dumps(self.renderer.arguments, sort_keys=True),
            hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        ]
        for source, path in self.sources:
            settings = source.model_dump(mode="json", exclude={"path"})
            content = file_sha256(path) if path.is_file() else "missing"
            parts.append([content, json.dumps(settings, sort_keys=True)])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def open_store(inputs: StoreInputs, reporter: Reporter) -> TokenStore:
    """The store for these inputs, built if it is not in the cache or is damaged there.

    Raises:
        DataError: rows or files are wrong; up to MAX_PROBLEMS are listed, all are counted.
    """
    folder = inputs.folder / inputs.key()
    if find_damage(folder) is None:
        return TokenStore(folder)
    with atomic_directory(folder) as temporary:
        _build(inputs, temporary, reporter)
        write_manifest(temporary)
    return TokenStore(folder)


class _Columns:
    """Growing columns of a store; ids go straight to disk."""

    def __init__(self) -> None:
        codes = {np.int32: "i", np.int64: "q", np.float32: "f", np.uint64: "Q"}
        self.arrays = {name: array(codes[kind]) for name, kind in ARRAYS.items() if name != "ids"}
        for name in ("offsets", "run_offsets", "sample_offsets"):
            self.arrays[name].append(0)

    def add_sample(self, sequences: Sequence[TokenSequence], line: int, file: int) -> None:
        digest = hashlib.blake2b(digest_size=8)
        for sequence in sequences:
            digest.update(sequence.ids.tobytes() + b"|")
            self.arrays["offsets"].append(self.arrays["offsets"][-1] + len(sequence.ids))
            for first, length, weight in sequence.runs:
                self.arrays["run_first"].append(first)
                self.arrays["run_length"].append(length)
                self.arrays["run_weight"].append(weight)
            self.arrays["run_offsets"].append(len(self.arrays["run_first"]))
        self.arrays["sample_offsets"].append(len(self.arrays["offsets"]) - 1)
        self.arrays["sample_hash"].append(int.from_bytes(digest.digest(), "little"))
        self.arrays["sample_line"].append(line)
        self.arrays["sample_file"].append(file)

    def save(self, folder: Path) -> None:
        for name, values in self.arrays.items():
            np.save(folder / f"{name}.npy", np.asarray(values, dtype=ARRAYS[name]))


def _build(inputs: StoreInputs, folder: Path, reporter: Reporter) -> None:
    columns = _Columns()
    files = [str(path) for _, path in inputs.sources]
    numbers = {file: number for number, file in enumerate(files)}
    problems = _Problems()
    notes_before, num_silent = Counter(inputs.renderer.notes), 0
    raw = folder / "ids.raw"
    with raw.open("wb") as ids_file:
        rows = reporter.track("Reading and tokenizing", _read_all(inputs.sources))
        for batch in _batches(problems.keep_samples(rows), BATCH_SAMPLES):
            rendered = _render_batch(batch, inputs.renderer, problems)
            num_silent += len(batch) - len(rendered)
            segments = [item for _, item in rendered]
            encoded = encode_samples(inputs.renderer.tokenizer.backend_tokenizer, segments)
            for (sample, _), sequences in zip(rendered, encoded, strict=True):
                columns.add_sample(sequences, sample.origin.line, numbers[sample.origin.path])
                for sequence in sequences:
                    ids_file.write(sequence.ids.tobytes())
    problems.raise_if_any()
    if not columns.arrays["sample_line"]:
        found = "no rows" if not num_silent else f"{num_silent} rows whose answers all weigh 0"
        code = "data.nothing-to-learn" if num_silent else "data.empty-file"
        raise DataError([Problem(files[0], code, found, "at least one row to learn from")])
    np.save(folder / "ids.npy", np.fromfile(raw, dtype=np.int32))
    raw.unlink()
    columns.save(folder)
    notes = inputs.renderer.notes - notes_before
    meta = {
        "files": files,
        "notes": dict(notes),
        "num_silent": num_silent,
        "content_key": inputs.content_key(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def _read_all(sources: Sequence[tuple[SourceConfig, Path]]) -> Iterator[Sample | Problem]:
    for source, path in sources:
        yield from read_samples(source, path)


class _Problems:
    """Collects what is wrong: the first of them in full, the rest as a number."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def add(self, problem: Problem) -> None:
        self.count += 1
        if len(self.first) < MAX_PROBLEMS:
            self.first.append(problem)

    def keep_samples(self, rows: Iterable[Sample | Problem]) -> Iterator[Sample]:
        for row in rows:
            if isinstance(row, Problem):
                self.add(row)
            else:
                yield row

    def raise_if_any(self) -> None:
        if self.first:
            raise DataError(
                self.first,
                num_problems=self.count,
                try_="correct these lines, or map other column names in the recipe (columns:)",
            )


def _render_batch(
    batch: Sequence[Sample], renderer: Renderer, problems: _Problems
) -> list[tuple[Sample, list[Segment]]]:
    rendered: list[tuple[Sample, list[Segment]]] = []
    for sample in batch:
        segments = renderer.render(sample)
        if isinstance(segments, Problem):
            problems.add(segments)
        elif segments:
            rendered.append((sample, segments))
    return rendered


def _batches(items: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(items, size)):
        yield batch
