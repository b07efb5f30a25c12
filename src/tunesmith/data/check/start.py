"""What a look at the first rows finds when a training starts; `tunesmith check` looks at all."""

from __future__ import annotations

from itertools import islice

from tunesmith.data.check.checker import look_at_start
from tunesmith.data.check.findings import ADVICE
from tunesmith.data.columns import read_samples
from tunesmith.data.sources import Sources
from tunesmith.data.templates import Renderer
from tunesmith.types import Reporter

LOOKED_AT_ROWS = 2000
"""Of all sources together."""


def findings_at_start(sources: Sources, renderer: Renderer, reporter: Reporter) -> list[str]:
    """What a look at the first rows of each source finds, a line for each code."""
    share = -(-LOOKED_AT_ROWS // len(sources.train))
    rows = [
        row
        for source in sources.train
        for row in islice(read_samples(source.config, source.files), share)
    ]
    with reporter.waiting("Looking at the first rows"):
        findings = look_at_start(rows, renderer.specials).findings
    if not findings.counts:
        return []
    return [
        f"worth a look in the first {len(rows):,} rows (`tunesmith check` looks at all):",
        *(
            f"  {count:,} x {code}, first {findings.first[code][0].where}: "
            f"{findings.first[code][0].found}: {ADVICE[code]}"
            for code, count in findings.counts.most_common()
        ),
    ]
