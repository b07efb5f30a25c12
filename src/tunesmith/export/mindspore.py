"""Weights for MindFormers: `.ckpt` and safetensors files with its names, made without MindSpore.

A `.ckpt` file is a protobuf message of values; each has a tag and a tensor (dims, type, bytes).
The writer and the reader here follow mindspore/core/load/ckpt.proto; files that MindSpore 2.10
wrote come out of both unchanged, byte for byte. Nothing here was run in MindSpore itself or on an
Ascend device.
"""

from __future__ import annotations

import json
import mmap
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ExportError, ModelError, UserError
from tunesmith.export.merged import (
    DTYPES,
    MergedModel,
    open_merged,
    write_settings,
    write_tokenizer,
)
from tunesmith.export.trained import Trained
from tunesmith.export.verify import Sample
from tunesmith.export.weights import Facts, Weights, raw_bytes, write_shards
from tunesmith.export.written import Request, Written, folder_logits, folder_prompts
from tunesmith.io.atomic import require_space
from tunesmith.types import Reporter

CKPT, SAFETENSORS = "model.ckpt", "model_mindspore.safetensors"
NAME_MAP = "param_name_map.json"

SLICE_BYTES = 512 << 20
"""A longer tensor is several values of one tag, as MindSpore writes it: protobuf ends at 2 GiB."""

FAMILIES = ("llama", "mistral", "qwen2")
"""Of transformers; MindFormers' LlamaForCausalLM holds all of them."""

_MODULES = {
    "embed_tokens.weight": "tok_embeddings.embedding_weight",
    "norm.weight": "norm_out.weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""transformers' parts of names -> MindFormers'."""

TYPES = {
    torch.float64: "Float64",
    torch.float32: "Float32",
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
    torch.int64: "Int64",
    torch.int32: "Int32",
    torch.int8: "Int8",
    torch.uint8: "UInt8",
    torch.bool: "Bool",
}
"""What `.ckpt` files call types."""


def mindspore_name(name: str) -> str:
    """MindFormers' name of a weight of transformers' Llama or Qwen2.

    Raises:
        KeyError: it has none.
    """
    if name == "lm_head.weight":
        return name
    match = re.fullmatch(r"model\.(layers\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    if match is None:
        raise KeyError(name)
    layer, part, ending = match[1] or "", match[2], match[3] or ""
    if not layer:
        return f"model.{_MODULES[part + ending]}"
    return f"model.{layer}{_MODULES[part]}{ending}"


def transformers_name(name: str) -> str:
    """The name in transformers of a weight of MindFormers.

    Raises:
        KeyError: it has none, as an optimizer's values.
    """
    if name == "lm_head.weight":
        return name
    back = {theirs: ours for ours, theirs in _MODULES.items()}
    match = re.fullmatch(r"model\.(layers\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    if match is None:
        raise KeyError(name)
    layer, part, ending = match[1] or "", match[2], match[3] or ""
    if not layer:
        return f"model.{back[part + ending]}"
    return f"model.{layer}{back[part]}{ending}"


# Writing


def export_mindspore(
    trained: Trained, folder: Path, request: Request, reporter: Reporter
) -> Written:
    """Writes both files, the map of names, settings and tokenizer.

    Raises:
        UserError: MindFormers' Llama does not hold such a model (`export.mindspore-family`).
    """
    with open_merged(trained, reporter) as merged:
        config = merged.config
        if config.model_type not in FAMILIES or trained.head is not None:
            raise UserError(
                "export.mindspore-family",
                trained.label,
                found=f"a model of the type {config.model_type}"
                + (" with scores" if trained.head else ""),
                expected=f"a language model of one of {', '.join(FAMILIES)}",
                try_="--to merged: newer versions of MindFormers load that folder",
            )
        wanted = DTYPES.get(request.dtype)
        named = _Renamed(merged.weights, wanted)
        size = sum(facts.num_bytes() for facts in named.facts.values())
        require_space(folder, 2 * size)
        names = reporter.track("Writing .ckpt", named.facts, total=len(named.facts))
        write_ckpt(((name, named.read(name)) for name in names), folder / CKPT)
        _write_safetensors(named, folder)
        write_settings(merged, folder, _type_name(named))
        pairs = {mindspore_name(name): name for name in merged.weights.facts}
        (folder / NAME_MAP).write_text(json.dumps(pairs, indent=1) + "\n", encoding="utf-8")
        notes = (*merged.notes, "read again by tunesmith, not by MindSpore, which is not needed")
        _check_same(named, CkptWeights(folder / CKPT), folder / CKPT)
    write_tokenizer(trained, folder)
    kind = _type_name(named)
    has_template = trained.tokenizer.chat_template is not None
    return Written(
        kind if kind in DTYPES else "float32",
        "tunesmith's reader of .ckpt, then transformers",
        _logits(folder, trained, merged, request.compute),
        folder_prompts(folder) if has_template else None,
        notes,
    )


class _Renamed:
    """Weights under MindFormers' names."""

    def __init__(self, weights: Weights, dtype: torch.dtype | None) -> None:
        self._weights, self._names = weights, {mindspore_name(n): n for n in weights.facts}
        own = {theirs: weights.facts[ours] for theirs, ours in self._names.items()}
        self._facts = {name: Facts(f.shape, dtype or f.dtype) for name, f in own.items()}

    @property
    def facts(self) -> Mapping[str, Facts]:
        return self._facts

    def read(self, name: str) -> torch.Tensor:
        return self._weights.read(self._names[name]).to(self._facts[name].dtype)


def _type_name(weights: Weights) -> str:
    kinds = [str(facts.dtype).removeprefix("torch.") for facts in weights.facts.values()]
    return max(set(kinds), key=kinds.count)


def _write_safetensors(weights: Weights, folder: Path) -> None:
    """The same weights as safetensors, in one file."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write_shards(
            weights, Path(temporary), dtype_of=lambda facts: facts.dtype, max_bytes=1 << 62
        )
        (Path(temporary) / "model.safetensors").replace(folder / SAFETENSORS)


def write_ckpt(tensors: Iterable[tuple[str, torch.Tensor]], file: Path) -> None:
    """Writes tensors as a MindSpore checkpoint; one of them is held at a time."""
    with file.open("wb") as stream:
        for tag, tensor in tensors:
            content = raw_bytes(tensor)
            for start in range(0, max(len(content), 1), SLICE_BYTES):
                part = content[start : start + SLICE_BYTES]
                head, num_bytes = _value_head(tag, tensor, len(part))
                stream.write(b"\x0a" + _varint(num_bytes) + head)
                stream.write(part)


def _value_head(tag: str, tensor: torch.Tensor, num_bytes: int) -> tuple[bytes, int]:
    """All of a value before the tensor's bytes, and the length of the value with them."""
    dims = b"".join(b"\x08" + _varint(size) for size in tensor.shape)
    kind = TYPES[tensor.dtype].encode()
    inner = dims + b"\x12" + _varint(len(kind)) + kind + b"\x1a" + _varint(num_bytes)
    name = tag.encode()
    head = b"\x0a" + _varint(len(name)) + name
    head += b"\x12" + _varint(len(inner) + num_bytes) + inner
    return head, len(head) + num_bytes


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


# Reading


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are: a slice of the file for each of its values."""

    facts: Facts
    slices: tuple[tuple[int, int], ...]


class CkptWeights:
    """The tensors of a `.ckpt` file, by their tags.

    Raises:
        ModelError: it is none, or is cut off (`model.bad-ckpt`).
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        with file.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._content = content
        try:
            self._places = self._walk()
        except (IndexError, ValueError, KeyError, UnicodeDecodeError) as error:
            raise self._bad(str(error) or "a file that is cut off") from error

    @property
    def facts(self) -> Mapping[str, Facts]:
        """Of every tensor, in the order of the file."""
        return {tag: place.facts for tag, place in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        place = self._places[name]
        raw = bytearray().join(self._content[start:end] for start, end in place.slices)
        if not raw:
            return torch.empty(place.facts.shape, dtype=place.facts.dtype)
        return torch.frombuffer(raw, dtype=place.facts.dtype).reshape(place.facts.shape)

    def _walk(self) -> dict[str, _Place]:
        known = {name: dtype for dtype, name in TYPES.items()}
        found: dict[str, _Place] = {}
        for _, begin, end in _fields(self._content, 0, len(self._content)):
            parts = list(_fields(self._content, begin, end))
            tag = next(self._content[a:b].decode() for key, a, b in parts if key == 1)
            tensor = next(((a, b) for key, a, b in parts if key == 2), None)
            if tensor is None:
                raise ValueError(f"{tag}, which is no tensor")
            inner = list(_fields(self._content, *tensor))
            shape = tuple(a for key, a, _ in inner if key == 1)
            kind = next(self._content[a:b].decode() for key, a, b in inner if key == 2)
            content = next(((a, b) for key, a, b in inner if key == 3), (0, 0))
            before = found[tag].slices if tag in found else ()
            found[tag] = _Place(Facts(shape, known[kind]), (*before, content))
        for tag, place in found.items():
            if sum(b - a for a, b in place.slices) != place.facts.num_bytes():
                raise ValueError(f"{tag} of another size than it says")
        return found

    def _bad(self, found: str) -> ModelError:
        return ModelError(
            "model.bad-ckpt", str(self._file), found=found[:200], expected="a MindSpore checkpoint"
        )


def _fields(content: Any, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Fields of a protobuf message: number, then begin and end of bytes, or a number twice."""
    while at < end:
        key, at = _number(content, at)
        value, at = _number(content, at)
        if key & 7 == 0:
            yield key >> 3, value, value
        elif key & 7 == 2 and at + value <= end:
            yield key >> 3, at, at + value
            at += value
        else:
            raise ValueError("a file that is cut off, or no protobuf")


def _number(content: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _check_same(weights: Weights, again: CkptWeights, file: Path) -> None:
    """Compares what was written with what is read, bit for bit."""
    for name in weights.facts:
        if name not in again.facts or not torch.equal(weights.read(name), again.read(name)):
            raise ExportError(
                "export.differs",
                str(file),
                found=f"{name} with other values than were written",
                expected="the same, bit for bit",
            )


def _logits(folder: Path, trained: Trained, merged: MergedModel, dtype: str) -> Any:
    """What gives the logits of the `.ckpt` file, by transformers' model of its weights."""

    def logits(samples: Sequence[Sample]) -> list[torch.Tensor]:
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as temporary:
            place = Path(temporary)
            write_shards(
                _BackNamed(CkptWeights(folder / CKPT)),
                place,
                dtype_of=lambda facts: facts.dtype,
                max_bytes=1 << 62,
            )
            for name in ("config.json", "generation_config.json"):
                (place / name).write_bytes((folder / name).read_bytes())
            return folder_logits(place, trained, dtype)(samples)

    return logits


class _BackNamed:
    """A checkpoint's weights under transformers' names."""

    def __init__(self, weights: CkptWeights) -> None:
        self._weights = weights
        self._names = {transformers_name(name): name for name in weights.facts}

    @property
    def facts(self) -> Mapping[str, Facts]:
        known = self._weights.facts
        return {ours: known[theirs] for ours, theirs in self._names.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._weights.read(self._names[name])
