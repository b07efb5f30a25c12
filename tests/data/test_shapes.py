"""Every row shape to its canonical sample, and every mistake to its code and place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.recipe import SourceConfig
from tunesmith.data.columns import read_samples, to_sample
from tunesmith.errors import Problem
from tunesmith.types import Completion, Conversation, Message, Origin, Sample, ToolCall

ORIGIN = Origin("mine.jsonl", 12)
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": '{"x": 1}'}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def sample_of(row: dict[str, Any], **settings: Any) -> Sample:
    sample = to_sample(row, SourceConfig(path="mine.jsonl", **settings), ORIGIN)
    assert not isinstance(sample, Problem), str(sample)
    assert sample.origin == ORIGIN
    return sample


def messages_of(row: dict[str, Any], **settings: Any) -> tuple[Message, ...]:
    sample = sample_of(row, **settings)
    assert isinstance(sample, Conversation)
    return sample.messages


def problem_of(row: dict[str, Any], **settings: Any) -> Problem:
    problem = to_sample(row, SourceConfig(path="mine.jsonl", **settings), ORIGIN)
    assert isinstance(problem, Problem)
    assert problem.where == "mine.jsonl:12"
    return problem


# OpenAI


def test_messages() -> None:
    row = {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "id": 7}
    assert sample_of(row) == Conversation(
        (Message("system", "s"), Message("user", "q"), Message("assistant", "a")), ORIGIN
    )


def test_messages_roles() -> None:
    names = ["developer", "human", "gpt", "User", "ASSISTANT", "prompter", "model", "user", "ai"]
    row = {"messages": [{"role": name, "content": name} for name in names]}
    roles = [message.role for message in messages_of(row)]
    assert roles == ["system", *["user", "assistant"] * 4]


def test_messages_weight_name_and_reasoning() -> None:
    row = {
        "messages": [
            {**USER, "name": "Ann"},
            {**ANSWER, "weight": 0, "reasoning_content": "hm"},
            {**USER, "weight": 0},
            {**ANSWER, "weight": 0.5, "reasoning": "so"},
            {**USER, "loss": False, "train": None},
            {**ANSWER, "weight": 1, "reasoning": None, "name": None},
            USER,
            {**ANSWER, "weight": None},
        ]
    }
    assert messages_of(row) == (
        Message("user", "q", name="Ann"),
        Message("assistant", "a", weight=0.0, reasoning="hm"),
        Message("user", "q"),
        Message("assistant", "a", weight=0.5, reasoning="so"),
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "q"),
        Message("assistant", "a"),
    )


def test_messages_content_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"text": "two"}]
    row = {"messages": [{**USER, "content": parts}, ANSWER]}
    assert messages_of(row)[0].content == "one two"


def test_messages_tool_calls() -> None:
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]},
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            {"role": "assistant", "tool_calls": [CALL, {"name": "g", "arguments": {"城": "京"}}]},
            {"role": "tool", "content": "r"},
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": "t", "function_call": {"name": "h"}},
            {"role": "function", "name": "h", "content": "r"},
            {"role": "assistant", "function_call": {"name": "h", "arguments": ""}},
        ],
        "tools": [TOOL, {"name": "g"}, {"name": "h"}],
    }
    sample = sample_of(row)
    assert isinstance(sample, Conversation)
    assert [message.tool_calls for message in sample.messages] == [
        (),
        (ToolCall("f", '{"x": 1}'),),
        (),
        (ToolCall("f", '{"x": 1}'), ToolCall("g", '{"城": "京"}')),
        (),
        (),
        (ToolCall("h", "{}"),),
        (),
        (ToolCall("h", "{}"),),
    ]
    contents = [message.content for message in sample.messages]
    assert contents == ["q", None, "r", None, "r", "r", "t", "r", None]
    assert sample.tools[:2] == (TOOL, {"type": "function", "function": {"name": "g"}})


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), json.dumps([TOOL["function"]])])
def test_tools_as_json_text(tools: str) -> None:
    sample = sample_of({"messages": [USER, ANSWER], "tools": tools})
    assert isinstance(sample, Conversation)
    assert sample.tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools(tools: Any) -> None:
    assert sample_of({"messages": [USER, ANSWER], "tools": tools}) == Conversation(
        (Message("user", "q"), Message("assistant", "a")), ORIGIN
    )


def test_the_older_functions() -> None:
    sample = sample_of({"messages": [USER, ANSWER], "functions": [TOOL["function"]]})
    assert isinstance(sample, Conversation)
    assert sample.tools == (TOOL,)


# ShareGPT


def test_sharegpt() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b"},
        ],
        "system": "s",
    }
    assert messages_of(row) == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "r"),
        Message("assistant", "b"),
    )


def test_sharegpt_function_calls() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "r"},
            {"from": "function_call", "value": json.dumps([call, call])},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([TOOL["function"]]),
        "system": "",
    }
    sample = sample_of(row)
    assert isinstance(sample, Conversation)
    one = ToolCall("f", '{"x": 1}')
    assert sample.messages == (
        Message("user", "q"),
        Message("assistant", None, tool_calls=(one,)),
        Message("tool", "r"),
        Message("assistant", None, tool_calls=(one, one)),
        Message("tool", "r"),
        Message("assistant", "a"),
    )
    assert sample.tools == (TOOL,)


# Alpaca


@pytest.mark.parametrize(
    ("extra", "question"), [({}, "do"), ({"input": "this"}, "do\nthis"), ({"input": ""}, "do")]
)
def test_alpaca(extra: dict[str, Any], question: str) -> None:
    assert messages_of({"instruction": "do", "output": "done", **extra}) == (
        Message("user", question),
        Message("assistant", "done"),
    )


def test_alpaca_system_and_history() -> None:
    row = {
        "instruction": "三",
        "input": "",
        "output": "3",
        "system": "数数",
        "history": [["一", "1"], ["二", "2"]],
    }
    assert [(m.role, m.content) for m in messages_of(row)] == [
        ("system", "数数"),
        ("user", "一"),
        ("assistant", "1"),
        ("user", "二"),
        ("assistant", "2"),
        ("user", "三"),
        ("assistant", "3"),
    ]


@pytest.mark.parametrize("history", [None, [], ""])
def test_alpaca_without_history(history: Any) -> None:
    row = {"instruction": "q", "output": "a", "history": history}
    assert len(messages_of(row)) == 2


def test_alpaca_input_alone() -> None:
    assert messages_of({"instruction": "", "input": "q", "output": "a"})[0].content == "q"


# Prompt and completion


@pytest.mark.parametrize("name", ["completion", "response"])
def test_completion(name: str) -> None:
    assert sample_of({"prompt": "1+1=", name: " 2"}) == Completion("1+1=", " 2", ORIGIN)


def test_completion_of_messages() -> None:
    assert sample_of({"prompt": [USER], "completion": [ANSWER]}) == Conversation(
        (Message("user", "q"), Message("assistant", "a")), ORIGIN
    )


@pytest.mark.parametrize("history", ["[[]]", {"x": "1"}, 3])
def test_alpaca_history_of_another_type_is_not_dropped(history: Any) -> None:
    problem = to_sample(
        {"instruction": "q", "output": "a", "history": history}, SourceConfig(path="d"), ORIGIN
    )
    assert isinstance(problem, Problem)


# Columns


def test_columns_are_mapped() -> None:
    row = {"question": "q", "answer": "a", "id": 1}
    columns = {"prompt": "question", "completion": "answer"}
    assert sample_of(row, columns=columns) == Completion("q", "a", ORIGIN)
    columns = {"instruction": "question", "output": "answer"}
    assert len(messages_of(row, columns=columns)) == 2


def test_a_mapped_column_goes_before_one_of_that_name() -> None:
    row = {"instruction": "old", "better": "new", "output": "a"}
    assert messages_of(row, columns={"instruction": "better"})[0].content == "new"


def test_columns_swapped() -> None:
    row = {"instruction": "the answer", "output": "the question"}
    columns = {"instruction": "output", "output": "instruction"}
    found = [message.content for message in messages_of(row, columns=columns)]
    assert found == ["the question", "the answer"]


def test_a_given_format_goes_before_the_columns() -> None:
    row = {"messages": [USER, ANSWER], "prompt": "p", "completion": "c"}
    assert isinstance(sample_of(row), Conversation)
    assert sample_of(row, format="completion") == Completion("p", "c", ORIGIN)


# Mistakes

MESSAGES_MISTAKES: list[tuple[Any, str, str]] = [
    ("hello", "data.bad-type", 'messages = "hello"'),
    (["hello"], "data.bad-type", "messages ="),
    ([], "data.no-assistant", "no messages"),
    ([USER], "data.no-assistant", "user"),
    ([{"role": "robot", "content": "x"}], "data.bad-role", 'messages[0] with role "robot"'),
    ([USER, {"content": "x"}], "data.bad-role", "messages[1] with role null"),
    ([{**USER, "content": True}, ANSWER], "data.bad-type", "messages[0].content = true"),
    ([{**USER, "content": None}, ANSWER], "data.bad-type", "messages[0].content = null"),
    ([{**USER, "content": []}, ANSWER], "data.bad-type", "messages[0].content = []"),
    ([USER, {"role": "assistant"}], "data.bad-type", "messages[1].content = null"),
    ([USER, {**ANSWER, "content": " \n"}], "data.empty-answer", "without text"),
    ([USER, ANSWER, USER, {**ANSWER, "content": ""}], "data.empty-answer", "without text"),
    ([USER, ANSWER, ANSWER], "data.role-order", "message 3, assistant, right behind assistant"),
    ([USER, USER, ANSWER], "data.role-order", "message 2, user, right behind user"),
    ([USER, {"role": "tool", "content": "r"}, ANSWER], "data.role-order", "behind user"),
    ([{"role": "tool", "content": "r"}, ANSWER], "data.role-order", "message 1, tool"),
    ([USER, {**ANSWER, "weight": 2}], "data.weight", "messages[1].weight = 2"),
    ([USER, {**ANSWER, "weight": -0.5}], "data.weight", "messages[1].weight = -0.5"),
    ([USER, {**ANSWER, "weight": "1"}], "data.weight", 'messages[1].weight = "1"'),
    ([{**USER, "weight": 1}, ANSWER], "data.weight", "on a user message"),
    ([{**USER, "loss": True}, ANSWER], "data.weight", "messages[0].loss on a user message"),
    ([USER, {**ANSWER, "reasoning": [1]}], "data.bad-type", "messages[1].reasoning = [1]"),
    ([USER, {**ANSWER, "tool_calls": [{**CALL, "arguments": [1]}]}], "data.tool-call", "[1]"),
    ([USER, {**ANSWER, "tool_calls": "f()"}], "data.bad-type", "messages[1].tool_calls"),
    ([USER, {**ANSWER, "tool_calls": [{"function": "f"}]}], "data.tool-call", "tool_calls[0]"),
    ([USER, {**ANSWER, "tool_calls": [{"function": {}}]}], "data.tool-call", "without a name"),
    ([USER, {**ANSWER, "function_call": {"name": ""}}], "data.tool-call", "without a name"),
    (
        [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{x"}]}],
        "data.tool-call",
        "arguments that are no JSON",
    ),
    (
        [{**USER, "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER],
        "data.bad-type",
        "image_url",
    ),
]


@pytest.mark.parametrize(("messages", "code", "found"), MESSAGES_MISTAKES)
def test_mistakes_in_messages(messages: Any, code: str, found: str) -> None:
    problem = problem_of({"messages": messages})
    assert problem.code == code
    assert found in problem.found
    assert problem.expected


def test_an_empty_answer_of_weight_0_is_fine() -> None:
    messages = messages_of({"messages": [USER, {**ANSWER, "content": "", "weight": 0}]})
    assert messages[1] == Message("assistant", "", weight=0.0)


@pytest.mark.parametrize(
    ("row", "code", "found"),
    [
        ({"conversations": {}}, "data.bad-type", "conversations = {}"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "data.bad-role", '"alien"'),
        ({"conversations": [{"from": "gpt"}]}, "data.bad-type", "conversations[0].value = null"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "data.no-assistant", "user"),
        (
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            "data.tool-call",
            "conversations[0]: a function_call that is no JSON",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "3"}]},
            "data.bad-type",
            "tool_calls = [3]",
        ),
        ({"conversations": [], "system": True}, "data.bad-type", "system = true"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "data.tools", "tools that is no JSON"),
        ({"messages": [USER, ANSWER], "tools": "7"}, "data.bad-type", 'tools = "7"'),
        ({"messages": [USER, ANSWER], "tools": [{"x": 1}]}, "data.tools", "without a name"),
        ({"messages": "[{'role': 'user'}]"}, "data.bad-type", "messages that is no JSON"),
        ({"messages": r'[{"role": "user", "content": "\ud83d"}]'}, "data.bad-type", "no JSON"),
        ({"messages": "[" * 5000}, "data.bad-type", "no JSON"),
        ({"messages": [USER, ANSWER], "functions": ["f"]}, "data.bad-type", "functions ="),
        ({"instruction": {}, "output": "a"}, "data.bad-type", "instruction = {}"),
        ({"instruction": "q", "output": None}, "data.bad-type", "output = null"),
        ({"instruction": "q", "output": "  "}, "data.empty-answer", "an empty output"),
        ({"instruction": "q", "input": [4], "output": "a"}, "data.bad-type", "input = [4]"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "data.history", '"x"'),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "data.history", '["x"]'),
        (
            {"instruction": "q", "output": "a", "history": [["x", None]]},
            "data.bad-type",
            "history[0][1] = null",
        ),
        ({"prompt": "q", "completion": "\n"}, "data.empty-answer", "an empty completion"),
        ({"prompt": "q", "completion": False}, "data.bad-type", "completion = false"),
        ({"prompt": None, "completion": "a"}, "data.bad-type", "prompt = null"),
        ({"prompt": [USER], "completion": "a"}, "data.bad-type", "prompt ="),
        ({"prompt": [USER], "completion": [USER]}, "data.no-assistant", "user, user"),
        ({"question": "q", "answer": " "}, "data.empty-answer", "an empty answer"),
        ({"question": None, "answer": "a"}, "data.bad-type", "question = null"),
        ({"instruction": float("nan"), "output": "a"}, "data.bad-type", "instruction = NaN"),
        ({"text": " \n"}, "data.empty-text", "an empty text"),
        ({"text": None}, "data.bad-type", "text = null"),
        ({"q1": "q", "a1": "a"}, "data.columns", "columns q1, a1"),
        ({}, "data.columns", "columns (none)"),
    ],
)
def test_mistakes_in_other_shapes(row: dict[str, Any], code: str, found: str) -> None:
    problem = problem_of(row)
    assert problem.code == code
    assert found in problem.found
    assert problem.expected


@pytest.mark.parametrize(
    ("format_", "column"),
    [
        ("messages", "messages"),
        ("sharegpt", "conversations"),
        ("alpaca", "instruction"),
        ("completion", "prompt"),
    ],
)
def test_a_format_without_its_columns(format_: str, column: str) -> None:
    problem = problem_of({"x": 1}, format=format_)
    assert problem.code == "data.columns"
    assert problem.expected == f"`{column}` for format {format_}"


def test_unknown_columns_name_all_shapes_and_the_way_out() -> None:
    expected = problem_of({"question": "q"}).expected
    for name in ("messages", "conversations", "instruction + output", "prompt + completion"):
        assert name in expected
    assert "columns: {prompt: question" in expected


def test_numbers_are_their_digits() -> None:
    row = {"instruction": 3, "input": 1.5, "output": 7, "history": [["x", 1]], "system": 0}
    found = [message.content for message in messages_of(row)]
    assert found == ["0", "x", "1", "3\n1.5", "7"]
    assert sample_of({"prompt": 2, "completion": 10**18}) == Completion(
        "2", "1000000000000000000", ORIGIN
    )


def test_long_values_are_shortened() -> None:
    problem = problem_of({"messages": "x" * 500})
    assert len(problem.found) < 90
    assert problem.found.endswith("...")


def test_answers_in_history_may_be_silent_only_by_weight() -> None:
    problem = problem_of({"instruction": "q", "output": "a", "history": [["x", ""]]})
    assert problem.code == "data.empty-answer"


# Files


def test_samples_of_a_file_in_order(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"prompt": "a", "completion": "b"}, {"x": 1}, 3, {"messages": [ANSWER]}])
    found = list(read_samples(SourceConfig(path="d"), [path]))
    assert [type(item).__name__ for item in found] == [
        "Completion",
        "Problem",
        "Problem",
        "Conversation",
    ]
    places = [str(getattr(item, "origin", None) or getattr(item, "where", "")) for item in found]
    assert places == [f"{path}:{line}" for line in range(1, 5)]


def test_a_limit_counts_over_files(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    first = write_jsonl([{"prompt": "a", "completion": "b"}])
    second = tmp_path / "second.jsonl"
    second.write_text('{"text": "c"}\n{"text": "d"}\nbroken\n', encoding="utf-8")
    found = list(read_samples(SourceConfig(path="d", limit=2), [first, second]))
    assert [type(item).__name__ for item in found] == ["Completion", "Text"]


def test_limit(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"prompt": str(n), "completion": "b"} for n in range(5)])
    found = list(read_samples(SourceConfig(path="d", limit=2), [path]))
    assert [str(item.origin) for item in found if not isinstance(item, Problem)] == [
        f"{path}:1",
        f"{path}:2",
    ]


def test_encoding(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"prompt": "问", "completion": "答"}\n'.encode("gb18030"))
    (sample,) = read_samples(SourceConfig(path="d", encoding="gb18030"), [path])
    assert sample == Completion("问", "答", Origin(str(path), 1))
