"""The error tree. Every error says where, what was found, what was expected, and one thing to try.

TunesmithError
├── UserError (also ValueError)      exit 2: the recipe, the data or the model named is wrong
│   ├── RecipeError                  recipe.*
│   ├── DataError                    data.*      carries up to MAX_PROBLEMS problems
│   ├── ModelError                   model.*
│   └── RunError                     run.*
├── CheckpointError (also OSError)   exit 3: checkpoint.*
├── NumbersError (also ArithmeticError)  exit 4: numbers.*
├── OutOfMemoryError (also MemoryError)  exit 5: memory.*
├── DiskError (also OSError)         exit 6: disk.*
├── LockError (also OSError)         exit 7: lock.*
├── RewardError                      exit 8: reward.*    what judges sampled answers failed
├── EvaluationError                  exit 9: evaluate.*  what measures failed, or found no effect
├── ExportError                      exit 10: export.*   what was written is not what was trained
└── Interrupted                      exit 128 + signal: stopped by a signal, nothing lost

Besides, a run that hangs ends itself with exit 75 (`engine/watchdog.py`): to try again may help.

Codes are listed in docs/errors.md; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

MAX_PROBLEMS = 20
"""How many problems a DataError lists before it only counts the rest."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in one place of the user's input."""

    where: str
    code: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.where}: {self.code}: found {self.found}; expected {self.expected}"


class TunesmithError(Exception):
    """Base of all errors that tunesmith raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self, code: str, where: str, *, found: str, expected: str, try_: str | None = None
    ) -> None:
        super().__init__(code, where, found, expected, try_)
        self.code = code
        self.where = where
        self.found = found
        self.expected = expected
        self.try_ = try_

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.where, self.found, self.expected, self.try_)

    def __str__(self) -> str:
        text = f"{self.where}: {self.code}: found {self.found}; expected {self.expected}"
        return f"{text}\n  try: {self.try_}" if self.try_ else text


def _rebuild(
    kind: type[TunesmithError], code: str, where: str, found: str, expected: str, try_: str | None
) -> TunesmithError:
    return kind(code, where, found=found, expected=expected, try_=try_)


class UserError(TunesmithError, ValueError):
    """The user's input cannot be used as it is."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe key or value is wrong."""


class ModelError(UserError):
    """The model named cannot be found or used."""


class RunError(UserError):
    """The run directory does not fit what was asked for."""


class DataError(UserError):
    """The data is wrong in one or more places.

    Args:
        problems: the first of them, at most MAX_PROBLEMS are printed.
        num_problems: how many there are in all.
        try_: one thing to try.
    """

    def __init__(
        self, problems: list[Problem], *, num_problems: int | None = None, try_: str | None = None
    ) -> None:
        first = problems[0]
        super().__init__(
            first.code, first.where, found=first.found, expected=first.expected, try_=try_
        )
        self.problems = problems[:MAX_PROBLEMS]
        self.num_problems = len(problems) if num_problems is None else num_problems

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_data_error, (self.problems, self.num_problems, self.try_)

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems]
        hidden = self.num_problems - len(self.problems)
        if hidden > 0:
            lines.append(f"... and {hidden} more problems ({self.num_problems} in all)")
        if self.try_:
            lines.append(f"  try: {self.try_}")
        return "\n".join(lines)


def _rebuild_data_error(problems: list[Problem], num_problems: int, try_: str | None) -> DataError:
    return DataError(problems, num_problems=num_problems, try_=try_)


class CheckpointError(TunesmithError, OSError):
    """No checkpoint of the run can be used."""

    exit_code = 3


class NumbersError(TunesmithError, ArithmeticError):
    """Losses or gradients stay bad after rolling back; no weight was updated with one."""

    exit_code = 4


class OutOfMemoryError(TunesmithError, MemoryError):
    """One sample alone does not fit into memory."""

    exit_code = 5


class DiskError(TunesmithError, OSError):
    """Something could not be written."""

    exit_code = 6


class LockError(TunesmithError, OSError):
    """Another process works in this run directory."""

    exit_code = 7


class RewardError(TunesmithError):
    """What judges sampled answers failed in a run; the last step before it is saved."""

    exit_code = 8


class EvaluationError(TunesmithError):
    """A model could not be measured, or training has not changed it."""

    exit_code = 9


class ExportError(TunesmithError):
    """What was exported does not answer as what was trained."""

    exit_code = 10


class Interrupted(TunesmithError):
    """The run was stopped by a signal, and nothing is lost.

    Args:
        signal_number: of the signal.
        where: the run directory.
        step: the one that was saved, 0 if there was none, None if it stopped outside of training.
    """

    def __init__(self, signal_number: int, where: str, *, step: int | None) -> None:
        place = f"saved at step {step}" if step else "no step was done yet"
        place = "what was saved before is still there" if step is None else place
        super().__init__(
            "run.interrupted",
            where,
            found=f"signal {signal_number}",
            expected=f"a finished run ({place})",
            try_="run the same command again: it continues from here, bit for bit",
        )
        self.signal_number = signal_number
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_interrupted, (self.signal_number, self.where, self.step)


def _rebuild_interrupted(signal_number: int, where: str, step: int | None) -> Interrupted:
    return Interrupted(signal_number, where, step=step)
