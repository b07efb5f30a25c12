"""Rows 47 to 51: data that is not as it should be. Line 23 of 40 is the bad one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_rows.bench import FAIL, HALF, PASS, Bench, Verdict, reason, shorten, together
from fault_rows.spec import Outcome, make_rows

LINE = 23

_FILE, _LINE = r"data\.jsonl", rf"\bline {LINE}\b"

PLACE = re.compile(
    rf"{_FILE}\S*:{LINE}\b|{_FILE}.{{0,80}}{_LINE}|{_LINE}.{{0,80}}{_FILE}", re.DOTALL
)
"""File and line, as tools write it."""

TOLD = re.compile(
    r"invalid|abnormal|skip|drop|empty|role|truncat|cut off|longer|left out|too long|exceed", re.I
)


def malformed_json(bench: Bench) -> Verdict:
    """Row 47."""
    return _spoiled(bench, lambda lines: lines[LINE - 1][: len(lines[LINE - 1]) // 2].encode())


def wrong_type(bench: Bench) -> Verdict:
    """Row 48."""
    rows = make_rows()
    rows[LINE - 1]["messages"] = "a text in place of messages"
    return _with_rows(bench, rows, "text for messages")


def bad_conversations(bench: Bench) -> Verdict:
    """Row 49."""
    return together(
        [
            _with_rows(
                bench,
                _with_messages([("user", "a"), ("user", "b"), ("assistant", "c")]),
                "two user turns",
            ),
            _with_rows(bench, _with_messages([("user", "a"), ("assistant", "")]), "empty answer"),
            _with_rows(bench, _with_messages([("user", "a"), ("robot", "b")]), "unknown role"),
        ]
    )


def _with_messages(messages: list[tuple[str, str]]) -> list[dict[str, Any]]:
    rows = make_rows()
    rows[LINE - 1]["messages"] = [{"role": role, "content": text} for role, text in messages]
    return rows


def long_prompt(bench: Bench) -> Verdict:
    """Row 50."""
    rows = make_rows()
    rows[LINE - 1]["messages"][0]["content"] = "so long " * 50
    return _with_rows(bench, rows, "prompt of 400 tokens for 128")


def encodings(bench: Bench) -> Verdict:
    """Row 51."""
    text = b"\xff\xfe"
    return together(
        [
            _same_result(bench, "BOM", lambda content: b"\xef\xbb\xbf" + content),
            _same_result(bench, "CRLF", lambda content: content.replace(b"\n", b"\r\n")),
            _spoiled(
                bench,
                lambda lines: lines[LINE - 1].encode().replace(b"answer", text),
                "invalid UTF-8",
            ),
        ]
    )


def _spoiled(
    bench: Bench, spoil: Callable[[list[str]], bytes], name: str = "half a line"
) -> Verdict:
    """Replaces one line of the file."""
    folder = bench.fresh()
    path = folder / "data.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    encoded = [line.encode() for line in lines]
    encoded[LINE - 1] = spoil(lines)
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return _judge(bench, folder, bench.run(folder, bench.spec()), name)


def _with_rows(bench: Bench, rows: list[Any], name: str) -> Verdict:
    folder = bench.fresh(rows)
    return _judge(bench, folder, bench.run(folder, bench.spec()), name)


def _judge(bench: Bench, folder: Path, outcome: Outcome, name: str) -> Verdict:
    """Named by file and line, told somehow, or passed over."""
    place = PLACE.search(outcome.log)
    if place:
        at = outcome.log.rfind("\n", 0, place.start()) + 1
        shown = json.dumps(" ".join(outcome.log[at : place.end() + 60].split()), ensure_ascii=False)
        return Verdict(PASS, f"{name}: {outcome.end}, {shorten(shown)}")
    counted = re.search(r"[^\n]*\b1 (of 40 )?samples?\b[^\n]*", outcome.log)
    if counted:
        return Verdict(PASS, f"{name}: {outcome.end}, counted: {shorten(counted[0])!r}")
    if not outcome.is_finished:
        row = re.search(r"[^\n:]*\bin row \d+", outcome.log)
        said = shorten(row[0]) if row else reason(outcome)
        return Verdict(HALF, f"{name}: {outcome.end}, file and line not told: {said}")
    lines = [re.sub(r"^.*examples/s\]", "", line) for line in bench.new_lines(outcome)]
    told = [line.strip() for line in lines if TOLD.search(line)]
    if told:
        return Verdict(HALF, f"{name}: trains on; says {shorten(told[0])!r}")
    return Verdict(FAIL, f"{name}: trains on it silently")


def _same_result(bench: Bench, name: str, change: Callable[[bytes], bytes]) -> Verdict:
    """A change of the file that should not matter."""
    folder = bench.fresh()
    path = folder / "data.jsonl"
    path.write_bytes(change(path.read_bytes()))
    outcome = bench.run(folder, bench.spec())
    if not outcome.is_finished:
        return Verdict(FAIL, f"{name}: {outcome.end}, {reason(outcome)}")
    difference = bench.difference(folder, bench.oracle())
    if difference == 0:
        return Verdict(PASS, f"{name}: read as without")
    return Verdict(FAIL, f"{name}: final weights differ by {difference:.2g}")
