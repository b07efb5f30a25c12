"""Public benchmarks, and own tasks in their form, by EleutherAI's lm-eval on the loaded model.

Figures are lm-eval's own to the last digit: the same tasks, prompts and arithmetic. Its version and
the task's stand in every signature, for both change figures.

Not covered: lm-eval seeds the global generators of Python, numpy and torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from tunesmith.errors import EvaluationError, UserError
from tunesmith.evaluate.intervals import Z_95, wilson
from tunesmith.evaluate.metrics.base import missing_library
from tunesmith.evaluate.scores import Better, Score
from tunesmith.infer.chat_model import ChatModel
from tunesmith.types import Reporter

CPU_BATCH = 8
"""lm-eval finds its largest batch by trying 64 of the longest texts: minutes on a CPU."""

MOST_NAMES = 5

Results = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """How tasks are run.

    Args:
        num_fewshot: examples in the prompt; None leaves it to the task.
        limit: rows of each task; None takes all.
        batch_size: rows at once; None lets lm-eval find it on a GPU and takes 8 on a CPU.
        has_chat_template: whether prompts are put into the model's chat template.
        allows_code: whether tasks may run what the model wrote, such as HumanEval.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    has_chat_template: bool = False
    allows_code: bool = False


def run_benchmarks(
    chat: ChatModel,
    tasks: Sequence[str],
    folder: str | None,
    reporter: Reporter,
    options: BenchmarkOptions | None = None,
) -> list[Score]:
    """Scores of tasks with 95 % intervals: Wilson's where rows are right or wrong.

    Others have lm-eval's standard error. Scores with rows are means of these, so
    `intervals.measured` makes them comparable in pairs.

    Args:
        chat: the model.
        tasks: names of tasks, groups or tags, or patterns of them.
        folder: of own tasks, as YAML files; looked through first.
        reporter: says what goes on; bars are lm-eval's.
        options: how.

    Raises:
        UserError: lm-eval is not there (`evaluate.library`), a task is unknown
            (`evaluate.unknown-task`) or runs code (`evaluate.code-not-allowed`).
        EvaluationError: a task's data cannot be had (`evaluate.task-data`).
    """
    options = options or BenchmarkOptions()
    if find_spec("lm_eval") is None:
        raise missing_library("benchmarks", "lm-eval", "benchmarks")
    manager = _manager(tasks, folder, reporter)
    names = [name for task in tasks for name in manager.match_tasks([task])]
    reporter.note(f"Benchmarks: {', '.join(names)} (lm-eval {version('lm_eval')})")
    results = _evaluate(chat, names, manager, options)
    return [
        score
        for name in _reported(names, results)
        for score in _scores(name, results, has_chat_template=options.has_chat_template)
    ]


def _manager(tasks: Sequence[str], folder: str | None, reporter: Reporter) -> Any:
    """The tasks that there are; lm-eval's own 14,000, which take 16 s to list, only if needed.

    Raises:
        UserError: one of those asked for is not there (`evaluate.unknown-task`).
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return manager
    with reporter.waiting("Listing lm-eval's tasks"):
        manager = TaskManager(include_path=folder)
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=MOST_NAMES)
            raise UserError(
                "evaluate.unknown-task",
                "benchmarks",
                found=repr(task),
                expected="a task of lm-eval" + (f" or in {folder}" if folder else ""),
                try_=f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks`",
            )
    return manager


def _evaluate(
    chat: ChatModel, names: Sequence[str], manager: Any, options: BenchmarkOptions
) -> Results:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # lm-eval's decorators hide the types of both.
    evaluator: Any = import_module("lm_eval.evaluator")
    models: Any = import_module("lm_eval.models.huggingface")
    is_cuda = chat.model.device.type == "cuda"
    batch_size = options.batch_size or ("auto" if is_cuda else CPU_BATCH)
    model = models.HFLM(
        pretrained=chat.model,
        tokenizer=chat.tokenizer,
        batch_size=batch_size,
        chat_template_args=dict(chat.template_arguments),
    )
    try:
        found = evaluator.simple_evaluate(
            model,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.has_chat_template,
            confirm_run_unsafe_code=options.allows_code,
            log_samples=True,
        )
    except (DatasetsError, HfHubHTTPError, OSError) as error:
        raise EvaluationError(
            "evaluate.task-data",
            f"benchmark {', '.join(names)}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            expected="the task's data set, cached or to be downloaded",
            try_="run it once where there is a network, or name a folder of own tasks by --tasks",
        ) from error
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise UserError(
            "evaluate.code-not-allowed",
            f"benchmark {', '.join(names)}",
            found="a task that runs what the model wrote",
            expected="leave to run it",
            try_="in a container or a machine that may be lost: --allow-code",
        ) from error
    return found or {}


def _reported(names: Sequence[str], results: Results) -> list[str]:
    """The names with results: of a group that has none of its own, its tasks'."""
    found: list[str] = []
    for name in names:
        of_group = results.get("group_subtasks", {}).get(name, [])
        has_own = any(
            _is_figure(key, value) for key, value in results["results"].get(name, {}).items()
        )
        found += [name] if has_own else list(of_group)
    return list(dict.fromkeys(found))


def _scores(name: str, results: Results, *, has_chat_template: bool) -> list[Score]:
    figures: Mapping[str, Any] = results["results"].get(name, {})
    scores: list[Score] = []
    for key, value in figures.items():
        if not _is_figure(key, value):
            continue
        metric, _, filter_name = key.partition(",")
        rows = _rows(results, name, metric, filter_name, float(value))
        low, high = _interval(float(value), figures.get(f"{metric}_stderr,{filter_name}"), rows)
        is_higher = results.get("higher_is_better", {}).get(name, {}).get(metric)
        better: Better = "neither" if is_higher is None else "higher" if is_higher else "lower"
        shown = metric if filter_name == "none" else f"{metric},{filter_name}"
        signature = (
            f"{name}/{shown}|task:{results['versions'].get(name)}|"
            f"shots:{results['n-shot'].get(name)}|chat:{'yes' if has_chat_template else 'no'}|"
            f"lm-eval:{version('lm_eval')}"
        )
        num_rows = len(rows) or _num_rows(results, name)
        scores.append(
            Score(f"{name}/{shown}", float(value), signature, better, num_rows, low, high, rows)
        )
    return scores


def _is_figure(key: str, value: object) -> bool:
    """Results hold names and standard errors, too; these may be "N/A"."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and "," in key and "_stderr," not in key


def _rows(
    results: Results, name: str, metric: str, filter_name: str, value: float
) -> tuple[float | None, ...]:
    """The metric of each row, in the order of the data; none unless it is their mean."""
    samples = [
        each
        for each in results.get("samples", {}).get(name, [])
        if each.get("filter", "none") == filter_name and metric in each
    ]
    samples.sort(key=lambda each: each["doc_id"])
    rows = [each[metric] for each in samples]
    if not rows or not all(isinstance(row, (int, float)) for row in rows):
        return ()
    numbers = tuple(float(row) for row in rows)
    return numbers if math.isclose(math.fsum(numbers) / len(numbers), value) else ()


def _interval(
    value: float, error: object, rows: Sequence[float | None]
) -> tuple[float | None, float | None]:
    if len(rows) > 1 and set(rows) <= {0.0, 1.0}:
        return wilson(value * len(rows), len(rows))
    if not isinstance(error, (int, float)) or not math.isfinite(error):
        return None, None
    return value - Z_95 * error, value + Z_95 * error


def _num_rows(results: Results, name: str) -> int:
    own = results.get("n-samples", {}).get(name)
    if own:
        return int(own["effective"])
    of_group = results.get("group_subtasks", {}).get(name, [])
    return sum(_num_rows(results, each) for each in of_group)
