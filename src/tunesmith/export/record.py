"""`export.json`: what was exported, from what, and how near it is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tunesmith.export.trained import Trained
from tunesmith.export.written import Request
from tunesmith.io.manifest import file_sha256
from tunesmith.io.redact import redact_tree

RECORD = "export.json"
PACKAGES = (
    *("tunesmith", "torch", "transformers", "peft", "tokenizers", "safetensors", "gguf"),
    *("torchao", "gptqmodel", "llmcompressor", "compressed-tensors", "llama-cpp-python"),
)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that was trained on: its name, rows, hash, and what the recipe calls its source."""

    name: str
    rows: int
    sha256: str
    source: str


@dataclass(frozen=True)
class Record:
    """What there is to say of an export.

    Args:
        trained: what was exported.
        request: how.
        notes: what is worth saying.
        seen: what verification saw; empty if there was none.
        data: what was trained on.
    """

    trained: Trained
    request: Request
    notes: tuple[str, ...] = ()
    seen: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: tuple[DataFile, ...] = ()


def write_record(record: Record, folder: Path) -> None:
    """Writes `export.json` with the hash of every other file in the folder."""
    trained, request = record.trained, record.request
    files = {
        str(file.relative_to(folder)): {"sha256": file_sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != RECORD
    }
    values: dict[str, Any] = {
        "format": request.to,
        "quantization": request.quantization,
        "dtype": request.dtype,
        "from": {
            "label": trained.label,
            "base": trained.base_name,
            "revision": trained.base.revision,
            "quantized_while_training": trained.quantize,
            "files": _sources(trained),
        },
        "template_arguments": dict(trained.template_arguments),
        "data": [asdict(each) for each in record.data],
        "stop_ids": list(trained.stop_ids),
        "verified": dict(record.seen) or None,
        "notes": list(record.notes),
        "files": files,
        "versions": _versions(),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    text = json.dumps(redact_tree(values), indent=1, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def _sources(trained: Trained) -> dict[str, str]:
    """Hashes of what was trained: the adapter, or the weights of a model trained whole."""
    folder = trained.adapter or Path(trained.base.path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {file.name: file_sha256(file) for file in files}


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
