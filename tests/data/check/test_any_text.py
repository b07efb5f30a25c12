"""Every check takes any text at all, and a text of a million odd characters in little time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.check.chinese import script_mix
from tunesmith.data.check.language import detect_language
from tunesmith.data.check.mojibake import find_mojibake
from tunesmith.data.check.near_duplicates import NearDuplicates, jaccard
from tunesmith.data.check.secrets import find_secrets
from tunesmith.data.check.special_tokens import find_special_tokens
from tunesmith.data.check.truncation import looks_truncated
from tunesmith.data.check.width import mixed_widths

CHECKS: list[Callable[[str], object]] = [
    detect_language,
    script_mix,
    find_mojibake,
    find_secrets,
    lambda text: find_special_tokens(text, ()),
    looks_truncated,
    mixed_widths,
]
PIECES = (
    "a",
    "=",
    "(;",
    ".",
    "é",
    "Ã©é",
    "1-",
    "a.b-",
    "@a.",
    "<",
    '{"',
    "“",
    "中,",
    "- a\n",
    "0000 ",
)


@given(st.text(st.characters(exclude_categories=()), max_size=200))
def test_any_text(text: str) -> None:
    for check in CHECKS:
        check(text)
    duplicates = NearDuplicates()
    duplicates.add(text)
    assert duplicates.groups() == []
    assert jaccard(text, text) == 1.0


@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_with_the_length_alone(piece: str) -> None:
    """A pattern with quadratic cost would take minutes for these."""
    text = piece * (200_000 // len(piece))
    for check in CHECKS:
        started = time.perf_counter()
        check(text)
        assert time.perf_counter() - started < 5
