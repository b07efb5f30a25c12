"""`python`: reward functions of installed packages, where the operator enabled them.

A package names its functions in the entry point group `tunesmith.rewards`:

    [project.entry-points."tunesmith.rewards"]
    my_reward = "my_package.rewards:my_reward"

A recipe comes from anywhere and only says `my_reward`; whoever runs it says with
`TUNESMITH_PLUGINS=my_reward` (several with commas, or `all`) that this code may run.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from tunesmith.errors import RewardError, TunesmithError, UserError
from tunesmith.objectives.rewards.base import Answered, checked_rewards

GROUP = "tunesmith.rewards"
ENABLED_VARIABLE = "TUNESMITH_PLUGINS"

Judge = Callable[..., object]


@dataclass(frozen=True)
class PythonReward:
    """Calls `function(answers, **arguments)`, where the answers are a list of `Answered`.

    The function returns as many numbers, None for what it cannot judge. It runs in this process
    with all its rights: nothing confines it.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict[str, object])

    @cached_property
    def function(self) -> Judge:
        """The function that the name stands for.

        Raises:
            UserError: `reward.plugin`: nobody enabled it, no package has it, or it cannot be
                loaded.
        """
        return load_plugin(self.name)

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One reward for each answer.

        Raises:
            RewardError: `reward.failed`.
        """
        # The fourth boundary of style rule 32: the code called is not ours and may raise anything.
        try:
            given = list(cast("Iterable[object]", self.function([*answers], **self.arguments)))
        except TunesmithError:
            raise
        except Exception as error:
            raise self._failed(f"{type(error).__name__}: {error}", self._row(answers)) from error
        return checked_rewards(given, len(answers), self._failed, allows_nan=True)

    def _row(self, answers: Sequence[Answered]) -> str:
        """The first answer that it fails at alone."""
        for row, answered in enumerate(answers):
            try:
                self.function([answered], **self.arguments)
            except Exception:  # noqa: BLE001 - the same boundary
                return f"answer {row + 1} of {len(answers)}, {answered.answer[:60]!r}"
        return f"{len(answers)} answers together, none of them alone"

    def _failed(self, found: str, row: str = "") -> RewardError:
        return RewardError(
            "reward.failed",
            f"reward {self.name}" + (f", {row}" if row else ""),
            found=found,
            expected="a finite number or None for each answer",
            try_="mend the function; the same command goes on from the last checkpoint",
        )


def load_plugin(name: str) -> Judge:
    """A function of the group `tunesmith.rewards`.

    Raises:
        UserError: `reward.plugin`.
    """
    enabled = {part.strip() for part in os.environ.get(ENABLED_VARIABLE, "").split(",")}
    if not enabled & {name, "all"}:
        raise _no_plugin(
            name,
            found="a reward function that nobody enabled",
            try_=f"{ENABLED_VARIABLE}={name} before the command, if you trust its package",
        )
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise _no_plugin(
            name,
            found=f"no such function; there are {', '.join(sorted(known)) or 'none'}",
            try_=f"did you mean {near[0]}?" if near else "install the package that has it",
        )
    return _loaded(known[name])


def _loaded(point: EntryPoint) -> Judge:
    try:
        function = point.load()
    except (ImportError, AttributeError) as error:
        raise _no_plugin(point.name, found=str(error), try_="install its package again") from error
    if not callable(function):
        raise _no_plugin(point.name, found=f"a {type(function).__name__}", try_="name a function")
    return function


def _no_plugin(name: str, *, found: str, try_: str) -> UserError:
    return UserError(
        "reward.plugin",
        f"reward {name}",
        found=found,
        expected=f"an enabled function of the entry point group {GROUP}",
        try_=try_,
    )
