"""The file of predictions while it grows: what is there already, one line more, the end.

Beside it stands what decides the answers, `NAME.settings.json`: another command does not go on in
the same file.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import cast

from tunesmith.errors import LockError, RunError
from tunesmith.evaluate.prediction import Prediction, read_predictions
from tunesmith.io.atomic import disk_error, write_atomic
from tunesmith.io.fault import fault
from tunesmith.types import Json

Settings = Mapping[str, Json]


@dataclass(frozen=True)
class PredictionFile:
    """One file of predictions.

    Args:
        path: of it.
    """

    path: Path

    @property
    def settings_path(self) -> Path:
        """Where what decides the answers stands."""
        return self.path.with_name(f"{self.path.name}.settings.json")

    @contextmanager
    def opened(self) -> Generator[FileIO]:
        """The file, to append lines to; for this process alone.

        Raises:
            LockError: another process writes it (`lock.held`).
            DiskError: the place cannot be written (`disk.write`).
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(self.path, "a")
        except OSError as error:
            raise disk_error(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockError(
                    "lock.held",
                    str(self.path),
                    found="another process that writes these predictions",
                    expected="a file of one's own",
                    try_="wait for it, stop it, or choose another --out",
                ) from None
            yield file

    def begin(self, file: FileIO, settings: Settings, *, restart: bool) -> list[Prediction]:
        """The predictions that are there already, after a look at how they were made.

        A last line that a kill cut in two is taken away.

        Raises:
            RunError: they were made otherwise (`run.other-predictions`).
            DataError: the file is none of predictions (`data.not-predictions`).
            DiskError: the settings cannot be written (`disk.write`).
        """
        if restart and self.settings_path.exists():  # nothing but predictions is ever emptied
            file.truncate(0)
        if self.path.stat().st_size:
            self._compare(settings)
            content = self.path.read_bytes()
            file.truncate(content.rfind(b"\n") + 1)
        write_atomic(self.settings_path, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
        return read_predictions(self.path)

    def append(self, file: FileIO, prediction: Prediction) -> None:
        """Writes a line; nothing of it waits in this process.

        Raises:
            DiskError: the disk is full, or gone.
        """
        fault("predict.row", self.path)
        rest = memoryview(_line(prediction).encode())
        try:
            while rest:  # a disk that gets full takes a part
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise disk_error(self.path, error) from error

    def finish(self, predictions: Sequence[Prediction], order: Sequence[str]) -> list[Prediction]:
        """Puts the lines into the order of the data, all or nothing."""
        by_id = {each.id: each for each in predictions}
        ordered = [by_id[each] for each in order]
        text = "".join(map(_line, ordered))
        if self.path.read_text(encoding="utf-8") != text:
            write_atomic(self.path, text)
        return ordered

    def _compare(self, settings: Settings) -> None:
        try:
            found = json.loads(self.settings_path.read_text(encoding="utf-8"))
            there = cast("dict[str, Json]", found) if isinstance(found, dict) else {}
        except (OSError, ValueError):
            there = {}
        now = cast("dict[str, Json]", json.loads(json.dumps(settings)))
        if there == now:
            return
        names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
        parts = [
            f"{name}: {_short(there.get(name))}, now {_short(now.get(name))}" for name in names
        ]
        raise RunError(
            "run.other-predictions",
            str(self.path),
            found="; ".join(parts) if there else "predictions, and not how they were made",
            expected="the settings that its predictions were made with",
            try_="another --out, or --restart to answer anew in its place",
        )


def _line(prediction: Prediction) -> str:
    return json.dumps(prediction.as_json(), ensure_ascii=False) + "\n"


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
