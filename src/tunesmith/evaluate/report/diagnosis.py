"""What went wrong in a run, as a doctor would say it: the finding, what it is seen by, what to try.

Rules look at the files of a run alone, one after another; each is a function from a run to a
finding or None. Their limits are rules of thumb, stated where they stand.
"""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.evaluate.report.course_rules import (
    diverged,
    hardly_changed,
    memory_off,
    no_validation,
    not_better,
    over_trained,
    rate_too_high,
    slowed_down,
    under_trained,
    unfinished,
)
from tunesmith.evaluate.report.finding import Finding
from tunesmith.evaluate.report.reading import RunRecord
from tunesmith.evaluate.report.result_rules import (
    does_not_stop,
    forgets,
    got_worse,
    lost_rows,
    no_effect,
    no_signal,
    thin_mask,
)

RULES: tuple[Callable[[RunRecord], Finding | None], ...] = (
    diverged,
    not_better,
    no_effect,
    got_worse,
    rate_too_high,
    over_trained,
    under_trained,
    hardly_changed,
    forgets,
    does_not_stop,
    no_signal,
    no_validation,
    lost_rows,
    thin_mask,
    memory_off,
    slowed_down,
    unfinished,
)
"""In the order in which findings of one level are shown."""


def diagnose(run: RunRecord) -> list[Finding]:
    """All findings, the worst first; one that says so if nothing is wrong."""
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    if not found and run.of_kind("step"):
        evidence = "no rule about losses, gradients, data, memory or answers has anything to say"
        return [Finding("healthy", "good", "Nothing wrong is seen", evidence, "")]
    return sorted(found, key=lambda finding: finding.level != "bad")
