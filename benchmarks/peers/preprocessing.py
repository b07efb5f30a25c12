"""What both peer scripts share: their arguments, a clock for each pass, and the line they print.

Runs on the peer's python, so it imports nothing of tunesmith.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

IGNORED_LABEL = -100

COUNTED_ROWS = 1_000
"""Rows looked at in one go when the tokens are counted."""


@dataclass(frozen=True)
class Work:
    """What the peer has to do."""

    data: Path
    tokenizer: Path
    processes: int
    """0 leaves all work to the main process."""
    max_length: int
    template: str
    folder: Path
    """For caches and configuration; removed afterwards."""

    @property
    def num_proc(self) -> int | None:
        """The processes as `datasets` takes them."""
        return self.processes or None


@dataclass
class Result:
    """The figures of one run; the clock counts loading the file and preprocessing alone."""

    rows: int
    rows_kept: int
    tokens: int
    supervised_tokens: int
    seconds: float
    cpu_seconds: float
    """Of the main process and its workers: far below seconds x cores, others were busy too."""
    started: float
    """Seconds since the epoch, for whoever samples memory from outside."""
    pass_seconds: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass
class Clock:
    """Times the whole and each pass over the data."""

    started: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    pass_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def whole(self) -> Generator[None]:
        """Times what is meant to be compared."""
        self.started = time.time()
        start, cpu_start = time.perf_counter(), cpu_seconds()
        yield
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += cpu_seconds() - cpu_start

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The call, with its time booked under its description, or the name where it has none."""

        def call_and_book(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            booked = kwargs.get("desc") or name
            spent = time.perf_counter() - start
            self.pass_seconds[booked] = self.pass_seconds.get(booked, 0.0) + spent
            return result

        return call_and_book


def cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@contextmanager
def peer_work(description: str | None, template: str) -> Generator[Work]:
    """Reads the arguments and makes the folder, where `datasets` is told to keep its cache."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--processes", type=int, default=2, help="0: only the main process")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens; the rest is cut off")
    parser.add_argument("--template", default=template, help="the peer's name for the format")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peer_data.") as name:
        os.environ["HF_DATASETS_CACHE"] = str(Path(name) / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        # The peers print samples; standard output is kept for the result.
        with redirect_stdout(sys.stderr):
            yield Work(folder=Path(name), **vars(options))


def copy_tokenizer(work: Work, config: dict[str, Any]) -> Path:
    """A folder that passes for a model's: the tokenizer and a configuration beside it."""
    folder = work.folder / "model"
    folder.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(work.tokenizer / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def result_of(
    dataset: Any, work: Work, clock: Clock, settings: dict[str, Any], packages: tuple[str, ...]
) -> Result:
    """Counts rows and tokens of what the peer would train on."""
    tokens = supervised = 0
    for table in dataset.with_format("arrow").iter(batch_size=COUNTED_ROWS):
        labels = table["labels"].combine_chunks().flatten().to_numpy()
        tokens += labels.size
        supervised += int((labels != IGNORED_LABEL).sum())
    settings |= {"processes": work.processes, "template": work.template}
    settings |= {"TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM")}
    with work.data.open("rb") as lines:
        rows = sum(1 for _ in lines)
    return Result(
        rows=rows,
        rows_kept=len(dataset),
        tokens=tokens,
        supervised_tokens=supervised,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        started=clock.started,
        pass_seconds=clock.pass_seconds,
        settings=settings,
        versions={package: version(package) for package in packages},
    )


def print_result(result: Result) -> None:
    """The one line on standard output."""
    print(json.dumps(asdict(result)), file=sys.__stdout__, flush=True)
