"""`tunesmith evaluate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console

from tunesmith.cli.console import quiet_libraries
from tunesmith.cli.evaluate_view import show_evaluation
from tunesmith.cli.evaluating import (
    EvaluateOptions,
    Found,
    base_of_run,
    check_judge,
    find_rows,
    general_scores,
    measure_model,
    recipe_of,
)
from tunesmith.cli.predict import AnswerReporter
from tunesmith.engine.signals import StopSignal
from tunesmith.errors import EvaluationError
from tunesmith.evaluate.effect import Effect, find_effect
from tunesmith.evaluate.evaluation import (
    Evaluation,
    Role,
    Side,
    build_evaluation,
    write_evaluation,
)
from tunesmith.evaluate.intervals import compare, measured
from tunesmith.evaluate.judge import prefer, rate
from tunesmith.evaluate.label_loss import label_figures
from tunesmith.evaluate.metrics import MeasureOptions, measure_rows
from tunesmith.evaluate.metrics.auto import fitting_metrics
from tunesmith.evaluate.metrics.measure import check_metrics, common_rows
from tunesmith.evaluate.prediction import Prediction, read_predictions
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.scores import Comparison, Score
from tunesmith.evaluate.verdicts import Judge
from tunesmith.infer.endpoint import Endpoint, api_key
from tunesmith.model.device import find_device, prepare_machine
from tunesmith.types import Reporter

__all__ = ["EvaluateOptions", "run_evaluate"]


def run_evaluate(target: str, data: Sequence[str], options: EvaluateOptions) -> None:
    """Measures a model, or two side by side, and says what is better."""
    check_judge(options)
    check_metrics(options.metrics if options.metrics == "auto" else _names(options))
    quiet_libraries()
    prepare_machine(find_device())
    console = Console(stderr=options.is_json)
    reporter = AnswerReporter(Console(stderr=True))
    folder = _folder(target, data, options)
    with StopSignal(str(folder)):
        if Path(target).suffix == ".jsonl":
            found = _read_files(target, options)
            notes = [f"of the file of predictions {target}"]
        else:
            found, notes = _measure(target, data, options, folder, reporter)
        evaluation = _evaluation(found, folder, options, notes, reporter)
    write_evaluation(evaluation, folder)
    if options.is_json:
        # As written: without secrets, and without NaN, which is no JSON.
        typer.echo((folder / "evaluation.json").read_text(encoding="utf-8").rstrip())
    show_evaluation(console, evaluation)
    console.print(f"rows: {folder / 'rows.jsonl'}", highlight=False, soft_wrap=True)
    if recipe_of(target) is not None and options.out is None:
        page = write_report(Path(target).expanduser())
        console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _names(options: EvaluateOptions) -> list[str]:
    """The metrics that are named; `auto` is no name."""
    return [name.strip() for name in options.metrics.split(",") if name.strip()]


def _folder(target: str, data: Sequence[str], options: EvaluateOptions) -> Path:
    """Where the results go: into the run, or beside where the command is given."""
    if options.out is not None:
        return Path(options.out)
    files = [text for text in data if "=" not in text or Path(text).exists()]
    name = Path(files[0]).stem if files else "validation"
    if not data and options.benchmarks:
        name = "benchmarks"
    name += f"-{options.rows}" if options.rows else ""
    if options.against != "base":
        name += "-alone" if options.against == "none" else f"-against-{Path(options.against).stem}"
    path = Path(target).expanduser()
    if recipe_of(target) is not None:
        return path / "evaluation" / name
    return Path("evaluation") / f"{path.stem}-{name}"


def _measure(
    target: str, data: Sequence[str], options: EvaluateOptions, folder: Path, reporter: Reporter
) -> tuple[list[Found], list[str]]:
    """What is found of what the target is compared with, if of anything, and of the target."""
    notes: list[str] = []
    targets = [target]
    if options.against != "none":
        base = options.against
        targets.insert(0, base_of_run(target, recipe_of(target)) if base == "base" else base)
    rows = None if options.benchmarks and not data else find_rows(target, data, reporter)
    found: list[Found] = []
    for name in targets:
        role = "before" if len(targets) == 2 and not found else "after"
        reporter.note(f"{role}: {name}" if len(targets) == 2 else name)
        file = folder / f"{role}.jsonl"
        before = found[0] if found else None
        found.append(measure_model(name, rows, options, file, reporter, before))
    if len(found) == 2 and found[0].vocabulary != found[1].vocabulary:
        notes.append("the models have other tokenizers: their losses do not compare")
    if rows is not None:
        notes += [*rows.notes, *_said_of_answers(found, options)]
    return found, notes


FEW_ROWS = 20


def _said_of_answers(found: Sequence[Found], options: EvaluateOptions) -> list[str]:
    """What makes figures of answers less than they seem."""
    notes = [f"answers have at most {options.max_new_tokens:,} tokens"]
    for each in found:
        num_cut = sum(row.finish_reason == "length" for row in each.predictions)
        if num_cut:
            notes.append(
                f"{each.target}: {num_cut:,} of {len(each.predictions):,} answers were cut there, "
                "which their metrics suffer from; a larger --max-new-tokens lets them end"
            )
    if len(found[-1].predictions) < FEW_ROWS:
        notes.append(f"fewer than {FEW_ROWS} rows: intervals are too narrow, verdicts too sure")
    return notes


def _read_files(target: str, options: EvaluateOptions) -> list[Found]:
    """Files that `tunesmith predict` wrote, instead of models."""
    files = [target]
    if options.against not in ("base", "none"):
        files.insert(0, options.against)
    found = [Found(file, read_predictions(Path(file))) for file in files]
    for each in found:
        if not each.predictions:
            raise EvaluationError(
                "evaluate.no-rows",
                each.target,
                found="no predictions",
                expected="at least one",
                try_="run `tunesmith predict` again",
            )
    return found


def _evaluation(
    found: Sequence[Found],
    folder: Path,
    options: EvaluateOptions,
    notes: Sequence[str],
    reporter: Reporter,
) -> Evaluation:
    """Metrics, the effect of training, the judge's word; all in one."""
    answers = [each.predictions for each in found]
    if len(found) == 2 and all(answers):
        answers = list(common_rows(*answers))
    sides = _sides(found, answers, options, reporter)
    comparisons = _compare_benchmarks(found)
    if options.judge is not None and answers[-1]:
        said, comparison = _judged(answers, folder, options, reporter)
        sides[-1] = replace(sides[-1], others=[*sides[-1].others, *said])
        comparisons += [comparison] if comparison else []
    command = " ".join(["tunesmith", *map(shlex.quote, sys.argv[1:])])
    effect = _effect(found, options)
    how = {"effect": effect, "notes": notes, "command": command}
    return build_evaluation(folder.name, sides, comparisons=comparisons, **how)  # pyright: ignore[reportArgumentType]


def _sides(
    found: Sequence[Found],
    answers: Sequence[Sequence[Prediction]],
    options: EvaluateOptions,
    reporter: Reporter,
) -> list[Side]:
    """Each model's figures, by the metrics that fit the first one's rows."""
    how = MeasureOptions(allows_code=options.allows_code, reporter=reporter)
    names: Sequence[str] = _names(options)
    if options.metrics == "auto":
        names = fitting_metrics(answers[0], how) if answers[0] else ()
    roles: list[Role] = ["before", "after"] if len(found) == 2 else ["after"]
    sides: list[Side] = []
    for role, each, rows in zip(roles, found, answers, strict=True):
        ids = [row.id for row in rows]
        of_labels = {
            row.id: each.labels[row.id]
            for row in rows
            if row.label is not None and row.id in each.labels
        }
        figures = label_figures(ids, of_labels)
        if any(one.vocabulary != each.vocabulary for one in found):
            # Of other tokens: shown, and not compared.
            figures = [replace(figure, better="neither") for figure in figures]
        if rows:
            figures += measure_rows(rows, names, how)
        losses = {name: -float(one.logp_L.double().mean()) for name, one in of_labels.items()}
        others = [*general_scores(each), *each.benchmarks]
        sides.append(Side(role, each.target, rows, figures, others, losses))
    return sides


def _effect(found: Sequence[Found], options: EvaluateOptions) -> Effect | None:
    """The effect of training, where one of the models is what the other began as."""
    if len(found) != 2 or not found[1].predictions or options.against != "base":
        return None
    return find_effect(found[0].predictions, found[1].predictions, found[1].labels, found[1].target)


def _compare_benchmarks(found: Sequence[Found]) -> list[Comparison]:
    """Benchmarks of both models, row by row."""
    if len(found) != 2:
        return []
    later = {score.name: score for score in found[1].benchmarks if score.rows}
    return [
        compare(measured(score), measured(later[score.name]))
        for score in found[0].benchmarks
        if score.rows and score.name in later
    ]


def _judged(
    answers: Sequence[Sequence[Prediction]],
    folder: Path,
    options: EvaluateOptions,
    reporter: Reporter,
) -> tuple[Sequence[Score], Comparison | None]:
    """What a model that judges says, of two side by side or of one alone."""
    url, name = options.judge or "", options.judge_model or ""
    endpoint = Endpoint(url, name, api_key(url))
    judge = Judge(endpoint.chat, name, folder / "verdicts.jsonl")
    if len(answers) == 2:
        judged = prefer(judge, answers[0], answers[1], reporter)
    else:
        judged = rate(judge, answers[0], reporter)
    reporter.note(str(judge.cost))
    return judged.scores, judged.comparison
