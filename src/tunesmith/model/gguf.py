"""GGUF files as training models: dequantized once into a cached safetensors folder."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.io.atomic import atomic_directory
from tunesmith.io.cache import cache_folder
from tunesmith.io.headers import check_gguf
from tunesmith.io.manifest import find_damage, write_manifest
from tunesmith.types import Reporter

CONVERTER_VERSION = 1

CONVERSION_ERRORS = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError),
    OverflowError,
)
"""What transformers raises for GGUF files whose parts do not fit together."""


def convert_gguf(file: Path, reporter: Reporter) -> Path:
    """The folder with a GGUF file's weights in float32, made on first use (about 20 s for 135M).

    Raises:
        ModelError: the file is no GGUF file, or not as its header says (`model.bad-gguf`).
    """
    folder = cache_folder("models") / f"{file.stem}-{_fingerprint(file)}"
    if find_damage(folder) is None:
        return folder
    check_gguf(file)
    reporter.note(f"Converting {file.name} to safetensors (once; kept in {folder.parent})")
    with atomic_directory(folder) as temporary:
        try:
            _convert(file, temporary)
        except CONVERSION_ERRORS as error:
            raise ModelError(
                "model.bad-gguf",
                str(file),
                found=(str(error).strip() or type(error).__name__).splitlines()[0],
                expected="a GGUF file of an architecture that transformers reads",
            ) from error
        write_manifest(temporary)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    # Alone in a folder: what lies beside the file, such as an adapter, is not the model's.
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as view:
        (Path(view) / file.name).symlink_to(file.resolve())
        tokenizer = AutoTokenizer.from_pretrained(view, **place)
        model: Any = AutoModelForCausalLM.from_pretrained(
            view,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            **place,
        )
    if hasattr(model.config, "quantization_config"):
        # The weights are plain now; left in, it would make the folder load as GGUF.
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fingerprint(file: Path) -> str:
    """Hash of size, head and tail: a full hash of a 40 GB file would take a minute each start."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{CONVERTER_VERSION}:{size}:".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()[:16]
