"""Programs that models write, run with the tests of their rows (as HumanEval and MBPP do).

The sandbox is a fence, not a wall: `tunesmith.evaluate.sandbox` says what it does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tunesmith.errors import UserError
from tunesmith.evaluate.intervals import Measured, share_of
from tunesmith.evaluate.metrics.base import MeasureOptions
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.sandbox import Outcome, run_program

_BLOCK = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def code(predictions: Sequence[Prediction], options: MeasureOptions) -> list[Measured]:
    """The share of programs that pass all tests of their rows, on the first try (pass@1).

    Raises:
        UserError: running them was not allowed (`evaluate.code-not-allowed`), or no row has tests
            (`evaluate.no-tests`).
    """
    if not options.allows_code:
        raise UserError(
            "evaluate.code-not-allowed",
            "metric code",
            found="no leave to run what the model wrote",
            expected="leave to run it",
            try_="in a container or a machine that may be lost: --allow-code",
        )
    rows: list[bool | None] = []
    outcomes: list[Outcome] = []
    for each in options.reporter.track("Running programs", predictions, len(predictions)):
        tests = options.tests.get(each.id, each.label)
        if not tests or not tests.strip():
            rows.append(None)
            continue
        outcome = run_program(
            f"{program_of(each.prediction)}\n\n{tests}\n",
            seconds=options.code_seconds,
            memory_bytes=options.code_bytes,
        )
        outcomes.append(outcome)
        rows.append(outcome.status == "passed")
    if not outcomes:
        raise UserError(
            "evaluate.no-tests",
            "metric code",
            found="rows without tests",
            expected="tests in Python as labels, or by the option `tests`",
        )
    signature = (
        f"pass@1|first python block|tests:label|seconds:{options.code_seconds:g}|"
        f"bytes:{options.code_bytes}|network:{outcomes[0].network}"
    )
    return [share_of("code_pass", rows, signature=signature)]


def program_of(answer: str) -> str:
    """The first fenced block of Python, else the first of all, else the answer as it is."""
    blocks = _BLOCK.findall(answer)
    named = [text for language, text in blocks if language.lower() in ("python", "py", "python3")]
    plain = [text for _, text in blocks]
    return (named or plain or [answer])[0]
