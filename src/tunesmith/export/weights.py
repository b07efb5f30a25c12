"""Weights by name, read one at a time, and written the same way: no model is ever held whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tunesmith.io.safeload import INDEX, WEIGHTS


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Of the tensor, in its own or another type."""
        return torch.Size(self.shape).numel() * (dtype or self.dtype).itemsize


class Weights(Protocol):
    """Named tensors that are read when they are asked for."""

    @property
    def facts(self) -> Mapping[str, Facts]:
        """Of every tensor, in the order of the files."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        ...


NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls types."""

TYPES = {name: dtype for dtype, name in NAMES.items()}


class FileWeights:
    """The tensors of safetensors files; pages that were read are given back by the system."""

    def __init__(self, files: Sequence[Path]) -> None:
        from safetensors import safe_open

        self._facts: dict[str, Facts] = {}
        self._files: dict[str, Any] = {}
        for path in files:
            file: Any = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - no mapping: it has no other way
                part = file.get_slice(name)
                kind = TYPES.get(part.get_dtype(), torch.uint8)
                self._facts[name] = Facts(tuple(part.get_shape()), kind)
                self._files[name] = file

    @property
    def facts(self) -> Mapping[str, Facts]:
        """Of every tensor, in the order of the files."""
        return self._facts

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return self._files[name].get_tensor(name)


def weights_of_folder(folder: Path) -> FileWeights:
    """The weights of a model's folder of our own making."""
    return FileWeights(sorted(folder.glob("*.safetensors")))


def shards(
    weights: Weights, dtype_of: Callable[[Facts], torch.dtype], max_bytes: int
) -> list[list[str]]:
    """The names in each file, in order; a tensor larger than a file gets one of its own."""
    found: list[list[str]] = [[]]
    room = max_bytes
    for name, facts in weights.facts.items():
        size = facts.num_bytes(dtype_of(facts))
        if size > room and found[-1]:
            found.append([])
            room = max_bytes
        found[-1].append(name)
        room -= size
    return found


def write_shards(
    weights: Weights,
    folder: Path,
    *,
    dtype_of: Callable[[Facts], torch.dtype],
    max_bytes: int,
    track: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
) -> int:
    """Writes weights as `model.safetensors`, or as shards with an index; the bytes of them all.

    Args:
        weights: what is written; one tensor is held at a time.
        folder: an existing one.
        dtype_of: the type that each becomes.
        max_bytes: of a file.
        track: passes the names on and counts them.
    """
    groups = shards(weights, dtype_of, max_bytes)
    names = iter(track([name for group in groups for name in group]))
    total = sum(facts.num_bytes(dtype_of(facts)) for facts in weights.facts.values())
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else WEIGHTS
        places.update(dict.fromkeys(group, file))
        _write_file(folder / file, weights, group, names, dtype_of)
    for _ in names:  # the end of the bar
        pass
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_file(
    path: Path,
    weights: Weights,
    group: Sequence[str],
    names: Iterable[str],
    dtype_of: Callable[[Facts], torch.dtype],
) -> None:
    """A safetensors file: the length of a JSON header, the header, then all bytes in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in group:
        facts = weights.facts[name]
        start, end = end, end + facts.num_bytes(dtype_of(facts))
        kind = NAMES[dtype_of(facts)]
        header[name] = {"dtype": kind, "shape": list(facts.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, name in zip(group, names, strict=False):
            dtype = dtype_of(weights.facts[name])
            file.write(raw_bytes(weights.read(name).to(dtype)))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, of any type that numpy has a word for or not."""
    flat: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)
