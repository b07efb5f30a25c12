"""The formats that a model is exported to."""

from __future__ import annotations

import difflib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.export.gguf_file import export_gguf, gguf_type
from tunesmith.export.merged import DTYPES, write_merged, write_tokenizer
from tunesmith.export.mindspore import export_mindspore
from tunesmith.export.ollama import export_ollama
from tunesmith.export.quantized import PACKAGES, check_package, export_quantized
from tunesmith.export.trained import Trained
from tunesmith.export.verify import logits_of
from tunesmith.export.weights import weights_of_folder
from tunesmith.export.written import (
    Exporter,
    Request,
    Written,
    folder_logits,
    folder_prompts,
    load_trained,
)
from tunesmith.io.safeload import ADAPTER_CONFIG, adapter_settings
from tunesmith.model.heads import HEAD_FILE
from tunesmith.model.load import HUB_ID
from tunesmith.types import Reporter


def export_merged(trained: Trained, folder: Path, request: Request, reporter: Reporter) -> Written:
    """A folder of plain weights."""
    notes = write_merged(
        trained, folder, dtype=request.dtype, max_bytes=request.max_bytes, reporter=reporter
    )
    facts = weights_of_folder(folder).facts.values()
    kinds = {str(each.dtype).removeprefix("torch.") for each in facts}
    tolerance = next((k for k in ("bfloat16", "float16") if k in kinds), "float32")
    return Written(
        tolerance,
        "transformers",
        folder_logits(folder, trained, request.compute),
        None if trained.tokenizer.chat_template is None else folder_prompts(folder),
        notes,
    )


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", HEAD_FILE)


def export_adapter(trained: Trained, folder: Path, request: Request, reporter: Reporter) -> Written:
    """The adapter as PEFT loads it, with its tokenizer.

    Raises:
        UserError: the model was trained whole (`export.no-adapter`).
    """
    if trained.adapter is None:
        raise UserError(
            "export.no-adapter",
            trained.label,
            found="a model whose own weights were trained",
            expected="a run with an adapter",
            try_="--to merged",
        )
    adapter_settings(trained.adapter, trained.label)
    for name in ADAPTER_FILES:
        if (trained.adapter / name).exists():
            shutil.copyfile(trained.adapter / name, folder / name)
    notes = _name_base(folder / ADAPTER_CONFIG, trained)
    write_tokenizer(trained, folder)

    def logits(samples: Any) -> Any:
        again = load_trained(replace(trained, adapter=folder), dtype=request.compute)
        return logits_of(again, samples)

    has_template = trained.tokenizer.chat_template is not None
    prompts = folder_prompts(folder) if has_template else None
    return Written("float32", "PEFT", logits, prompts, notes)


def _name_base(file: Path, trained: Trained) -> tuple[str, ...]:
    """Names the base as others know it; a note where nobody else has it."""
    values = json.loads(file.read_text(encoding="utf-8"))
    name = trained.base_name
    if HUB_ID.fullmatch(name) and "/" in name and not Path(name).exists():
        values["base_model_name_or_path"] = name
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return ()
    return (f"the base is on this machine alone: {values['base_model_name_or_path']}",)


EXPORTERS: dict[str, Exporter] = {
    "merged": export_merged,
    "adapter": export_adapter,
    "gguf": export_gguf,
    "ollama": export_ollama,
    "mindspore": export_mindspore,
    **dict.fromkeys(PACKAGES, export_quantized),
}


def check_request(request: Request) -> None:
    """Refuses formats and options that do not exist, before anything is loaded.

    Raises:
        UserError: `export.format`.
    """
    near = difflib.get_close_matches(request.to, EXPORTERS, n=1)
    if request.to not in EXPORTERS:
        raise _format_error(
            "--to", request.to, ", ".join(EXPORTERS), f"did you mean {near[0]}?" if near else None
        )
    if request.dtype not in ("auto", *DTYPES):
        raise _format_error("--dtype", request.dtype, f"auto, {', '.join(DTYPES)}")
    if request.to in PACKAGES:
        check_package(request.to)
    if request.to in ("gguf", "ollama"):
        gguf_type(request)
    elif request.quantization is not None:
        raise _format_error("--quantization", f"it with --to {request.to}", "--to gguf or ollama")


def _format_error(where: str, found: str, expected: str, try_: str | None = None) -> UserError:
    return UserError("export.format", where, found=found, expected=expected, try_=try_)
