"""The rows of the fault matrix, and the table in docs/reliability.md that is made of a run of them.

    make test-faults        runs all rows and writes the table
    python tests/faults/matrix.py RESULTS.xml      the second half alone

A test belongs to the row in its name: `test_row_16_sigkill_in_a_save`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- matrix: made by make test-faults -->", "<!-- end of the matrix -->"

ROWS: dict[int, tuple[str, str]] = {
    1: ("SIGKILL between steps", "the same command ends with the same bits"),
    2: ("SIGKILL in epoch 2 and 3", "the same bits; no row lost or doubled"),
    3: ("random numbers (dropout) in the middle of an epoch", "the same bits"),
    4: ("SIGKILL in the middle of an accumulation", "the step is replayed from its start"),
    5: ("batches made ahead, or late", "the same order: each is a function of its step"),
    7: ("another micro-batch size on resume", "the same samples, losses within 1e-6"),
    8: ("a row of the data edited before a resume", "refused by the file's name"),
    9: ("a change of the recipe's numbers", "refused with old and new values"),
    10: ("SIGKILL with packing", "identical packs"),
    11: (
        "SIGKILL with half-used answers (GRPO, PPO)",
        "the same answers out of the checkpoint, the same bits",
    ),
    12: ("state of the guards", "a resumed run decides as the uninterrupted one"),
    13: ("other parameters than were saved", "refused with their names"),
    14: ("SIGKILL and SIGTERM with each objective", "the same bits, PPO's value head included"),
    15: (
        "SIGKILL, SIGINT, a full disk in a prediction",
        "the same command goes on; each row once, the same bytes",
    ),
    16: ("SIGKILL at every write of a save", "an earlier whole checkpoint; temporaries go"),
    17: ("an empty newer directory", "passed over with a warning"),
    18: ("the newest checkpoint truncated", "the one before; the bad one is kept aside"),
    19: ("one flipped bit in the weights", "noticed; the one before"),
    20: ("one flipped bit in the optimizer", "noticed; the one before"),
    21: ("all checkpoints bad", "exit 3 with all reasons; never silently from zero"),
    22: (
        "disk full during a save",
        "older ones intact, a second try, else exit 6 and the bytes needed",
    ),
    23: ("disk too small at the start", "refused with needed and free"),
    24: ("SIGKILL during a rotation", "a half-removed checkpoint is never chosen"),
    25: ("a save in the background fails", "told, tried once more, else the run stops"),
    26: ("two runs in one directory", "exit 7 with the first one's process id"),
    27: ("output that cannot be written", "exit 6 before the model is loaded"),
    28: ("SIGTERM in a step", "saved within the step, exit 143, the same bits"),
    29: ("signals in evaluation, tokenizing, loading", "ends at once, nothing lost"),
    30: ("a second signal during a save", "immediate exit, no half checkpoint"),
    31: ("a crash at the same step twice", "the supervisor stops and names the samples"),
    34: ("a loss or gradient that is not finite", "no update by it; step and rows named"),
    36: ("one spike of the loss", "that step is skipped, the next is not"),
    37: ("several bad steps in a row", "roll back, leave their samples out; then exit 4"),
    38: ("a batch without any label", "changes nothing, no NaN, counted"),
    39: ("a token id beyond the vocabulary", "refused before the model is loaded"),
    40: ("out of memory", "smaller micro-batches, the same losses; exit 5 at one sample"),
    41: ("a step that hangs", "stacks of all threads, later exit 75"),
    42: ("a loader that hangs", "the watchdog names the phase `data`"),
    43: ("a hub that fails", "retried, resumed, else a clear error"),
    44: ("a download cut off or altered", "noticed, fetched again, never cached"),
    45: ("offline with a warm cache", "works without a network call"),
    46: ("a tracker that is down, or hangs", "one warning; the run ends as without it"),
    47: ("broken JSON in a line", "path:line:column; up to 20 problems"),
    48: ("a wrong type in a row", "path:line, field, found and expected"),
    49: ("roles out of order, empty answers", "counted by code; an error by default"),
    50: ("prompts longer than the limit", "counted; an error if over 1 % have no answer left"),
    51: ("BOM, CRLF, invalid UTF-8, huge lines", "handled, or named with the byte"),
    52: ("training rows among the held-out ones", "a warning with the count"),
    53: ("a pickle among the weights", "refused; nothing in it runs"),
    54: ("a hostile config.json", "keys that name code are dropped or refused"),
    55: ("a model that brings its own code", "refused: there is no option for it"),
    56: ("a chat template that escapes", "blocked"),
    57: ("a chat template that never ends", "stopped within a second and 4 MiB"),
    58: ("archives with traversal, links, bombs", "refused, nothing outside"),
    60: ("tricks in file names", "refused: a resolved path stays inside its root"),
    65: ("a planted secret", "absent from logs, events, checkpoints, errors"),
    66: ("lying GGUF and safetensors headers", "refused before memory is taken"),
}
"""What happens, and what is expected, by the number of the row."""

LATER: dict[int, str] = {
    6: "another number of processes: comes with training on many cards",
    32: "a data worker killed: there are none, a thread makes the batches",
    33: "the job server killed: comes with the server",
    35: "an infinite gradient on one rank: comes with training on many cards",
    59: "requests to private addresses: comes with the server",
    **dict.fromkeys((61, 62, 63, 64, 67, 68, 69, 70), "comes with the server"),
}
"""Rows without a test, and why."""

NAME = re.compile(r"test_row_(\d+)_")


@dataclass
class Found:
    """What became of a row's tests."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    seconds: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))


def read_results(file: Path) -> dict[int, Found]:
    """The outcomes in a JUnit file, by row."""
    found: dict[int, Found] = defaultdict(Found)
    for case in ElementTree.parse(file).iter("testcase"):
        match = NAME.search(case.get("name", ""))
        if match is None:
            continue
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
        row = found[int(match[1])]
        row.outcomes[outcome] += 1
        row.seconds += float(case.get("time", "0"))
    return found


def table(results: dict[int, Found]) -> str:
    """The matrix as Markdown."""
    lines = ["| row | what happens | what is expected | tests |", "|---|---|---|---|"]
    for row in sorted({*ROWS, *LATER}):
        if row in ROWS:
            fault, expected = ROWS[row]
            lines.append(f"| {row} | {fault} | {expected} | {results.get(row) or 'not run'} |")
        else:
            lines.append(f"| {row} | {LATER[row]} | | |")
    passed = sum(found.outcomes["passed"] for found in results.values())
    failed = sum(found.outcomes["failed"] for found in results.values())
    return "\n".join([f"{passed} tests passed, {failed} failed.", "", *lines])


def write_page(page: str, content: str) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(write_page(text, table(read_results(Path(sys.argv[1])))), encoding="utf-8")
