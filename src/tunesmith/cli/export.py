"""`tunesmith export`."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tunesmith.cli.console import ConsoleReporter, quiet_libraries
from tunesmith.cli.export_samples import (
    data_facts,
    first_rows,
    prompts_of,
    run_renderer,
    samples_of,
)
from tunesmith.config.recipe import ModelConfig, Recipe
from tunesmith.data.templates import Renderer
from tunesmith.errors import UserError
from tunesmith.export.card import write_card
from tunesmith.export.formats import EXPORTERS, check_request
from tunesmith.export.push import Destination, parse_destination, push_folder
from tunesmith.export.record import RECORD, Record, write_record
from tunesmith.export.trained import Trained
from tunesmith.export.verify import (
    LOSSY,
    TOLERANCES,
    Prompt,
    check_kept,
    check_logits,
    check_prompts,
    compare,
    logits_of,
)
from tunesmith.export.weights import FileWeights
from tunesmith.export.written import Request, Written, load_trained, precise_dtype, without_adapter
from tunesmith.infer.chat_model import find_result
from tunesmith.io.atomic import atomic_directory, format_bytes
from tunesmith.io.safeload import read_settings, weight_files
from tunesmith.model.heads import head_of, head_of_adapter
from tunesmith.model.load import (
    ModelSource,
    check_weights_exist,
    fetched,
    find_model,
    load_config,
    load_tokenizer,
)
from tunesmith.model.load_adapter import base_of, find_adapter
from tunesmith.types import Reporter


@dataclass(frozen=True)
class ExportOptions:
    """The options of the command; see `cli.ship.export`."""

    to: str
    out: str
    quantization: str | None = None
    dtype: str = "auto"
    shard_size: str = "5GB"
    push: str | None = None
    is_private: bool = False
    is_verified: bool = True
    is_overwritten: bool = False


def run_export(target: str, options: ExportOptions) -> None:
    """Writes a model in another format, compares it with the run, and says what it saw."""
    quiet_libraries()
    console = Console()
    reporter = ConsoleReporter(console)
    request, destination = _request(options)
    out = _free_place(options)
    path, recipe = find_result(target)
    trained, renderer = open_trained(target, path, recipe, reporter)
    rows = first_rows(recipe, Path(target), reporter)
    data = data_facts(recipe, Path(target), reporter)
    prompts = prompts_of(rows, renderer) if trained.head is None else ()
    request = replace(
        request, samples=samples_of(rows, renderer), compute=precise_dtype(_base_weights(trained))
    )
    started = time.perf_counter()
    with atomic_directory(out) as folder:
        written = EXPORTERS[options.to](trained, folder, request, reporter)
        for note in written.notes:
            reporter.note(note)
        seen: dict[str, Any] = {}
        if options.is_verified:
            seen = _Verification(trained, written, request, reporter, str(out)).run(prompts)
        record = Record(trained, request, written.notes, seen, data)
        write_card(trained, recipe, folder, record)
        write_record(record, folder)
    _say(console, out, seen, time.perf_counter() - started)
    if destination is not None:
        address = push_folder(out, destination, reporter)
        console.print(f"pushed: {address}", highlight=False, soft_wrap=True)


def _request(options: ExportOptions) -> tuple[Request, Destination | None]:
    """What is asked for; all of it is checked before anything is loaded.

    Raises:
        UserError: `export.format`, `export.destination`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", options.shard_size.strip().lower())
    size = 0
    if match:
        unit = 1024 if match[3] else 1000
        size = int(float(match[1]) * unit ** (" kmgt".index(match[2]) if match[2] else 0))
    if size <= 0:
        raise UserError(
            "export.format", "--shard-size", found=options.shard_size, expected="such as 5GB"
        )
    request = Request(options.to, options.dtype, size, options.quantization)
    check_request(request)
    private = options.is_private
    push = parse_destination(options.push, is_private=private) if options.push else None
    return request, push


def _free_place(options: ExportOptions) -> Path:
    """The folder to make.

    Raises:
        UserError: it is there already, or is what would be exported (`export.exists`).
    """
    out = Path(options.out).expanduser().resolve()
    if out.is_dir() and not any(out.iterdir()):
        return out
    if out.exists() and not (options.is_overwritten and _is_export(out)):
        what = "a folder that holds something" if out.is_dir() else "a file"
        raise UserError(
            "export.exists",
            str(out),
            found=what,
            expected="a folder that is made, or an earlier export",
            try_="choose another one" + (", or --overwrite replaces it" if _is_export(out) else ""),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _is_export(folder: Path) -> bool:
    """Whether an earlier export made the folder: nothing else is ever replaced."""
    return (folder / RECORD).is_file()


def open_trained(
    target: str, path: Path, recipe: Recipe | None, reporter: Reporter
) -> tuple[Trained, Renderer]:
    """What is exported, with no weight read yet, and what renders its conversations.

    Raises:
        ModelError: there is nothing to load (`model.*`).
    """
    source = ModelSource(target, str(path))
    adapter: Path | None = path
    if not (path / "adapter_config.json").exists():
        source = find_model(ModelConfig(id=str(path) if path.exists() else target), reporter)
        adapter = find_adapter(source)
    base, name = source, recipe.model.id if recipe else target
    if adapter is not None:
        named = base_of(adapter, target)
        base = find_model(named, reporter)
        # What a run calls its base is a better name than a folder of our cache.
        is_own = recipe is None or recipe.model.adapter is not None
        name = named.id if is_own else name
    check_weights_exist(base)
    has_own = adapter is not None and (adapter / "tokenizer.json").exists()
    tokenizer = load_tokenizer(ModelSource(target, str(adapter)) if has_own else base)
    renderer = run_renderer(tokenizer, recipe)
    head = head_of_adapter(adapter, target) if adapter else head_of(load_config(base))
    trained = Trained(
        label=target,
        base=replace(base, label=name),
        adapter=adapter,
        tokenizer=tokenizer,
        head=head,
        stop_ids=_stop_ids(base, tokenizer, renderer),
        template_arguments=dict(renderer.options.arguments),
        quantize=recipe.model.quantize if recipe and adapter else "none",
        run=Path(target) if recipe else None,
        base_name=name,
    )
    return trained, renderer


def _stop_ids(base: ModelSource, tokenizer: Any, renderer: Renderer) -> tuple[int, ...]:
    """The tokenizer's end, then what else ends an answer in training or for the base."""
    file = fetched(base, "model.no-config", "a model configuration") / "generation_config.json"
    own: Any = read_settings(file).get("eos_token_id") if file.exists() else None
    marks = tokenizer.convert_tokens_to_ids(list(renderer.traits.end_marks))
    ids = [*(own if isinstance(own, list) else [own]), *marks]
    others = {int(each) for each in ids if each is not None} - {int(tokenizer.eos_token_id)}
    return (int(tokenizer.eos_token_id), *sorted(others))


def _base_weights(trained: Trained) -> FileWeights:
    folder = fetched(trained.base, "model.unreadable", "a language model", with_weights=True)
    return FileWeights(weight_files(folder, trained.label))


@dataclass(frozen=True)
class _Verification:
    """Compares an export with what was trained."""

    trained: Trained
    written: Written
    request: Request
    reporter: Reporter
    where: str

    def run(self, prompts: tuple[Prompt, ...]) -> dict[str, Any]:
        """What it saw, for people and for export.json.

        Raises:
            ExportError: they differ (`export.differs`, `export.prompt-differs`).
        """
        seen: dict[str, Any] = {"loader": self.written.loader, "says": []}
        if self.written.prompt_ids is not None and prompts:
            given = [self.written.prompt_ids(prompt.messages) for prompt in prompts]
            check_prompts(prompts, given, self.where)
            seen["prompts"] = len(prompts)
        if self.written.logits is not None:
            with self.reporter.waiting(f"Comparing it with {self.trained.label}"):
                exported = self.written.logits(self.request.samples)
                seen["logits"] = self._compare(exported, "none", seen["says"])
                if self.trained.quantize != "none":
                    kind = self.trained.quantize
                    seen["quantized_run"] = self._compare(exported, kind, seen["says"])
        for check in self.written.checks:
            seen["says"].append(check(prompts))
        return seen

    def _compare(
        self, exported: Sequence[torch.Tensor], quantize: str, says: list[str]
    ) -> dict[str, Any]:
        """Compares with the base as it is in its files, or quantized as it was in training."""
        is_plain = quantize == "none"
        dtype = self.request.compute if is_plain else "auto"
        model = load_trained(self.trained, quantize=quantize, dtype=dtype)
        trained = logits_of(model, self.request.samples)
        figures = compare(trained, exported)
        tolerance = TOLERANCES[self.written.tolerance if is_plain else "quantized base"]
        check_logits(figures, tolerance, self.request.samples, self.trained.tokenizer, self.where)
        what = "what was trained" if is_plain else f"the {quantize} base of training"
        word = "near" if self.written.tolerance in LOSSY or not is_plain else "same as"
        says.append(f"{word} {what}, read by {self.written.loader}: {figures}")
        if is_plain and self.trained.adapter is not None and self.written.tolerance in LOSSY:
            base = logits_of(without_adapter(model), self.request.samples)
            says.append(check_kept(figures, compare(trained, base), self.where))
        return {**figures.as_json(), "samples": len(self.request.samples)}


def _say(console: Console, out: Path, seen: Mapping[str, Any], seconds: float) -> None:
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    for line in seen.get("says", ()):
        console.print(line, highlight=False)
    if "prompts" in seen:
        console.print(f"same prompts: {seen['prompts']}, token by token", highlight=False)
    if not seen:
        console.print("not compared with the run (--no-verify)", highlight=False)
    console.print(f"{out}: {format_bytes(size)}, {seconds:.0f} s", highlight=False, soft_wrap=True)
