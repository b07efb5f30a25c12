"""`tunesmith check`: what is in the data, and what is wrong with it, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from tunesmith.cli.check_view import show_cost, show_report
from tunesmith.cli.console import ConsoleReporter, quiet_libraries
from tunesmith.config.auto import auto_epochs
from tunesmith.config.load import LoadedRecipe, load_recipe, recipe_with
from tunesmith.data.check.checker import Dropped, check_sources
from tunesmith.data.check.fix import Fixed, check_target, write_fixed
from tunesmith.data.check.page import write_page
from tunesmith.data.check.report import CheckReport, Cost, counted
from tunesmith.data.sources import Sources, find_recipe_sources
from tunesmith.data.templates import build_renderer
from tunesmith.errors import DataError, RecipeError
from tunesmith.model.device import find_device
from tunesmith.model.load import find_model, load_config, load_tokenizer
from tunesmith.model.memory import Sizes, measure_config
from tunesmith.objectives import OBJECTIVES
from tunesmith.types import Json, Reporter

DEFAULT_MODEL = "builtin:smollm2-135m"


def run_check(
    data: Sequence[str],
    *,
    model: str | None,
    validation: str | None,
    as_json: bool,
    html: str | None,
    fix: str | None,
) -> None:
    """Checks files, data sets or a recipe's data and prints what a person wants to know."""
    console = Console(stderr=as_json)
    loaded = load_data(data, model, validation)
    quiet_libraries()
    reporter = ConsoleReporter(console)
    sources = find_recipe_sources(loaded.recipe, loaded.locate, reporter)
    if fix:
        check_target(Path(fix), sources.train)
    report, dropped = _report(loaded, sources, reporter, is_recipe=_is_recipe(data))
    if html:
        write_page(report, Path(html))
    fixed = write_fixed(sources.train, dropped, Path(fix)) if fix else None
    if as_json:
        typer.echo(json.dumps(_as_json(report, fixed), ensure_ascii=False, indent=1))
    else:
        show_report(console, report)
        show_cost(console, report)
        is_default = loaded.recipe.model.id == DEFAULT_MODEL and not _is_recipe(data)
        _show_next(console, report, sources, (fixed, html), is_default=is_default)
    if report.findings.num_errors and not fix:
        raise typer.Exit(2)


def _is_recipe(data: Sequence[str]) -> bool:
    return any(Path(text).suffix in (".yaml", ".yml") and "=" not in text for text in data)


def load_data(
    data: Sequence[str], model: str | None = None, validation: str | None = None
) -> LoadedRecipe:
    """A recipe file, or a recipe around the data named; `key=value` overrides either.

    For data without a recipe, keys of a source (`data.encoding`, `data.columns.prompt`) hold for
    all data that is named, validation included.

    Raises:
        RecipeError: nothing to check is named.
    """
    overrides = [text for text in data if "=" in text and not Path(text).exists()]
    paths = [text for text in data if text not in overrides]
    if model:
        overrides.append(f"model={model}")
    if not paths:
        raise RecipeError(
            "recipe.override", "command line", found="no data", expected="files, or a recipe"
        )
    if len(paths) == 1 and Path(paths[0]).suffix in (".yaml", ".yml"):
        held_out = [f"data.validation={validation}"] if validation else []
        return load_recipe(paths[0], overrides + held_out)
    loaded = [recipe_with(_recipe_around(path), overrides) for path in paths]
    update: dict[str, object] = {"train": [each.recipe.data.train[0] for each in loaded]}
    if validation:
        held_out = recipe_with(_recipe_around(validation), overrides)
        update["validation"] = held_out.recipe.data.train
    first = loaded[0]
    recipe = first.recipe.model_copy(update={"data": first.recipe.data.model_copy(update=update)})
    return LoadedRecipe(recipe, first.name, first.folder)


def _recipe_around(path: str) -> dict[str, Json]:
    return {"model": DEFAULT_MODEL, "data": {"path": path}}


def _report(
    loaded: LoadedRecipe, sources: Sources, reporter: Reporter, *, is_recipe: bool
) -> tuple[CheckReport, Dropped]:
    recipe = loaded.recipe
    source = find_model(recipe.model, reporter, loaded.folder)
    renderer, template = build_renderer(load_tokenizer(source), recipe.data, loaded.folder)
    sizes = measure_config(load_config(source), recipe.method)
    wanted = recipe.data.max_length
    try:
        report, dropped = check_sources(
            sources,
            renderer,
            reporter,
            max_length=sizes.context_tokens if isinstance(wanted, str) else wanted,
            overlong=recipe.data.overlong,
            is_auto=isinstance(wanted, str),
            # Without a recipe nobody has said what is to be learned.
            kinds=OBJECTIVES[recipe.objective.name].kinds if is_recipe else (),
        )
    except DataError as error:
        raise _with_hint(error, is_recipe=is_recipe) from error
    report.template, report.tokenizer = template, source.label
    report.cost = _cost(report, loaded, sizes)
    return report, dropped


def _with_hint(error: DataError, *, is_recipe: bool) -> DataError:
    """Says how to name an encoding where there is no recipe to write it into."""
    if error.code != "data.encoding" or is_recipe or "gb18030" not in error.expected:
        return error
    hint = "the same command with data.encoding=gb18030 behind the file"
    return DataError(error.problems, num_problems=error.num_problems, try_=hint)


def _cost(report: CheckReport, loaded: LoadedRecipe, sizes: Sizes) -> Cost | None:
    """What a training on this data would take, roughly: sources' weights are not looked at."""
    if not report.training_tokens:
        return None
    asked = loaded.recipe.train.epochs
    epochs = auto_epochs(report.training_samples)[0] if isinstance(asked, str) else asked
    tokens = epochs * report.training_tokens
    device = find_device()
    # 2 for the forward, 2 for the gradient of activations, 2 more for that of trained weights.
    work = (4 * sizes.num_parameters + 2 * sizes.num_trained) * tokens
    return Cost(epochs, tokens, work / device.measure_flops(), device.kind)


def _as_json(report: CheckReport, fixed: Fixed | None) -> dict[str, Json]:
    values = report.as_json()
    if fixed is not None:
        values["fixed"] = {
            "kept": fixed.kept,
            "dropped": fixed.dropped,
            "path": str(fixed.path),
            "list": str(fixed.list_path),
        }
    return values


def _show_next(
    console: Console,
    report: CheckReport,
    sources: Sources,
    outputs: tuple[Fixed | None, str | None],
    *,
    is_default: bool,
) -> None:
    """What was written, and what to do next."""
    fixed, html = outputs
    if is_default:
        console.print(
            "tokens and time are those of the small built-in model: name yours with --model",
            highlight=False,
        )
    if html:
        console.print(f"page: {html}", highlight=False, soft_wrap=True)
    if fixed:
        kept, lost = counted(fixed.kept, "row"), counted(fixed.dropped, "row")
        console.print(f"{kept} kept: {fixed.path}", highlight=False, soft_wrap=True)
        console.print(f"{lost} left out, with reasons: {fixed.list_path}", highlight=False)
    elif CLEANED & report.findings.counts.keys() or report.findings.num_errors:
        suffix = sources.train[0].files[0].suffix.lower() if sources.train else ""
        name = f"clean{suffix if suffix in ('.csv', '.xlsx') else '.jsonl'}"
        console.print(
            f"try: --fix {name} writes a copy without unusable and duplicate rows, and a list of "
            "what was left out",
            highlight=False,
        )


CLEANED = {"data.duplicate", "data.leak", "data.nothing-to-learn"}
"""Findings whose rows --fix leaves out."""
