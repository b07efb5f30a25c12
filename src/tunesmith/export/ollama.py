"""Folders for `ollama create`: a GGUF file, and a Modelfile whose template and stops fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.errors import ExportError, UserError
from tunesmith.export.card import license_of
from tunesmith.export.gguf_file import FILE, export_gguf
from tunesmith.export.gguf_vocabulary import starts_with_bos
from tunesmith.export.go_template import (
    REFUSALS,
    Pieces,
    UnlikeError,
    find_pieces,
    go_template,
    render_go,
)
from tunesmith.export.trained import Trained
from tunesmith.export.verify import Prompt
from tunesmith.export.written import Request, Written
from tunesmith.io.safeload import read_settings
from tunesmith.model.load import fetched, load_config
from tunesmith.types import Reporter

MAX_CONTEXT = 8192
"""Ollama keeps memory for as many tokens as `num_ctx` says, and takes 4,096 if nothing does."""

SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
}
"""transformers' generation settings -> Ollama's parameters."""


def export_ollama(trained: Trained, folder: Path, request: Request, reporter: Reporter) -> Written:
    """Writes `model.gguf` and `Modelfile`.

    Raises:
        UserError: as `export_gguf`, or the chat template has no counterpart in Go's language
            (`export.ollama-template`).
    """
    if not trained.tokenizer.chat_template:
        raise _no_template(trained, "a tokenizer without a chat template")
    try:
        pieces = find_pieces(_renderer(trained))
    except (*REFUSALS, UnlikeError) as error:
        raise _no_template(trained, f"a chat template whose prompts differ: {error}") from error
    template = go_template(_without_bos(pieces, trained))
    written = export_gguf(trained, folder, request, reporter)
    text = modelfile(trained, template)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    notes = ("the Modelfile's template has no tools",)
    if pieces.is_folded:
        notes += ("the template refuses system messages: they go into the first user message",)

    def check(prompts: Sequence[Prompt]) -> str:
        return _check(trained, template, prompts, is_folded=pieces.is_folded)

    return replace(written, notes=(*written.notes, *notes), checks=(*written.checks, check))


def modelfile(trained: Trained, template: str) -> str:
    """The text of a Modelfile."""
    lines = [f"FROM ./{FILE}", f'TEMPLATE """{template}"""']
    stops = (trained.tokenizer.decode([token]) for token in trained.stop_ids)
    lines += [f"PARAMETER stop {_quoted(text)}" for text in stops]
    config = load_config(trained.base).get_text_config()
    lines.append(f"PARAMETER num_ctx {min(config.max_position_embeddings, MAX_CONTEXT)}")
    settings = _generation(trained)
    for name, parameter in SAMPLING.items():
        value = settings.get(name)
        if isinstance(value, int | float) and settings.get("do_sample", True):
            lines.append(f"PARAMETER {parameter} {value:g}")
    if found := license_of(trained):
        lines.append(f"LICENSE {_quoted(found)}")
    return "\n".join(lines) + "\n"


def _generation(trained: Trained) -> Mapping[str, Any]:
    folder = fetched(trained.base, "model.no-config", "a model configuration")
    file = folder / "generation_config.json"
    return read_settings(file) if file.exists() else {}


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _renderer(trained: Trained) -> Any:
    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return trained.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=True,
            **trained.template_arguments,
        )

    return render


def _without_bos(pieces: Pieces, trained: Trained) -> Pieces:
    """Without the BOS token at the start, which llama.cpp puts there itself."""
    if not starts_with_bos(trained):
        return pieces
    bos = str(trained.tokenizer.bos_token)
    return replace(
        pieces,
        start=pieces.start.removeprefix(bos),
        before_system=pieces.before_system.removeprefix(bos),
    )


def _check(trained: Trained, template: str, prompts: Sequence[Prompt], *, is_folded: bool) -> str:
    """Compares the Go template's prompts with those of training; a line on it.

    Raises:
        ExportError: the first that differs (`export.prompt-differs`).
    """
    backend, num_stripped = trained.tokenizer.backend_tokenizer, 0
    bos = str(trained.tokenizer.bos_token) if starts_with_bos(trained) else ""
    compared = 0
    for prompt in prompts:
        if is_folded and any(each["role"] == "system" for each in prompt.messages):
            continue
        text = bos + render_go(template, prompt.messages)
        ids = tuple(backend.encode_batch([text], add_special_tokens=False)[0].ids)
        if ids == prompt.ids:
            compared += 1
            continue
        if any(each["content"] != each["content"].strip() for each in prompt.messages):
            num_stripped += 1  # Jinja's `trim` has no counterpart in Ollama's language
            continue
        raise ExportError(
            "export.prompt-differs",
            f"Modelfile, {prompt.where}",
            found=repr(text[:300]),
            expected="the prompt of training",
        )
    said = f"same prompts by the Modelfile's template: {compared}, token by token"
    if num_stripped:
        said += f"; {num_stripped} differ in white space at the ends of messages, which it keeps"
    return said


def _no_template(trained: Trained, found: str) -> UserError:
    return UserError(
        "export.ollama-template",
        trained.label,
        found=found,
        expected="one that writes every message between fixed texts, as ChatML does",
        try_="--to gguf: its file holds the Jinja template itself",
    )
