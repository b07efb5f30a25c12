"""What a person sees while tunesmith works: spinners, bars, and the run's event stream."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tunesmith.io.redact import redact, redacted_traceback
from tunesmith.types import Event, Json

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal a line appears this often instead of a moving bar."""


SHOWN_METRICS = (
    *("reward_accuracy", "reward_margin", "reward_gap", "accuracy", "macro_f1", "margin"),
    *("answer_tokens", "complete"),
)
"""Of an objective's metrics, what stands beside the validation loss."""


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and notices off the screen; errors still come through.

    What they log and warn of goes through `redact` first, as whatever tunesmith shows.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    redact_logs()


def redact_logs() -> None:
    """Masks secrets in every log record and warning from here on.

    Done where records are made: a filter of a handler would miss the handlers that libraries add
    later. Covers the text, its arguments and a traceback that comes with it, not what a library
    prints by itself.
    """
    if not isinstance(logging.getLogRecordFactory(), _RedactedRecords):
        logging.setLogRecordFactory(_RedactedRecords(logging.getLogRecordFactory()))
    logging.captureWarnings(True)


class _RedactedRecords:
    """Makes log records as `make` does, with their text put together and redacted."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self.make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self.make(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit the text
            text = f"{record.msg} {record.args}"
        record.msg, record.args = redact(text), ()
        if record.exc_info and record.exc_info[1] is not None:
            # Formatters take this text if it is there, in place of a traceback of their own.
            record.exc_text = redacted_traceback(record.exc_info[1]).rstrip()
        return record


class ConsoleReporter:
    """The Reporter for terminals."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        """Says one line."""
        self.console.print(text, highlight=False)

    def track(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Passes items on under a moving bar that goes away at the end."""
        columns = (SpinnerColumn(), TextColumn(label), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield from progress.track(items, total=total)

    def measure(
        self, label: str, items: Iterable[T], total: int, position: Callable[[], int]
    ) -> Iterator[T]:
        """Passes items on under a bar of the bytes read; without a terminal, says a line at times.

        The bar is drawn ten times a second, not with every item.
        """
        columns = (
            SpinnerColumn(),
            TextColumn(label),
            BarColumn(),
            TextColumn("{task.fields[count]:,} rows"),
            DownloadColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
        )
        is_terminal = self.console.is_terminal
        pause = 0.1 if is_terminal else SECONDS_BETWEEN_LINES
        looked = time.monotonic()
        with Progress(
            *columns, console=self.console, transient=True, disable=not is_terminal
        ) as progress:
            task = progress.add_task(label, total=total, count=0)
            for count, item in enumerate(items, start=1):
                yield item
                if time.monotonic() - looked > pause:
                    looked = time.monotonic()
                    done = position()
                    progress.update(task, completed=done, count=count)
                    if not is_terminal:
                        share = f"{100 * done / max(total, 1):.0f} % read"
                        self.console.print(f"{label}: {count:,} rows, {share}", highlight=False)

    def waiting(self, label: str) -> AbstractContextManager[object]:
        """Shows a spinner."""
        return self._spin(label) if self.console.is_terminal else self._say(label)

    @contextmanager
    def _spin(self, label: str) -> Generator[None]:
        with self.console.status(f"{label} ..."):
            yield

    @contextmanager
    def _say(self, label: str) -> Generator[None]:
        self.console.print(f"{label} ...", highlight=False)
        yield


class RunDisplay:
    """A Listener that shows a run: resolved values, a bar, evaluations, a summary."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.task: Any = None
        self.num_steps = 0
        self.last_line = 0.0
        self.last_level = "-"

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        show = getattr(self, f"_on_{event.kind}", None)
        if show is not None:
            show(event)

    def close(self) -> None:
        """Ends the bar; safe to call at any time."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _on_start(self, event: Event) -> None:
        self.num_steps = int(str(event.data["num_steps"]))
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            "train", total=self.num_steps, completed=event.step, text=""
        )

    def _on_step(self, event: Event) -> None:
        data = event.data
        text = (
            f"{' '.join(_level(event))}  val {self.last_level}  "
            f"lr {_number(data['learning_rate'], 2, 'e')}  {_number(data['tokens_per_second'], 0)} "
            "tok/s"
        )
        if self.progress is not None:
            self.progress.update(self.task, completed=event.step, text=text)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES or event.step in (
            1,
            self.num_steps,
        ):
            self.last_line = time.monotonic()
            self.console.print(f"step {event.step}/{self.num_steps}  {text}", highlight=False)

    def _on_evaluation(self, event: Event) -> None:
        when = "before training" if event.step == 0 else f"step {event.step}"
        if "loss" not in event.data:  # nothing is held out
            self.console.print(f"{_general(event)}  ({when})".strip(), highlight=False)
            return
        name, self.last_level = _level(event)
        best = "  [green]best so far[/green]" if event.data["best"] else ""
        measured = "".join(
            f"  {name.replace('_', ' ')} {_number(event.data[name], 3)}"
            for name in SHOWN_METRICS
            if event.data.get(name) is not None
        )
        text = f"validation {name} {self.last_level}{measured}{_general(event)}  ({when}){best}"
        self.console.print(text, highlight=False)

    def _on_resume(self, event: Event) -> None:
        self.console.print(f"going on from step {event.step} ({event.data['checkpoint']})")
        changed = event.data.get("changed")
        if isinstance(changed, list) and changed:
            self.console.print(f"  with another content of {', '.join(map(str, changed))}")

    def _on_warning(self, event: Event) -> None:
        self.console.print(f"[yellow]warning:[/yellow] {event.data['message']}", highlight=False)

    def _on_skip(self, event: Event) -> None:
        self._on_warning(event)

    def _on_rollback(self, event: Event) -> None:
        self._on_warning(event)

    def _on_done(self, event: Event) -> None:
        self.close()


def _level(event: Event) -> tuple[str, str]:
    """Name and value of the figure that tells where a run stands: its reward, or its loss."""
    name = "reward" if event.data.get("reward") is not None else "loss"
    return name, _number(event.data[name], 4)


def _general(event: Event) -> str:
    """What the meter of forgetting says."""
    loss, kl = event.data.get("general_loss"), event.data.get("general_kl")
    if loss is None:
        return ""
    far = "" if kl is None or event.step == 0 else f" (KL {_number(kl, 3)})"
    return f"  general loss {_number(loss, 3)}{far}"


def _gib(summary: dict[str, Json], name: str) -> str:
    value = summary.get(name)  # a run finished by an older version lacks some
    return "-" if value is None else f"{float(str(value)) / 2**30:.2f} GiB"


def show_summary(console: Console, summary: dict[str, Json]) -> None:
    """Prints a finished run's figures."""
    table = Table(title="Result", show_header=False, title_justify="left")
    before, after = summary["eval_loss_before"], summary["eval_loss"]
    name, shown, shown_before = "eval_loss", after, before
    if summary.get("eval_reward") is not None:
        name, shown, shown_before = "eval_reward", summary["eval_reward"], summary["reward_before"]
    rows = {
        "train_loss": _number(summary["train_loss"], 4),
        name: _number(shown, 4) if shown is not None else "no validation rows",
        f"{name} before training": _number(shown_before, 4) if shown_before is not None else "-",
        "best step": str(summary["best_step"]) if summary["best_step"] is not None else "-",
        "steps / epochs": f"{summary['steps']} / {summary['epochs']}",
        "runtime": format_seconds(float(str(summary["runtime_seconds"]))),
        "samples per second": _number(summary["samples_per_second"], 2),
        "tokens per second": _number(summary["tokens_per_second"], 0),
        "trained parameters": f"{int(str(summary['trained_parameters'])):,}",
        "peak memory": _gib(summary, "peak_memory_bytes"),
        "of the steps": _gib(summary, "peak_of_steps_bytes"),
        "as predicted": _gib(summary, "predicted_peak_of_steps_bytes"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if before is not None and after is not None and float(str(after)) >= float(str(before)):
        console.print(
            "[yellow]warning:[/yellow] validation did not get better than before training: try a "
            "lower train.learning_rate, or look at the data with `tunesmith preview`"
        )


def format_seconds(seconds: float) -> str:
    """Time as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: Json, digits: int, kind: str = "f") -> str:
    return f"{float(str(value)):,.{digits}{kind}}"
