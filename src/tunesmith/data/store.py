"""The token store: every sample tokenized once, in memory-mapped arrays under a content hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.sources import Source
from tunesmith.data.templates import Renderer
from tunesmith.data.tokenize import TokenSequence
from tunesmith.io.manifest import file_sha256
from tunesmith.types import Origin, Sample

STORE_VERSION = 9
"""Goes into the key: raise it when rendering or tokenization changes."""

ARRAYS = {
    "ids": np.int32,  # tokens of all sequences, end to end
    "lengths": np.int32,  # tokens of each sequence
    "num_runs": np.int32,  # supervised runs of each sequence
    "run_first": np.int32,  # within its sequence
    "run_length": np.int32,
    "run_weight": np.float32,
    "num_sequences": np.int32,  # of each sample
    "sample_hash": np.uint64,  # of its token ids: equal samples have equal hashes
    "sample_line": np.int64,
    "sample_file": np.int32,  # index into meta.json's list of files
    "sample_source": np.int16,  # number of the source
    "sample_kind": np.uint8,  # index into KINDS
    "sample_label": np.int32,  # 1 where a sample is rated good; index into meta.json's labels
}

KINDS = ("Conversation", "Completion", "Text", "Preference", "Rated", "Labeled")
"""Kinds of samples, by the names of their classes."""

TEXT_KIND, RATED_KIND, LABELED_KIND = map(KINDS.index, ("Text", "Rated", "Labeled"))


class TokenStore:
    """Read access to a built store; sequences and samples are numbered from 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        self._offsets = _starts(self._arrays["lengths"])
        self._run_offsets = _starts(self._arrays["num_runs"])
        self._sample_offsets = _starts(self._arrays["num_sequences"])

    @property
    def content_key(self) -> str:
        """Hash of all that decides the tokens; where the files are is not part of it."""
        return self.meta["content_key"]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the parts of `content_key`, by names that a person knows."""
        return self.meta["fingerprints"]

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
    def num_bad(self) -> int:
        """Rows that were left out because something is wrong with them."""
        return self.meta["num_bad"]

    @property
    def num_samples(self) -> int:
        """Samples in the store."""
        return len(self._arrays["sample_line"])

    @property
    def sample_hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of each sample's tokens."""
        return self._arrays["sample_hash"]

    @property
    def sample_sources(self) -> npt.NDArray[np.int64]:
        """The number of each sample's source."""
        return self._arrays["sample_source"].astype(np.int64)

    @cached_property
    def is_text(self) -> npt.NDArray[np.bool_]:
        """Which samples are raw text."""
        return self._arrays["sample_kind"] == TEXT_KIND

    @cached_property
    def is_rated(self) -> npt.NDArray[np.bool_]:
        """Which samples are rated answers."""
        return self._arrays["sample_kind"] == RATED_KIND

    def label(self, sample: int) -> float:
        """1 for a sample that is rated good, else 0."""
        return float(self._arrays["sample_label"][sample])

    @property
    def labels(self) -> list[str]:
        """The labels of samples that have one, as they first come up; none of other data."""
        return self.meta["labels"]

    @cached_property
    def sample_labels(self) -> npt.NDArray[np.int64]:
        """The number of each sample's label in `labels`; 0 where samples have none."""
        numbers = self._arrays["sample_label"].astype(np.int64)
        return np.where(self._arrays["sample_kind"] == LABELED_KIND, numbers, 0)

    @property
    def strata(self) -> npt.NDArray[np.int64]:
        """A number for each sample that those of the same source and label have in common."""
        if not self.labels:
            return self.sample_sources
        both = self.sample_sources * len(self.labels) + self.sample_labels
        return np.unique(both, return_inverse=True)[1].astype(np.int64)

    def sequences_per_sample(self) -> npt.NDArray[np.int64]:
        """How many sequences each sample has."""
        return self._arrays["num_sequences"].astype(np.int64)

    def origin(self, sample: int) -> Origin:
        """Where a sample came from."""
        path, sheet = self.meta["files"][int(self._arrays["sample_file"][sample])]
        return Origin(path, int(self._arrays["sample_line"][sample]), sheet)

    def sequences_of(self, sample: int) -> range:
        """The sequences of one sample."""
        first, stop = self._sample_offsets[sample : sample + 2]
        return range(int(first), int(stop))

    def sequence(self, index: int, window: tuple[int, int] | None = None) -> TokenSequence:
        """One sequence, or the tokens [start, stop) of it."""
        begin, end = (int(x) for x in self._offsets[index : index + 2])
        start, stop = window or (0, end - begin)
        stop = min(stop, end - begin)
        first, last = (int(x) for x in self._run_offsets[index : index + 2])
        runs: list[tuple[int, int, float]] = []
        for run in range(first, last):
            at = int(self._arrays["run_first"][run])
            till = min(at + int(self._arrays["run_length"][run]), stop)
            at = max(at, start)
            if till > at:
                runs.append((at - start, till - at, float(self._arrays["run_weight"][run])))
        return TokenSequence(self._arrays["ids"][begin + start : begin + stop], tuple(runs))

    def length(self, index: int) -> int:
        """Tokens of one sequence."""
        return int(self._arrays["lengths"][index])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every sequence, nothing cut off."""
        return self._arrays["lengths"].astype(np.int64)

    def supervised_of_samples(self) -> npt.NDArray[np.int64]:
        """Supervised tokens of each sample."""
        of_runs = np.concatenate([[0], np.cumsum(self._arrays["run_length"], dtype=np.int64)])
        return np.diff(of_runs[self._run_offsets[self._sample_offsets]])

    def tokens_of_samples(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample, all its sequences together."""
        return np.diff(self._offsets[self._sample_offsets])

    def first_answer_of_samples(self) -> npt.NDArray[np.int64]:
        """Place of each sample's earliest answer in its sequence; huge if it has none.

        Where prompts have a weight, a sequence's first run is that of its prompt.
        """
        starts, stops = self._run_offsets[:-1], self._run_offsets[1:]
        first = np.full(len(starts), np.iinfo(np.int64).max)
        has_runs = stops > starts
        skipped = ((stops - starts > 1) & (self.meta["prompt_weight"] > 0)).astype(np.int64)
        first[has_runs] = self._arrays["run_first"][(starts + skipped)[has_runs]]
        return np.minimum.reduceat(first, self._sample_offsets[:-1])

    def prompts_of_samples(self) -> npt.NDArray[np.int64]:
        """Tokens before each sample's last answer, in the sequence that has it."""
        last = self._sample_offsets[1:] - 1
        return self._arrays["run_first"][self._run_offsets[1:][last] - 1].astype(np.int64)

    def longest_of_samples(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample's longest sequence."""
        return np.maximum.reduceat(self.lengths(), self._sample_offsets[:-1])


def _starts(sizes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Where each of a row of things begins, and the end."""
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


@dataclass(frozen=True)
class StoreInputs:
    """All that decides a store's content.

    Args:
        sources: what is read.
        renderer: with the tokenizer, the template and its options.
        kinds: the samples that the objective can learn from, as class names.
        prompt_weight: loss weight of tokens that are no answer.
        drop_bad: leave rows with problems out and count them, rather than stop.
        folder: where stores are cached.
    """

    sources: Sequence[Source]
    renderer: Renderer
    kinds: tuple[str, ...] = ("Conversation", "Completion", "Text")
    prompt_weight: float = 0.0
    drop_bad: bool = False
    folder: Path = field(kw_only=True, compare=False)

    def key(self) -> str:
        """Name of the store in the cache: its content and, for the origins, the files' places."""
        places = [[str(path) for path in source.files] for source in self.sources]
        return hashlib.sha256(json.dumps([self.content_key(), places]).encode()).hexdigest()[:24]

    def content_key(self) -> str:
        """Hash of file contents, source settings, template, its options, and tokenizer."""
        return _digest(list(self.fingerprints.items()))

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of all that decides the tokens, each under a name that a person knows.

        Files go by their names alone: they may have moved.
        """
        tokenizer = self.renderer.tokenizer
        found = {
            "version of the store": str(STORE_VERSION),
            "chat template": _digest([str(tokenizer.chat_template), self.renderer.options.key()]),
            "tokenizer": _digest(
                [
                    str(tokenizer.bos_token),
                    str(tokenizer.eos_token),
                    tokenizer.backend_tokenizer.to_str(),
                ]
            ),
            "settings of the data": _digest([self.prompt_weight, self.drop_bad, *self.kinds]),
        }
        for number, source in enumerate(self.sources, start=1):
            # What only mixes or names does not change any token.
            settings = source.config.model_dump(
                mode="json", exclude={"path", "name", "weight", "count", "sha1"}
            )
            found[f"settings of source {number}"] = _digest(settings)
            for path in source.files:
                name = f"{path.name} (source {number})" if len(self.sources) > 1 else path.name
                while name in found:
                    name += " again"
                found[name] = content_hash(path)
        return found


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def content_hash(path: Path) -> str:
    """The sha256 of a file, or what stands for a file that is not there."""
    return file_sha256(path) if path.is_file() else "missing"


def kind_of(sample: Sample) -> str:
    """The name of a sample's kind."""
    return type(sample).__name__
