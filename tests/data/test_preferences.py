"""Preference pairs in every spelling, and KTO's rated answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.config.recipe import SourceConfig
from tunesmith.data.columns import RowParser
from tunesmith.data.readers import Row
from tunesmith.errors import Problem
from tunesmith.types import Conversation, Message, Origin, Preference, Rated, Sample

ORIGIN = Origin("mine.jsonl", 4)
SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
GPT_GOOD = {"from": "gpt", "value": "good"}
GPT_BAD = {"from": "gpt", "value": "bad"}
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
ASKED = (Message("user", "q"),)
BETTER, WORSE = (Message("assistant", "good"),), (Message("assistant", "bad"),)
PAIR = Preference(ASKED, BETTER, WORSE, ORIGIN)


def parse(row: dict[str, Any], **settings: Any) -> Sample | Problem:
    return RowParser(SourceConfig(path="mine.jsonl", **settings)).parse(Row(ORIGIN, row))


def problem_of(row: dict[str, Any], **settings: Any) -> Problem:
    problem = parse(row, **settings)
    assert isinstance(problem, Problem), str(problem)
    return problem


# Preference pairs

SPELLINGS: list[dict[str, Any]] = [
    # TRL: explicit prompt, as text and as messages
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    # TRL: implicit prompt
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
    # the prompt both in a column and in the sides
    {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {
        "prompt": "q",
        "messages": [USER, GOOD],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "score_chosen": 8.0,
    },
    # LLaMA-Factory: ranking of Alpaca and of ShareGPT
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": GPT_GOOD,
        "rejected": GPT_BAD,
    },
    {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    # OpenAI
    {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    {
        "input": json.dumps({"messages": [USER]}),
        "preferred_output": json.dumps([GOOD]),
        "non_preferred_output": json.dumps([BAD]),
    },
    # other names
    {"question": "q", "chosen": "good", "rejected": "bad"},
    {"问题": "q", "优选": "good", "拒绝": "bad"},
    {"Prompt": "q", "Chosen": "good", "Rejected": "bad"},
    {"input": "q", "chosen": "good", "rejected": "bad"},
    {"query": "q", "chosen_response": "good", "rejected_response": "bad"},
    {"messages": [USER], "response_chosen": "good", "response_rejected": "bad"},
    # texts with the speakers in them
    {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
    {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"},
]


@pytest.mark.parametrize("row", SPELLINGS)
def test_spellings(row: dict[str, Any]) -> None:
    assert parse(row) == PAIR


@pytest.mark.parametrize(
    "row",
    [
        {"system": "s", "prompt": "q", "chosen": "good", "rejected": "bad"},
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        {"system": "s", "instruction": "q", "chosen": "good", "rejected": "bad"},
        {"system": "s", "messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"system": "s", "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [SYSTEM], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    ],
)
def test_a_system_message(row: dict[str, Any]) -> None:
    system = Message("system", "s")
    assert parse(row) == Preference((system, *ASKED), BETTER, WORSE, ORIGIN)


def test_several_turns() -> None:
    turns = (Message("user", "r"), Message("assistant", "b"), *ASKED)
    before = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    expected = Preference(turns, BETTER, WORSE, ORIGIN)
    rows = [
        {"prompt": [*before, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*before, USER, GOOD], "rejected": [*before, USER, BAD]},
        {"prompt": before, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "history": [["r", "b"]], "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "history": [["r", "b"]], "chosen": "good", "rejected": "bad"},
        {
            "chosen": "\n\nHuman: r\n\nAssistant: b\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: r\n\nAssistant: b\n\nHuman: q\n\nAssistant: bad",
        },
    ]
    for row in rows:
        assert parse(row) == expected


def test_sides_that_part_before_the_last_answer() -> None:
    later = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    sample = parse({"chosen": [USER, GOOD, *later], "rejected": [USER, BAD, *later]})
    assert isinstance(sample, Preference)
    assert [len(part) for part in (sample.prompt, sample.chosen, sample.rejected)] == [1, 3, 3]


def test_tools() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    sides = {"preferred_output": [CALL], "non_preferred_output": [BAD]}
    sample = parse({"input": {"messages": [USER], "tools": [tool]}, **sides})
    assert isinstance(sample, Preference)
    assert sample.tools == (tool,)
    other = {"type": "function", "function": {"name": "g"}}
    problem = problem_of({"input": {"messages": [USER], "tools": [other]}, **sides})
    assert problem.code == "data.unknown-tool"


def test_a_format_may_be_forced() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "completion": "c"}
    assert parse(row, format="preference") == PAIR
    mapped = {"frage": "q", "a": "good", "b": "bad"}
    columns = {"prompt": "frage", "chosen": "a", "rejected": "b"}
    assert parse(mapped, columns=columns) == PAIR


def test_tags_in_sides() -> None:
    row = {
        "conversations": [{"speaker": "Q", "says": "q"}],
        "chosen": {"speaker": "A", "says": "good"},
        "rejected": [{"speaker": "A", "says": "bad"}],
    }
    tags = {"role": "speaker", "content": "says", "user": "Q", "assistant": "A"}
    assert parse(row, tags=tags) == PAIR


@pytest.mark.parametrize(
    ("row", "code", "found"),
    [
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "data.preference", "equal"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "data.preference", "equal"),
        ({"chosen": "good", "rejected": "bad"}, "data.preference", "no prompt"),
        ({"prompt": "", "chosen": "good", "rejected": "bad"}, "data.preference", "no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "data.preference", "no prompt"),
        ({"prompt": "q", "chosen": " ", "rejected": "bad"}, "data.empty-answer", "without text"),
        ({"prompt": "q", "chosen": "x", "rejected": None}, "data.bad-type", "rejected = null"),
        ({"prompt": "q", "chosen": [USER], "rejected": [BAD]}, "data.preference", "a chosen side"),
        ({"prompt": "q", "chosen": "x", "rejected": []}, "data.preference", "a rejected side"),
        (
            {"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]},
            "data.role-order",
            "message 3, assistant",
        ),
        (
            {"input": "q", "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "data.bad-type",
            'input = "q"',
        ),
    ],
)
def test_mistakes_in_pairs(row: dict[str, Any], code: str, found: str) -> None:
    problem = problem_of(row)
    assert problem.code == code
    assert found in problem.found
    assert problem.expected


# Ratings

YES = [True, 1, 1.0, "true", "TRUE", "1", "yes", "good", "desirable", "是", "好"]
NO = [False, 0, 0.0, "false", "False", "0", "-1", "no", "bad", "undesirable", "否", "差"]


@pytest.mark.parametrize(
    ("label", "is_good"), [*((y, True) for y in YES), *((n, False) for n in NO)]
)
def test_labels(label: Any, is_good: bool) -> None:
    sample = parse({"prompt": "q", "completion": "good", "label": label})
    assert sample == Rated(Conversation((*ASKED, *BETTER), ORIGIN), is_good)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "good"},
        {"prompt": "q", "response": "good"},
        {"query": "q", "response": "good"},
        {"prompt": [USER], "completion": [GOOD]},
        {"instruction": "q", "input": "", "output": "good"},
        {"instruction": "", "input": "q", "response": "good"},
        {"input": "q", "output": "good"},
        {"指令": "q", "输出": "good"},
        {"messages": [USER, GOOD]},
        {"conversations": [{"from": "human", "value": "q"}, GPT_GOOD]},
        {"messages": json.dumps([USER, GOOD])},
    ],
)
@pytest.mark.parametrize("name", ["label", "kto_tag", "Label"])
def test_spellings_of_ratings(row: dict[str, Any], name: str) -> None:
    expected = Rated(Conversation((*ASKED, *BETTER), ORIGIN), True)
    assert parse({**row, name: True}) == expected
    assert parse({**row, name: True}, format="kto") == expected
    assert expected.origin == ORIGIN


def test_a_rating_with_a_system_message() -> None:
    messages = (Message("system", "s"), *ASKED, *BETTER)
    expected = Rated(Conversation(messages, ORIGIN), False)
    assert parse({"messages": [USER, GOOD], "system": "s", "label": False}) == expected
    row = {"prompt": "q", "completion": "good", "system": "s", "label": False}
    assert parse(row) == expected


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "q", "completion": "a", "label": "maybe"}, "data.label"),
        ({"prompt": "q", "completion": "a", "label": None}, "data.label"),
        ({"prompt": "q", "completion": " ", "label": 1}, "data.empty-answer"),
        ({"completion": "a", "label": 1}, "data.columns"),
        ({"prompt": "q", "label": 1}, "data.columns"),
        ({"prompt": "q", "completion": "a"}, "data.columns"),
        ({"messages": [USER, GOOD, USER], "label": 1}, "data.no-assistant"),
        ({"messages": [USER], "label": 1}, "data.no-assistant"),
    ],
)
def test_mistakes_in_ratings(row: dict[str, Any], code: str) -> None:
    assert problem_of(row, format="kto").code == code
