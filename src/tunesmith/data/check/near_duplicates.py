"""Near duplicates among millions of texts: MinHash signatures, 136 bytes a text, found by bands."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

_Codes = npt.NDArray[np.uint32]
_Indices = npt.NDArray[np.int64]

SIMILAR: Final = 0.85
_NUM_HASHES: Final = 128
# 16 bands of 8 one-byte rows: a pair at similarity s shares a band with 1 - (1 - s^8)^16, that is
# 99.4 % at 0.85, 61 % at 0.7 and 6 % at 0.5.
_NUM_BANDS: Final = 16
_CHANCE_MATCH: Final = 1 / 256  # two different minima with the same low byte
_MARGIN: Final = 0.1  # how far below the threshold an estimate is still worth an exact look
_SHINGLE, _CHINESE_SHINGLE = 5, 3
_SLICE: Final = 512  # shingles hashed at a time: 512 x 128 x 4 bytes stay in the second-level cache
_PAIRS_AT_A_TIME: Final = 1 << 16
_ROWS_PER_BLOCK: Final = 1 << 14

# Odd multipliers and offsets of the 128 hash functions; the raw stream of Philox never changes.
_STREAM: Final = np.random.Philox(key=np.array([20, 26], dtype=np.uint64)).random_raw(_NUM_HASHES)
_FACTORS: Final = ((_STREAM & 0xFFFFFFFF) | 1).astype(np.uint32)
_OFFSETS: Final = (_STREAM >> 32).astype(np.uint32)


class NearDuplicates:
    """Finds groups of texts that are at least 0.85 alike, and groups of identical texts.

    Alike means the Jaccard similarity of their sets of 5-character pieces (3 for Chinese,
    Japanese and Korean) after folding case and runs of white space. Memory is 136 bytes a text
    however long the texts are, and sorting in `groups` takes some 60 more for a moment.

    Similarities are estimated from 128 hashes with a standard error of 0.03: pairs above 0.92 are
    found in 99 of 100 cases, pairs under 0.75 are reported in less than one of 100, and
    between them the odds rise. Give `groups` a way to fetch texts and the similarity is exact,
    and only what the bands miss (0.6 % at 0.85) stays unfound.

    Not caught: the same words in another order, paraphrases, one text inside a much longer one,
    and texts of a few words, where one changed word already is a large difference. Rows of a
    template with other numbers filled in are found, and may be meant. A group is a chain: its
    first and last text can be less alike than neighbors in it.
    """

    def __init__(self) -> None:
        self._signatures: list[npt.NDArray[np.uint8]] = []
        self._digests: list[npt.NDArray[np.uint64]] = []
        self._num_texts = 0

    def __len__(self) -> int:
        return self._num_texts

    def add(self, text: str) -> None:
        """Take the next text; its index is the number of texts before it."""
        row = self._num_texts % _ROWS_PER_BLOCK
        if row == 0:
            self._signatures.append(np.empty((_ROWS_PER_BLOCK, _NUM_HASHES), dtype=np.uint8))
            self._digests.append(np.empty(_ROWS_PER_BLOCK, dtype=np.uint64))
        raw = text.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(raw, digest_size=8).digest()
        self._digests[-1][row] = int.from_bytes(digest, "little")
        self._signatures[-1][row] = _signature(_shingle_hashes(text))
        self._num_texts += 1

    def exact_groups(self) -> list[list[int]]:
        """Groups of identical texts, each ascending, in the order of their first index."""
        digests = self._all_digests()
        by_digest = np.argsort(digests, kind="stable")
        return sorted(run.tolist() for run in _equal_runs(digests, by_digest))

    def groups(self, text_at: Callable[[int], str] | None = None) -> list[list[int]]:
        """Groups of different texts that are alike, ascending, in the order of their first index.

        Of identical texts only the first stands in a group: the copies are in `exact_groups`.

        Args:
            text_at: Fetches a text by its index; candidates are then compared exactly.
        """
        if not self._num_texts:
            return []
        _, first = np.unique(self._all_digests(), return_index=True)
        originals = np.sort(first)
        leaders = _Leaders()
        least = SIMILAR if text_at is None else SIMILAR - _MARGIN
        for left, right in self._candidates(originals):
            likely = self._estimates(left, right) >= least
            for a, b in zip(left[likely].tolist(), right[likely].tolist(), strict=True):
                if leaders.find(a) != leaders.find(b) and _is_similar(a, b, text_at):
                    leaders.join(a, b)
        return leaders.groups()

    def _candidates(self, originals: _Indices) -> Iterator[tuple[_Indices, _Indices]]:
        """Pairs that share a band: each text with the first of its bucket and with its neighbor.

        So a bucket of n texts costs 2 n comparisons instead of n^2 / 2.
        """
        for band in range(_NUM_BANDS):
            keys = self._band(band)[originals]
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
            start_of = np.repeat(starts, np.diff(np.r_[starts, len(order)]))
            place = np.arange(len(order))
            follows = place > start_of
            neighbor = place > start_of + 1
            left = originals[order[np.r_[start_of[follows], place[neighbor] - 1]]]
            right = originals[order[np.r_[place[follows], place[neighbor]]]]
            for at in range(0, len(left), _PAIRS_AT_A_TIME):
                yield left[at : at + _PAIRS_AT_A_TIME], right[at : at + _PAIRS_AT_A_TIME]

    def _band(self, band: int) -> npt.NDArray[np.uint64]:
        """The eight bytes of one band of every text, as one number."""
        columns = [block.view(np.uint64)[:, band] for block in self._signatures]
        return np.concatenate(columns)[: self._num_texts]

    def _estimates(self, left: _Indices, right: _Indices) -> npt.NDArray[np.float64]:
        same = (self._rows(left) == self._rows(right)).mean(axis=1)
        return (same - _CHANCE_MATCH) / (1 - _CHANCE_MATCH)

    def _rows(self, indices: _Indices) -> npt.NDArray[np.uint8]:
        rows = np.empty((len(indices), _NUM_HASHES), dtype=np.uint8)
        blocks = indices // _ROWS_PER_BLOCK
        for block in np.unique(blocks):
            mine = blocks == block
            rows[mine] = self._signatures[int(block)][indices[mine] % _ROWS_PER_BLOCK]
        return rows

    def _all_digests(self) -> npt.NDArray[np.uint64]:
        if not self._digests:
            return np.empty(0, dtype=np.uint64)
        return np.concatenate(self._digests)[: self._num_texts]


class _Leaders:
    """Union-find over the few texts that have a near duplicate; the lowest index leads."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def find(self, index: int) -> int:
        leader = index
        while (parent := self._parent.get(leader, leader)) != leader:
            leader = parent
        while index != leader:
            self._parent[index], index = leader, self._parent[index]
        return leader

    def join(self, a: int, b: int) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        self._parent[high] = self._parent[low] = low

    def groups(self) -> list[list[int]]:
        members: dict[int, list[int]] = {}
        for index in sorted(self._parent):
            members.setdefault(self.find(index), []).append(index)
        return list(members.values())


def jaccard(a: str, b: str) -> float:
    """The share of common character pieces of two texts, exactly as `NearDuplicates` means it."""
    left, right = np.unique(_shingle_hashes(a)), np.unique(_shingle_hashes(b))
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)


def _is_similar(a: int, b: int, text_at: Callable[[int], str] | None) -> bool:
    return text_at is None or jaccard(text_at(a), text_at(b)) >= SIMILAR


def _shingle_hashes(text: str) -> _Codes:
    """One hash for each run of 5 (or 3) characters; a shorter text is one run of its own."""
    folded = " ".join(text.lower().split())
    codes = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    if not len(codes):
        return np.zeros(1, dtype=np.uint32)
    is_dense = int(np.count_nonzero(codes > 0x2E80)) * 2 > len(codes)
    length = min(_CHINESE_SHINGLE if is_dense else _SHINGLE, len(codes))
    hashes = np.zeros(len(codes) - length + 1, dtype=np.uint32)
    for start in range(length):
        hashes *= np.uint32(0x9E3779B1)
        hashes += codes[start : len(codes) - length + 1 + start]
    return _mix(hashes)


def _mix(hashes: _Codes) -> _Codes:
    """The finalizer of MurmurHash3: each bit of the input reaches each bit of the output."""
    hashes ^= hashes >> np.uint32(16)
    hashes *= np.uint32(0x85EBCA6B)
    hashes ^= hashes >> np.uint32(13)
    hashes *= np.uint32(0xC2B2AE35)
    hashes ^= hashes >> np.uint32(16)
    return hashes


def _signature(hashes: _Codes) -> npt.NDArray[np.uint8]:
    """The low byte of the least value that each of 128 hash functions takes on the shingles."""
    least = np.full(_NUM_HASHES, 0xFFFFFFFF, dtype=np.uint32)
    for start in range(0, len(hashes), _SLICE):
        table = hashes[start : start + _SLICE, None] * _FACTORS
        table += _OFFSETS
        np.minimum(least, table.min(axis=0), out=least)
    return (least & np.uint32(0xFF)).astype(np.uint8)


def _equal_runs(values: npt.NDArray[np.uint64], order: _Indices) -> list[_Indices]:
    """The places of values that occur more than once; `order` sorts the values."""
    ranked = values[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]][: len(ranked)])
    lengths = np.diff(np.r_[starts, len(ranked)])
    repeated = lengths > 1
    spans = zip(starts[repeated].tolist(), lengths[repeated].tolist(), strict=True)
    return [order[start : start + length] for start, length in spans]
