"""GGUF files, for llama.cpp and all that is built on it.

Matrices are quantized by the gguf package, whose q8_0 is bit for bit that of llama.cpp. Its blocks
hold 32 weights of a row; rows that are no multiple of 32 stay f16. With fewer than 8 bits,
embedding and head are q8_0, as they are the matrices that suffer most. Vectors are always f32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import UserError
from tunesmith.export.gguf_families import Family, family_of, rope_factors, turned, write_keys
from tunesmith.export.gguf_reload import gguf_logits, gguf_prompts, llama_cpp_checks
from tunesmith.export.gguf_vocabulary import vocabulary_of, write_vocabulary
from tunesmith.export.merged import MergedModel, open_merged
from tunesmith.export.merged_sum import HEAD
from tunesmith.export.trained import Trained, with_defaults
from tunesmith.export.weights import Facts
from tunesmith.export.written import Request, Written
from tunesmith.io.atomic import require_space
from tunesmith.types import Reporter

FILE = "model.gguf"

TYPES: dict[str, tuple[str, str]] = {
    "f32": ("ALL_F32", "float32"),
    "f16": ("MOSTLY_F16", "float16"),
    "bf16": ("MOSTLY_BF16", "bfloat16"),
    "q8_0": ("MOSTLY_Q8_0", "q8_0"),
    "q5_1": ("MOSTLY_Q5_1", "5 bits"),
    "q5_0": ("MOSTLY_Q5_0", "5 bits"),
    "q4_1": ("MOSTLY_Q4_1", "4 bits"),
    "q4_0": ("MOSTLY_Q4_0", "4 bits"),
}
"""What can be written -> llama.cpp's name of such a file, and the tolerance of verification."""

BLOCK = 32
LARGEST_F16 = 65504.0


def gguf_type(request: Request) -> str:
    """The type that is asked for, f16 if none is.

    Raises:
        UserError: it cannot be written here (`export.quantization`).
    """
    name = (request.quantization or "f16").lower()
    if name not in TYPES:
        is_k = name.startswith(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq"))
        raise UserError(
            "export.quantization",
            "--quantization",
            found=name,
            expected=f"one of {', '.join(TYPES)}",
            try_="write f16 and let llama.cpp's llama-quantize make it: K-quants need its own code"
            if is_k
            else None,
        )
    return name


def export_gguf(trained: Trained, folder: Path, request: Request, reporter: Reporter) -> Written:
    """Writes `model.gguf`.

    Raises:
        UserError: the model, its tokenizer or the quantization cannot be written
            (`export.gguf-family`, `export.gguf-tokenizer`, `export.quantization`).
    """
    kind = gguf_type(request)
    if trained.head is not None:
        raise UserError(
            "export.gguf-family",
            trained.label,
            found="a model of scores",
            expected="a language model",
            try_="--to merged",
        )
    with open_merged(trained, reporter) as merged:
        config = _text_config(merged)
        notes = (*merged.notes, *_write(trained, merged, config, folder / FILE, kind, reporter))
    logits = gguf_logits(folder / FILE, trained, config)
    checks, more = llama_cpp_checks(folder / FILE, trained, request, TYPES[kind][1])
    return Written(
        TYPES[kind][1],
        "transformers' GGUF reader",
        logits,
        gguf_prompts(folder / FILE, trained),
        (*notes, *more),
        checks,
    )


def _text_config(merged: MergedModel) -> Any:
    return merged.config.get_text_config()


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file.

    Args:
        source: its name in transformers' files; empty for rotary factors.
        name: in GGUF.
        type_: of ggml.
    """

    source: str
    name: str
    facts: Facts
    type_: Any


def _write(
    trained: Trained,
    merged: MergedModel,
    config: Any,
    file: Path,
    kind: str,
    reporter: Reporter,
) -> tuple[str, ...]:
    import gguf

    family = family_of(config, trained.label)
    embedding = next(n for n in merged.weights.facts if n.endswith("embed_tokens.weight"))
    num_rows = merged.weights.facts[embedding].shape[0]
    vocabulary = vocabulary_of(trained, num_rows)
    writer: Any = gguf.GGUFWriter(file, family.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    name = Path(trained.label).name
    # By this very name transformers takes a Llama for another class, which it then cannot read.
    writer.add_name(f"{name} model" if name == "mistral" else name)
    writer.add_file_type(getattr(gguf.LlamaFileType, TYPES[kind][0]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = write_keys(writer, config, num_rows=num_rows, label=trained.label)
    template = trained.tokenizer.chat_template or ""
    template = with_defaults(template, trained.template_arguments) if template else ""
    write_vocabulary(writer, vocabulary, trained, template)
    tensors = list(_tensors(merged, config, family, kind, trained.label))
    odd = [each.name for each in tensors if kind not in ("f32", "f16") and _is_odd(each, kind)]
    if odd:
        notes += (f"{len(odd)} matrices stay f16: rows that are no multiple of {BLOCK}",)
    if kind[:2] in ("q4", "q5"):
        notes += ("embedding and head are q8_0",)
    size = 0
    for each in tensors:
        shape = gguf.quant_shape_to_byte_shape(each.facts.shape, each.type_)
        num_bytes = torch.Size(shape).numel()
        size += num_bytes
        writer.add_tensor_info(
            each.name, each.facts.shape, _numpy_float32(), num_bytes, raw_dtype=each.type_
        )
    require_space(file.parent, size)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in reporter.track("Writing GGUF", tensors, total=len(tensors)):
            writer.write_tensor_data(_content(each, merged, family, config))
    finally:
        writer.close()
    return notes


def _numpy_float32() -> Any:
    import numpy as np

    return np.dtype(np.float32)


def _is_odd(tensor: _Tensor, kind: str) -> bool:
    return tensor.type_.name == "F16" and kind.startswith("q")


def _tensors(
    merged: MergedModel, config: Any, family: Family, kind: str, label: str
) -> Iterator[_Tensor]:
    """The tensors of the file, in the order of the files they come from."""
    import gguf

    arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    is_tied = bool(merged.settings.get("tie_word_embeddings", config.tie_word_embeddings))
    if (factors := rope_factors(config)) is not None:
        facts = Facts(tuple(factors.shape), torch.float32)
        yield _Tensor("", "rope_freqs.weight", facts, gguf.GGMLQuantizationType.F32)
    for source, facts in merged.weights.facts.items():
        if source.endswith(("rotary_emb.inv_freq", "masked_bias")) or (is_tied and source == HEAD):
            continue
        plain = source.replace("language_model.", "")
        name = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                "export.gguf-family",
                label,
                found=f"the weight {source}",
                expected=f"the weights of {family.architecture} alone",
            )
        yield _Tensor(source, name, facts, _type(name, facts, kind))


def _type(name: str, facts: Facts, kind: str) -> Any:
    import gguf

    types = gguf.GGMLQuantizationType
    if len(facts.shape) < 2 or kind == "f32":
        return types.F32
    if kind in ("f16", "bf16"):
        return types[kind.upper()]
    if facts.shape[-1] % BLOCK:
        return types.F16
    is_outer = name.startswith(("token_embd.", "output."))
    return types.Q8_0 if is_outer else types[kind.upper()]


def _content(tensor: _Tensor, merged: MergedModel, family: Family, config: Any) -> Any:
    """The bytes of a tensor in its type."""
    import gguf
    import numpy as np

    factors = rope_factors(config)
    if tensor.source == "" and factors is not None:
        return factors.numpy()
    weight = turned(tensor.source, merged.weights.read(tensor.source), family, config).float()
    values: Any = weight.contiguous().numpy()
    if tensor.type_.name == "F16" and float(np.abs(values).max(initial=0.0)) > LARGEST_F16:
        raise UserError(
            "export.quantization",
            tensor.source,
            found="weights beyond 65,504, the largest number of f16",
            expected="smaller ones",
            try_="--quantization bf16",
        )
    return gguf.quants.quantize(values, tensor.type_)
