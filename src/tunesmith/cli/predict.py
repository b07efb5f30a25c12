"""`tunesmith predict`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tunesmith.cli.answering import Opened, open_server, open_target
from tunesmith.cli.check import load_data
from tunesmith.cli.console import (
    SECONDS_BETWEEN_LINES,
    ConsoleReporter,
    format_seconds,
    quiet_libraries,
)
from tunesmith.data.sources import Source, find_sources
from tunesmith.engine.signals import StopSignal
from tunesmith.errors import RunError
from tunesmith.evaluate.predict import Predicted, predict_file
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.prediction_table import TABLES, write_table
from tunesmith.infer.answerer import checkpoint_steps, run_recipe
from tunesmith.infer.answers import Answering
from tunesmith.model.device import find_device, prepare_machine

T = TypeVar("T")

SHOWN_ROWS = 3
SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class PredictOptions:
    """What the command line asks for; see `cli.prove.predict`."""

    out: str
    checkpoints: tuple[str, ...] = ()
    engine: str = "transformers"
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    system: str | None = None
    has_logprobs: bool = False
    rows: int | None = None
    is_restarted: bool = False

    @property
    def answering(self) -> Answering:
        """How rows are answered."""
        return Answering(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(text for text in self.stop if text),
            has_logprobs=self.has_logprobs,
        )


def run_predict(target: str, data: Sequence[str], options: PredictOptions) -> None:
    """Answers the rows of data by each model that is asked for, one file for each."""
    out = Path(options.out)
    _check_form(out)
    quiet_libraries()
    prepare_machine(find_device())
    console = Console()
    reporter = AnswerReporter(Console(stderr=True))
    steps = chosen_steps(target, options.checkpoints) if options.checkpoints else [None]
    with StopSignal(str(out)):
        for step in steps:
            _predict(target, step, data, options, (console, reporter))


def _predict(
    target: str,
    step: int | None,
    data: Sequence[str],
    options: PredictOptions,
    screen: tuple[Console, AnswerReporter],
) -> None:
    """Answers by one model."""
    console, reporter = screen
    loaded = load_data(data)
    sources = find_sources(loaded.recipe.data, loaded.locate, reporter).train
    if options.engine.startswith(("http://", "https://")):
        opened = open_server(
            options.engine,
            target,
            sources,
            loaded,
            reporter,
            system=options.system,
            rows=options.rows,
        )
    else:
        opened = open_target(
            target,
            sources,
            loaded,
            reporter,
            step=step,
            engine=options.engine,
            system=options.system,
            rows=options.rows,
        )
    out = Path(options.out)
    path = out if step is None else out.with_name(f"{out.stem}.step-{step}{out.suffix}")
    lines = path if path.suffix not in TABLES else path.with_suffix(".jsonl")
    _check_apart((path, lines), sources)
    _show_start(console, opened, options)
    predicted = predict_file(
        lines,
        opened.questions,
        lambda: opened.open_engine(options.answering),
        options.answering,
        settings=opened.settings,
        reporter=reporter,
        restart=options.is_restarted,
    )
    if path != lines:
        write_table(path, predicted.predictions)
    _show_end(console, predicted, path)


def _check_apart(written: Sequence[Path], sources: Sequence[Source]) -> None:
    """Refuses to write over the data."""
    read = {file.resolve() for source in sources for file in source.files}
    for path in written:
        if path.resolve() in read:
            raise RunError(
                "run.predictions-format",
                f"--out {path}",
                found="the file that is asked",
                expected="a file of its own for the predictions",
            )


def _check_form(out: Path) -> None:
    if out.suffix not in (".jsonl", *TABLES):
        raise RunError(
            "run.predictions-format",
            f"--out {out}",
            found=f"the ending {out.suffix or '(none)'}",
            expected=f".jsonl, or {' or '.join(TABLES)} besides it",
            try_=f"--out {out.with_suffix('.jsonl')}",
        )


def chosen_steps(target: str, wanted: Sequence[str]) -> list[int | None]:
    """The checkpoints that are asked for, each once; None is the run's result.

    Raises:
        RunError: it is no run (`run.none`), or has no such checkpoint (`run.no-checkpoint`).
    """
    run = Path(target).expanduser()
    run_recipe(run)
    known = checkpoint_steps(run)
    steps: list[int | None] = []
    for name in wanted:
        if name == "all":
            steps += known
        elif name == "best":
            steps.append(_best_step(run, list(known)))
        elif name.isdecimal():
            steps.append(int(name))
        else:
            raise RunError(
                "run.no-checkpoint",
                f"--checkpoint {name}",
                found="neither a step nor a word that is known",
                expected="a step, best, or all",
            )
    return list(dict.fromkeys(steps))


def _best_step(run: Path, known: Sequence[int]) -> int:
    """The step of the best validation, by the word of the last checkpoint or the summary."""
    files = [run / "summary.json"]
    files += [run / "checkpoints" / f"step-{step:08d}" / "state.json" for step in reversed(known)]
    for file in files:
        if file.exists():
            best = json.loads(file.read_text(encoding="utf-8")).get("best_step")
            if isinstance(best, int):
                return best
    raise RunError(
        "run.no-checkpoint",
        str(run),
        found="no validation that tells the best checkpoint",
        expected="a run that was evaluated",
        try_=f"--checkpoint {known[-1]}" if known else None,
    )


# What people see


class AnswerReporter(ConsoleReporter):
    """Bars that also tell the tokens a second of predictions that pass, and the time left."""

    def track(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Passes items on under a bar; without a terminal, says a line at times."""
        if total is None:
            yield from super().track(label, items)
            return
        columns = (
            SpinnerColumn(),
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
        )
        is_terminal = self.console.is_terminal
        started = told = time.monotonic()
        tokens = 0
        with Progress(
            *columns, console=self.console, transient=True, disable=not is_terminal
        ) as progress:
            task = progress.add_task(label, total=total, speed="")
            for count, item in enumerate(items, start=1):
                yield item
                tokens += item.completion_tokens if isinstance(item, Prediction) else 0
                now = time.monotonic()
                speed = f"{tokens / max(now - started, 1e-9):,.0f} tokens/s" if tokens else ""
                progress.update(task, completed=count, speed=speed)
                if not is_terminal and now - told > SECONDS_BETWEEN_LINES:
                    told = now
                    told_speed = f"{speed}, " if speed else ""
                    left = format_seconds((now - started) / count * (total - count))
                    self.note(f"{label}: {count:,} of {total:,} rows, {told_speed}{left} left")


def _show_start(console: Console, opened: Opened, options: PredictOptions) -> None:
    answering = options.answering
    drawn = "greedy" if answering.temperature <= 0 else _drawn(answering)
    stops = f", until {', '.join(map(repr, answering.stop))}" if answering.stop else ""
    console.print(
        f"{len(opened.questions):,} rows, answered by {opened.label}\n"
        f"{drawn}, at most {answering.max_new_tokens:,} tokens{stops}; engine: {options.engine}",
        highlight=False,
        soft_wrap=True,
    )


def _drawn(answering: Answering) -> str:
    parts = [f"temperature {answering.temperature:g}"]
    parts += [f"top-p {answering.top_p:g}"] if answering.top_p < 1 else []
    parts += [f"top-k {answering.top_k}"] if answering.top_k is not None else []
    return ", ".join([*parts, f"seed {answering.seed}"])


def _show_end(console: Console, predicted: Predicted, path: Path) -> None:
    rows = predicted.predictions
    table = Table(title=f"The first {min(SHOWN_ROWS, len(rows))} rows", title_justify="left")
    for name in ("line", "asked", "label", "prediction"):
        table.add_column(name)
    for row in rows[:SHOWN_ROWS]:
        asked = str(row.messages[-1]["content"]) if row.messages else row.prompt
        texts = (asked, "-" if row.label is None else row.label, row.prediction)
        table.add_row(str(row.line), *map(_short, texts))
    console.print(table, markup=False)
    if predicted.num_new:
        seconds = max(predicted.seconds, 1e-9)
        console.print(
            f"{predicted.num_new:,} rows in {format_seconds(predicted.seconds)}: "
            f"{predicted.num_new / seconds:,.2f} rows/s, "
            f"{predicted.new_tokens / seconds:,.0f} tokens/s",
            highlight=False,
        )
    else:
        console.print("all rows were there already (--restart answers anew)", highlight=False)
    cut = [row for row in rows if row.finish_reason == "length"]
    console.print(f"ended by themselves: {1 - len(cut) / len(rows):.1%}", highlight=False)
    if cut:
        console.print(
            f"{len(cut):,} were cut at the limit (finish_reason length): a larger "
            "--max-new-tokens lets them end",
            highlight=False,
        )
    console.print(f"predictions: {path}", highlight=False, soft_wrap=True)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
