"""What a check counts and finds, with the byte tokenizer: a character of ASCII is a token."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import make_byte_tokenizer
from tunesmith.config.recipe import DataConfig
from tunesmith.data.check import checker as checker_module
from tunesmith.data.check.checker import Dropped, check_sources, look_at_start
from tunesmith.data.check.lengths import num_pieces
from tunesmith.data.check.report import CheckReport, contents, counted, histogram, spoken_time
from tunesmith.data.sources import find_sources
from tunesmith.data.templates import Renderer
from tunesmith.types import Completion, Origin, SilentReporter

Checked = tuple[CheckReport, Dropped]


def turn(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


SUBJECTS = ("price", "size", "color", "weight", "origin", "maker", "age", "warranty", "range")
VARIED = [
    turn(f"What is the {s} of it?", f"{s[::-1]} {n * 7919} {s}") for n, s in enumerate(SUBJECTS)
]


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Checked]:
    """Checks rows given as Python values."""

    def run(rows: list[Any], held_out: list[Any] | None = None, **options: Any) -> Checked:
        data: dict[str, Any] = {"train": str(write(tmp_path / "train.jsonl", rows))}
        data["validation"] = 0
        if held_out is not None:
            data["validation"] = [{"path": str(write(tmp_path / "held_out.jsonl", held_out))}]
        sources = find_sources(DataConfig.model_validate(data), Path, SilentReporter())
        renderer = Renderer(make_byte_tokenizer())
        wanted: dict[str, Any] = {"max_length": None, **options}
        return check_sources(sources, renderer, SilentReporter(), **wanted)

    return run


def write(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def found(report: CheckReport, code: str) -> list[tuple[str, str]]:
    problems = report.findings.first.get(code, [])
    return [(Path(problem.where).name, problem.found) for problem in problems]


def test_counts(check: Callable[..., Checked]) -> None:
    rows = [turn("a?", "yes", "Be brief."), turn("b?", "no"), "{broken", {"foo": 1}]
    report, _ = check(rows)
    (source,) = report.sources
    assert (source.samples, source.unusable, report.findings.num_errors) == (2, 2, 2)
    assert dict(report.roles) == {"system": 1, "user": 2, "assistant": 2}
    assert dict(report.without) == {"system": 1}
    assert dict(report.messages) == {2: 1, 3: 1}
    assert report.training_samples == 2
    assert report.training_tokens == report.num_tokens == int(report.lengths.sum())
    assert report.supervised.tolist() == [len("yes") + 1, len("no") + 1]  # and the end token
    shown = dict(contents(report))
    assert shown["roles"] == "user 2, assistant 2, system 1; 1 sample without a system message"
    assert shown["messages"] == "2 (in 1 sample), 3 (in 1)"


def test_copies_in_training_and_validation(check: Callable[..., Checked]) -> None:
    rows = [*VARIED, VARIED[0], VARIED[1]]
    report, dropped = check(rows, [VARIED[0], VARIED[0], turn("other?", "entirely")])
    assert found(report, "data.leak")[0][0] == "train.jsonl:1"
    assert "held_out.jsonl:1" in found(report, "data.leak")[0][1]
    duplicates = [
        ("train.jsonl:10", "the same as line 1"),
        ("held_out.jsonl:2", "the same as line 1"),
    ]
    assert set(duplicates) < set(found(report, "data.duplicate"))
    assert {(Path(origin.path).name, origin.line) for origin in dropped.rows} == {
        ("train.jsonl", 1),
        ("train.jsonl", 10),
        ("train.jsonl", 11),
        ("held_out.jsonl", 2),
    }


def test_nearly_equal_rows(check: Callable[..., Checked]) -> None:
    long = "The quick brown fox jumps over the lazy dog while seven wizards make toxic brew. " * 3
    report, dropped = check([turn("a?", long), *VARIED], [turn("a?", long + "So.")])
    assert found(report, "data.near-leak")[0][0] == "held_out.jsonl:1"
    assert not dropped.rows
    report, _ = check([turn("a?", long), turn("a?", long + "So.")])
    assert found(report, "data.near-duplicate") == [("train.jsonl:2", "nearly the same as line 1")]


def test_a_long_system_message_makes_no_duplicates(check: Callable[..., Checked]) -> None:
    system = "You are the patient assistant of a shop for bicycles and their parts. " * 10
    rows = [turn(r["messages"][0]["content"], r["messages"][1]["content"], system) for r in VARIED]
    assert not found(check(rows)[0], "data.near-duplicate")
    one, two = turn("a?", "b", "Speak as a pirate."), turn("a?", "b", "Speak as a king.")
    report, dropped = check([one, two])
    assert not dropped.rows
    assert not found(report, "data.duplicate")


def test_calls_and_ratings_are_part_of_a_row(check: Callable[..., Checked]) -> None:
    def call(arguments: str) -> dict[str, Any]:
        function = {"name": "look", "arguments": arguments}
        calls = [{"id": "1", "type": "function", "function": function}]
        asked = {"role": "user", "content": "Look it up."}
        return {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": calls}]}

    assert not check([call('{"a": 1}'), call('{"b": 2}')])[1].rows
    rated = {"prompt": "a?", "completion": "b"}
    assert not check([{**rated, "label": True}, {**rated, "label": False}])[1].rows


@pytest.mark.parametrize(
    ("overlong", "fate", "used"),
    [
        ("auto", "its end is cut off, with 12 of 51 supervised tokens", 60),
        ("cut_right", "its end is cut off, with 12 of 51 supervised tokens", 60),
        ("cut_left", "its start is cut off, nothing supervised with it", 60),
        ("split", "cut into 2 pieces", 72),
        ("drop", "left out", 0),
    ],
)
def test_overlong(check: Callable[..., Checked], overlong: str, fate: str, used: int) -> None:
    report, _ = check([turn("q?", "x" * 50)], max_length=60, overlong=overlong)
    assert found(report, "data.overlong") == [("train.jsonl:1", f"72 tokens: {fate}")]
    assert report.training_tokens == used


def test_overlong_prompt_leaves_nothing(check: Callable[..., Checked]) -> None:
    report, _ = check([turn("q" * 100, "a")], max_length=60)
    assert "left out, nothing is left to learn" in found(report, "data.overlong")[0][1]
    assert report.training_tokens == 0


def test_raw_text_is_cut_into_pieces(check: Callable[..., Checked]) -> None:
    rows = [{"text": "word " * 100}, {"text": "short"}]
    report, _ = check(rows, max_length=100)
    assert not found(report, "data.overlong")
    pieces = num_pieces(int(report.lengths.max()), 100)
    assert report.facts == [f"1 raw text longer than 100 tokens: cut into {pieces} pieces"]
    assert report.training_tokens == report.num_tokens
    for overlong, fate in (("drop", "left out"), ("cut_left", "its start is cut off")):
        report, _ = check(rows, max_length=100, overlong=overlong)
        assert fate in found(report, "data.overlong")[0][1]
        assert report.training_tokens < report.num_tokens


def test_raw_text_without_a_limit_follows_the_other_samples(check: Callable[..., Checked]) -> None:
    rows = [{"text": "word " * 1000}]
    assert "2,048 tokens" in check(rows, max_length=8192, is_auto=True)[0].facts[0]
    assert not check([*rows, turn("q?", "x" * 6000)], max_length=8192, is_auto=True)[0].facts


def test_kinds_that_the_objective_cannot_learn_from(check: Callable[..., Checked]) -> None:
    pair = {"prompt": "a?", "chosen": "yes", "rejected": "no"}
    report, dropped = check([pair, VARIED[0]], kinds=("Conversation", "Text"))
    wanted = report.findings.first["data.kind"][0].expected
    assert found(report, "data.kind") == [("train.jsonl:1", "a preference pair")]
    assert wanted == "a conversation or raw text, for this objective"
    assert report.findings.num_errors == len(dropped.rows) == 1
    assert not check([pair, VARIED[0]])[0].findings.num_errors


def test_a_code_is_counted_once_for_a_row(check: Callable[..., Checked]) -> None:
    report, _ = check([turn("浣犲ソ锛屾垜", "浣犲ソ锛屾垜鏄")])
    assert report.findings.counts["data.mojibake"] == 1


def test_labels(check: Callable[..., Checked]) -> None:
    rows = [{"prompt": f"text {n * 7919} of {n}", "completion": "good" if n % 30 else "bad"}
            for n in range(90)]  # fmt: skip
    report, _ = check([*rows, {"prompt": "the last", "completion": "Good."}])
    ((where, text),) = found(report, "data.label-imbalance")
    assert where == "train.jsonl"
    assert "'good' 87, 'bad' 3, 'Good.' 1" in text
    assert "one label spelled 'Good.' or 'good'" in text
    assert "data.few-rows" not in report.findings.counts


def test_one_prompt_or_one_answer_for_all(check: Callable[..., Checked]) -> None:
    rows = [{"prompt": "the same", "completion": s} for s in SUBJECTS]
    assert found(check(rows)[0], "data.same-prompt")
    rows = [{"prompt": s, "completion": "the same"} for s in SUBJECTS]
    assert found(check(rows)[0], "data.same-answer")


def test_common_beginnings_and_ends(check: Callable[..., Checked]) -> None:
    rows = [{"prompt": f"Q: {s} ->", "completion": f"{s[::-1]} END"} for s in SUBJECTS]
    facts = check(rows)[0].facts
    assert "all prompts start with 'Q: '" in facts
    assert "all completions end in ' END'" in facts
    rows = [{"prompt": "", "completion": f"{s} {s[::-1]}"} for s in SUBJECTS]
    assert "no prompt has text: raw text (`text`) says the same" in check(rows)[0].facts


def test_few_rows_are_said_of_answers_alone(check: Callable[..., Checked]) -> None:
    assert found(check(VARIED)[0], "data.few-rows") == [("train.jsonl", "9 samples")]
    assert not found(check([{"text": "a long document"}])[0], "data.few-rows")


def test_kept_texts_are_few_and_short(
    check: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(checker_module, "MAX_PAIRS", 8)
    monkeypatch.setattr(checker_module, "looks_swapped", kept.extend)
    check([turn(f"{n}?", f"{n}" + "x" * 5000) for n in range(100)])
    assert 4 <= len(kept) <= 8
    assert max(len(answer) for _, answer in kept) == 2 * checker_module.KEPT_CHARACTERS
    assert int(kept[-1][0][:-1]) > 80  # spread over all rows


def test_at_the_start_of_a_training() -> None:
    origin = Origin("rows.jsonl", 1)
    rows = [Completion("a?", "{{name}} is here", origin), Completion("b?", "fine", origin)]
    report = look_at_start(rows, frozenset())
    assert report.num_samples == 2
    assert list(report.findings.counts) == ["data.placeholder"]


def test_examples_are_shared_out(check: Callable[..., Checked]) -> None:
    rows = ["{broken"] * 30 + [turn("a?", "{{name}} is here")] * 30
    findings = check(rows)[0].findings
    codes = [problem.code for problem in findings.examples()]
    assert len(codes) == 20
    assert codes[0] == "data.json"
    assert codes.count("data.placeholder") == codes.count("data.duplicate") == 4
    assert findings.codes()[0] == "data.json"


def test_json_holds_everything(check: Callable[..., Checked]) -> None:
    values = check([*VARIED, "{broken"], max_length=50)[0].as_json()
    assert json.loads(json.dumps(values)) == values
    assert values["samples"] == 9
    assert values["counts"]["data.json"] == 1  # type: ignore[index, call-overload]
    assert sum(count for *_, count in values["histogram"]) == 9  # type: ignore[union-attr, misc]


def test_histogram_bars() -> None:
    assert histogram([]) == []
    assert histogram([5]) == [(5, 6, 1)]
    bars = histogram([*range(100, 200)] * 3 + [50_000, 1])
    assert sum(count for *_, count in bars) == 302
    assert bars[0][0] <= 1
    assert bars[-1][1] == 50_001
    assert 10 <= len(bars) <= 60
    assert all(one[1] == other[0] for one, other in pairwise(bars))


def test_words_for_numbers() -> None:
    assert (counted(1, "row"), counted(2000, "row")) == ("1 row", "2,000 rows")
    times = [spoken_time(seconds) for seconds in (0.2, 44, 600, 7200, 10**6)]
    assert times == ["1 second", "40 seconds", "10 minutes", "2 hours", "12 days"]
