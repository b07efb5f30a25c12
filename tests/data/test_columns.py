"""Columns under all their names, tables whose cells are JSON, mappings, tags, places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl import Workbook

from tunesmith.config.recipe import SourceConfig
from tunesmith.data.columns import RowParser, read_samples
from tunesmith.data.readers import Row
from tunesmith.data.shapes import SHAPES
from tunesmith.data.shapes.known import ALIASES
from tunesmith.errors import Problem
from tunesmith.types import (
    Completion,
    Conversation,
    Message,
    Origin,
    Rated,
    Sample,
    Text,
    ToolCall,
)

ORIGIN = Origin("mine.csv", 4)
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
QUESTION_AND_ANSWER = (Message("user", "q"), Message("assistant", "a"))


def parse(row: dict[str, Any], **settings: Any) -> Sample | Problem:
    return RowParser(SourceConfig(path="mine.csv", **settings)).parse(Row(ORIGIN, row))


def messages_of(row: dict[str, Any], **settings: Any) -> tuple[Message, ...]:
    sample = parse(row, **settings)
    assert isinstance(sample, Conversation), str(sample)
    return sample.messages


def said(row: dict[str, Any], **settings: Any) -> list[str | None]:
    return [message.content for message in messages_of(row, **settings)]


def problem_of(row: dict[str, Any], **settings: Any) -> Problem:
    problem = parse(row, **settings)
    assert isinstance(problem, Problem), str(problem)
    return problem


# Names

NAMES: list[tuple[dict[str, Any], list[str]]] = [
    ({"question": "q", "answer": "a"}, ["q", "a"]),
    ({"问题": "q", "回答": "a"}, ["q", "a"]),
    ({"问题": "q", "答案": "a", "背景": "b"}, ["b\n\nq", "a"]),
    ({"问": "q", "答": "a"}, ["q", "a"]),
    ({"提问": "q", "答复": "a", "资料": "b"}, ["b\n\nq", "a"]),
    ({"Q": "q", "A": "a"}, ["q", "a"]),
    ({"Question": "q", " Answer ": "a", "CONTEXT": "b"}, ["b\n\nq", "a"]),
    ({"title": "q", "reply": "a", "is_best": 1}, ["q", "a"]),
    ({"question": "q", "response": "a"}, ["q", "a"]),
    ({"指令": "i", "输入": "j", "输出": "o"}, ["i\nj", "o"]),
    ({"指令": "i", "输出": "o", "系统": "s"}, ["s", "i", "o"]),
    ({"instruction": "i", "response": "o", "context": "j", "category": "qa"}, ["i\nj", "o"]),
    ({"INSTRUCTION": "i", "Input": "j", "Output": "o"}, ["i\nj", "o"]),
    ({"Instruction": "i", "回答": "o", "System Prompt": "s"}, ["s", "i", "o"]),
    ({"instruction": "i", "output": "o", "system-prompt": "s"}, ["s", "i", "o"]),
    ({"query": "q", "response": "a", "history": [["x", "y"]]}, ["x", "y", "q", "a"]),
    ({"对话": [USER, ANSWER]}, ["q", "a"]),
    ({"Messages": [USER, ANSWER]}, ["q", "a"]),
    ({"conversation": [USER, ANSWER]}, ["q", "a"]),
    ({"messages": [USER, ANSWER], "system": "s"}, ["s", "q", "a"]),
]


@pytest.mark.parametrize(("row", "expected"), NAMES)
def test_names_of_conversations(row: dict[str, Any], expected: list[str]) -> None:
    assert said(row) == expected


@pytest.mark.parametrize(
    "columns",
    [
        ("prompt", "completion"),
        ("prompt", "response"),
        ("Prompt", "Target"),
        ("query", "response"),
        ("提示", "生成"),
        ("提示词", "completion"),
        ("input", "output"),
        ("输入", "输出"),
    ],
)
def test_names_of_completions(columns: tuple[str, str]) -> None:
    assert parse(dict(zip(columns, "ab", strict=True))) == Completion("a", "b", ORIGIN)


@pytest.mark.parametrize("column", ["text", "Text", " TEXT", "content", "正文", "文本", "内容"])
def test_names_of_raw_text(column: str) -> None:
    assert parse({column: "words", "id": 3, "url": "x"}) == Text("words", ORIGIN)


def test_all_names_are_in_their_plain_spelling() -> None:
    from tunesmith.data.shapes.known import plain_name

    known = {name for shape in SHAPES.values() for name in shape.columns}
    assert set(ALIASES) <= known
    for name in [*known, *(other for others in ALIASES.values() for other in others)]:
        assert plain_name(name) == name


@pytest.mark.parametrize(
    "name", ["reasoning", "reasoning_content", "thinking", "CoT", "Complex_CoT", "思考", "推理"]
)
def test_reasoning_columns(name: str) -> None:
    answer = Message("assistant", "a", reasoning="hm")
    for columns in (("question", "answer"), ("instruction", "output"), ("prompt", "completion")):
        row = {**dict(zip(columns, "qa", strict=True)), name: "hm"}
        assert messages_of(row) == (Message("user", "q"), answer)
    empty = {"Question": "q", "Response": "a", name: ""}
    assert messages_of(empty) == QUESTION_AND_ANSWER


def test_reasoning_beside_an_input_and_content() -> None:
    row = {"input": "q", "reasoning_content": "hm", "content": "a", "score": 9}
    answer = Message("assistant", "a", reasoning="hm")
    assert messages_of(row) == (Message("user", "q"), answer)


def test_a_text_put_together_is_the_last_choice() -> None:
    row = {"instruction": "i", "response": "o", "text": "### Instruction: i ### Response: o"}
    assert said(row) == ["i", "o"]
    assert parse(row, format="text") == Text(row["text"], ORIGIN)


def test_a_dialogue_that_is_one_text_is_no_list_of_messages() -> None:
    problem = problem_of({"dialogue": "Ann: hi", "summary": "Ann says hi"})
    assert problem.code == "data.columns"
    assert problem_of({"messages": "Ann: hi"}).code == "data.bad-type"


def test_the_exact_name_goes_before_another_spelling() -> None:
    assert said({"Question": "old", "question": "q", "answer": "a"}) == ["q", "a"]
    assert said({"question": "q", "Question": "old", "answer": "a"}) == ["q", "a"]


def test_rows_of_a_table_come_to_one_kind_even_if_cells_are_empty() -> None:
    assert said({"prompt": "q", "completion": "a", "system": ""}) == ["q", "a"]
    assert said({"prompt": "q", "completion": "a", "history": None}) == ["q", "a"]
    sample = parse({"prompt": "q", "completion": "a", "tools": '[{"name": "f"}]'})
    assert isinstance(sample, Conversation)
    assert sample.tools == ({"type": "function", "function": {"name": "f"}},)


# Tables: cells that are the JSON of something


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_in_a_cell(column: str) -> None:
    chat = [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {}}]}]
    row = {column: json.dumps(chat), "tools": json.dumps([{"name": "f"}])}
    assert messages_of(row)[1] == Message("assistant", "a", (ToolCall("f", "{}"),))
    assert problem_of({**row, "tools": '[{"name": "g"}]'}).code == "data.unknown-tool"


def test_history_in_a_cell() -> None:
    row = {"instruction": "q", "output": "a", "history": '[["x", "y"]]'}
    assert said(row) == ["x", "y", "q", "a"]
    assert said({**row, "history": ""}) == ["q", "a"]
    assert problem_of({**row, "history": "none"}).code == "data.history"


def test_prompt_and_completion_in_cells() -> None:
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert messages_of(row) == QUESTION_AND_ANSWER


@pytest.mark.parametrize("answer", ['[{"name": "Bob"}]', '{"a": 1}', "[1, 2]", "[x](y)", "[]"])
def test_an_answer_that_is_json_stays_text(answer: str) -> None:
    assert parse({"prompt": "q", "completion": answer}) == Completion("q", answer, ORIGIN)
    assert said({"question": "[{", "answer": answer}) == ["[{", answer]


def test_null_filled_structs() -> None:
    """Tables give each message all the fields that any message of the file has."""
    fields = "role from content value name weight tool_calls function_call tool_call_id"
    empty = dict.fromkeys([*fields.split(), "reasoning_content", "reasoning"])
    call = {"id": None, "type": None, "function": None, "name": "f", "arguments": None}
    chat = [
        {**empty, "role": "user", "content": [{"type": None, "text": "q", "image": None}]},
        {**empty, "from": "gpt", "value": "a", "reasoning": "hm", "tool_calls": [call]},
        {**empty, "role": "tool", "value": "r"},
        {**empty, "role": "assistant", "content": "b", "tool_calls": []},
    ]
    assert messages_of({"messages": chat, "tools": None}) == (
        Message("user", "q"),
        Message("assistant", "a", (ToolCall("f", "{}"),), reasoning="hm"),
        Message("tool", "r"),
        Message("assistant", "b"),
    )


# Llama-Chinese

TWO_TURNS = (
    Message("user", "q"),
    Message("assistant", "a"),
    Message("user", "r\ns"),
    Message("assistant", "b"),
)


@pytest.mark.parametrize(
    "text",
    [
        "<s>Human: q\n</s><s>Assistant: a\n</s><s>Human: r\ns\n</s><s>Assistant: b\n</s>",
        "<s>Human: q</s><s>Assistant: a</s><s>Human: r\ns</s><s>Assistant: b</s>",
        "<s>Human：q\n</s><s>Assistant：a\n</s><s>Human：r\ns\n</s><s>Assistant：b\n</s>",
        " <s> Human: q\n</s>\n<s>Assistant: a\n</s>\n<s>Human: r\ns\n</s>\n<s>Assistant: b\n</s>\n",
    ],
)
def test_llama_chinese(text: str) -> None:
    assert messages_of({"text": text}) == TWO_TURNS
    assert messages_of({"text": text}, format="llama-chinese") == TWO_TURNS


def test_llama_chinese_system() -> None:
    text = "<s>System: s\n</s><s>Human: q\n</s><s>Assistant: a\n</s>"
    assert messages_of({"text": text}) == (Message("system", "s"), *QUESTION_AND_ANSWER)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("<s>Human: q\n</s><s>Assistant: a\n", "data.llama-chinese"),
        ("<s>Human: q\n</s> and <s>Assistant: a\n</s>", "data.llama-chinese"),
        ("<s>Human: q", "data.llama-chinese"),
        ("<s>Human: q\n</s>", "data.no-assistant"),
        ("<s>Human: q\n</s><s>Assistant: \n</s>", "data.empty-answer"),
        ("<s>Human: q\n</s><s>Human: r\n</s><s>Assistant: a\n</s>", "data.role-order"),
    ],
)
def test_broken_llama_chinese(text: str, code: str) -> None:
    assert problem_of({"text": text}).code == code


def test_plain_text_is_no_llama_chinese_unless_it_is_said_to_be() -> None:
    assert parse({"text": "Human: q"}) == Text("Human: q", ORIGIN)
    assert problem_of({"text": "Human: q"}, format="llama-chinese").code == "data.llama-chinese"


# Words of other tools


def test_loss_and_train_are_weights() -> None:
    chat = [
        *(USER, {**ANSWER, "loss": False}),
        *(USER, {**ANSWER, "loss": True}),
        *({**USER, "train": False}, {**ANSWER, "train": False}),
        *(USER, {**ANSWER, "train": True}),
        *(USER, {**ANSWER, "loss": 0.5}),
    ]
    answers = [m.weight for m in messages_of({"messages": chat}) if m.role == "assistant"]
    assert answers == [0.0, 1.0, 0.0, 1.0, 0.5]


def test_tool_turns_of_one_call_each_are_one_message() -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
    result = {"role": "tool_response", "content": "r"}
    chat = [USER, call, call, result, result, ANSWER, call, result, ANSWER]
    one = ToolCall("f", '{"x": 1}')
    assert messages_of({"messages": chat}) == (
        Message("user", "q"),
        Message("assistant", None, (one, one)),
        Message("tool", "r"),
        Message("tool", "r"),
        Message("assistant", "a", (one,)),
        Message("tool", "r"),
        Message("assistant", "a"),
    )


def test_content_blocks() -> None:
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {"城": "京"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "r"}
    parts = {**result, "content": [{"type": "text", "text": "r"}]}
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "a"}, call, call]},
        {"role": "user", "content": [result, parts]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, call]},
        {"role": "user", "content": [{**result, "content": None}, {"type": "text", "text": "s"}]},
        {"role": "assistant", "content": "b"},
    ]
    schema = {"type": "object", "properties": {}}
    tools = [{"name": "f", "description": "d", "input_schema": schema}]
    sample = parse({"messages": chat, "tools": tools, "system": "be brief"})
    assert isinstance(sample, Conversation), str(sample)
    one = ToolCall("f", '{"城": "京"}')
    assert sample.messages == (
        Message("system", "be brief"),
        Message("user", "q"),
        Message("assistant", "a", (one, one), reasoning="hm"),
        Message("tool", "r"),
        Message("tool", "r"),
        Message("assistant", None, (one,)),
        Message("tool", ""),
        Message("user", "s"),
        Message("assistant", "b"),
    )
    function = {"name": "f", "description": "d", "parameters": schema}
    assert sample.tools == ({"type": "function", "function": function},)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ([{"type": "tool_use", "input": {}}], "data.tool-call"),
        ([{"type": "tool_use", "name": "f", "input": "x"}], "data.tool-call"),
        ([{"type": "tool_use", "name": "f"}, {"type": "tool_result"}], "data.tool-call"),
        ([{"type": "thinking"}], "data.bad-type"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "image"}], "data.bad-type"),
    ],
)
def test_mistakes_in_content_blocks(content: Any, code: str) -> None:
    assert problem_of({"messages": [USER, {**ANSWER, "content": content}]}).code == code


def test_a_system_column_that_the_messages_repeat() -> None:
    system = {"role": "system", "content": "s"}
    assert said({"messages": [system, USER, ANSWER], "system": "s"}) == ["s", "q", "a"]
    problem = problem_of({"messages": [system, USER, ANSWER], "system": "other"})
    assert problem.code == "data.role-order"


# Labels


@pytest.mark.parametrize("label", ["positive", 3, None, "", [1]])
def test_a_label_that_is_no_yes_or_no_makes_no_rating(label: Any) -> None:
    row = {"prompt": "q", "completion": "a", "label": label}
    assert parse(row) == Completion("q", "a", ORIGIN)


def test_a_label_beside_a_text_alone_makes_no_rating() -> None:
    assert parse({"text": "words", "label": 1}) == Text("words", ORIGIN)
    assert parse({"content": "words", "label": 1}) == Text("words", ORIGIN)


def test_labels_are_looked_at_row_by_row() -> None:
    parser = RowParser(SourceConfig(path="mine.csv"))
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "completion": "a", "label": label} for label in ("", "1", "0")
    ]
    found = [parser.parse(Row(ORIGIN, row)) for row in rows]
    assert [type(sample) for sample in found] == [Completion, Rated, Rated]


# Mappings


def test_columns_are_mapped() -> None:
    row = {"frage": "q", "antwort": "a", "rolle": "s", "thema": "b"}
    columns = {"question": "frage", "answer": "antwort", "context": "thema", "system": "rolle"}
    assert said(row, columns=columns) == ["s", "b\n\nq", "a"]


def test_mapped_names_may_be_swapped() -> None:
    columns = {"question": "answer", "answer": "question"}
    assert said({"question": "a", "answer": "q"}, columns=columns) == ["q", "a"]


def test_a_mapping_decides_the_shape() -> None:
    row = {"prompt": "p", "completion": "c", "body": "words"}
    assert parse(row, columns={"text": "body"}) == Text("words", ORIGIN)
    columns = {"instruction": "prompt", "output": "completion"}
    assert said(row, columns=columns) == ["p", "c"]


def test_a_misspelled_column_is_guessed() -> None:
    expected = problem_of({"Promt": "q", "completion": "a"}).expected
    assert expected.endswith("e.g. columns: {prompt: Promt}")
    assert problem_of({"x": "q"}).expected.endswith(
        "columns: {prompt: question, completion: answer}"
    )


def test_token_ids_are_no_text() -> None:
    problem = problem_of({"input_ids": [1, 2], "labels": [1, 2]})
    assert (problem.code, problem.found) == ("data.columns", "columns input_ids, labels")
    assert problem.expected.startswith("texts: token ids")


@pytest.mark.parametrize("format_", ["auto", "alpaca"])
def test_a_mapped_name_that_no_shape_has(format_: str) -> None:
    row = {"instruction": "q", "output": "a", "x": 1}
    problem = problem_of(row, columns={"instuction": "x"}, format=format_)
    assert problem.code == "data.columns"
    assert "`instuction`" in problem.found
    assert problem.expected.startswith("`instruction`, or one of:")


def test_a_mapped_column_that_the_format_does_not_have() -> None:
    row = {"prompt": "q", "completion": "a", "x": 1}
    problem = problem_of(row, columns={"instruction": "x"}, format="completion")
    assert "of completion" in problem.found
    problem = problem_of(row, columns={"instruction": "x", "label": "x", "text": "x"})
    assert "instruction, label, text are mapped" in problem.found


@pytest.mark.parametrize("format_", ["auto", "qa"])
def test_a_mapped_column_that_the_file_does_not_have(format_: str) -> None:
    row = {"frage": "q", "answer": "a"}
    problem = problem_of(row, columns={"question": "fragen"}, format=format_)
    assert problem.code == "data.columns"
    assert "`fragen`" in problem.expected


def test_a_mapped_column_that_some_rows_lack(write_jsonl: Callable[..., Path]) -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "persona": "s"}]
    source = SourceConfig(path="mine", columns={"system": "persona"})
    found = list(read_samples(source, [write_jsonl(rows)]))
    assert [len(s.messages) for s in found if isinstance(s, Conversation)] == [2, 3]
    missing = SourceConfig(path="mine", columns={"system": "person"})
    *samples, problem = read_samples(missing, [write_jsonl(rows)])
    assert len(samples) == 2
    assert isinstance(problem, Problem)
    expected = "mine: data.columns: found no row with a column `person`; expected the column"
    assert str(problem).startswith(expected)


@pytest.mark.parametrize(
    ("format_", "row"),
    [
        ("messages", {"conversations": [USER, ANSWER]}),
        ("sharegpt", {"messages": [USER, ANSWER]}),
        ("alpaca", {"指令": "q", "回答": "a"}),
        ("qa", {"question": "q", "answer": "a", "messages": []}),
    ],
)
def test_a_format_may_be_forced(format_: str, row: dict[str, Any]) -> None:
    assert messages_of(row, format=format_) == QUESTION_AND_ANSWER


# Tags

SPEAKER = {"role": "speaker", "content": "says", "user": "Q", "assistant": "A"}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("as_cell", [False, True])
def test_tags(column: str, as_cell: bool) -> None:
    chat = [{"speaker": "Q", "says": "q"}, {"speaker": "A", "says": "a"}]
    row = {column: json.dumps(chat) if as_cell else chat}
    assert messages_of(row, tags=SPEAKER) == QUESTION_AND_ANSWER


def test_tags_of_roles_alone() -> None:
    chat = [
        {"from": "S", "value": "s"},
        {"from": "Q", "value": "q"},
        {"from": "F", "value": '{"name": "f"}'},
        {"from": "O", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    tags = {"system": "S", "user": "Q", "function": "F", "observation": "O"}
    assert messages_of({"conversations": chat}, tags=tags) == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", None, (ToolCall("f", "{}"),)),
        Message("tool", "r"),
        Message("assistant", "a"),
    )


def test_tags_in_prompt_and_completion() -> None:
    row = {
        "prompt": [{"speaker": "Q", "says": "q"}],
        "completion": [{"speaker": "A", "says": "a"}],
    }
    assert messages_of(row, tags=SPEAKER) == QUESTION_AND_ANSWER


def test_tags_that_name_nothing() -> None:
    problem = problem_of({"messages": [USER, ANSWER]}, tags={"asistant": "A"})
    assert problem.code == "data.tags"
    assert problem.expected.startswith("`assistant`, or one of: role, content,")
    assert problem_of({"messages": []}, tags={"xyz": "A"}).expected.startswith("one of:")


def test_tagged_messages_that_are_no_list() -> None:
    assert problem_of({"messages": "hello"}, tags=SPEAKER).code == "data.bad-type"


# Places


@pytest.mark.parametrize(
    ("row", "cell"),
    [
        ({"问题": "q", "回答": " "}, "D"),
        ({"问题": None, "回答": "a"}, "B"),
        ({"问题": "q", "回答": "a", "历史": "x"}, "E"),
        ({"x": "q"}, "A"),
    ],
)
def test_cells_of_a_workbook(row: dict[str, Any], cell: str) -> None:
    origin = Origin("book.xlsx", 7, "Sheet1")
    cells = {"问题": "B", "回答": "D", "历史": "E"}
    problem = RowParser(SourceConfig(path="book.xlsx")).parse(Row(origin, row, cells))
    assert isinstance(problem, Problem)
    assert problem.where == f"book.xlsx:Sheet1!{cell}7"


def test_mistakes_in_messages_are_in_the_cell_of_the_messages() -> None:
    origin = Origin("book.xlsx", 7, "Sheet1")
    for chat in ('[{"role": "x"}]', '[{"role": "user"}]', '[{"role": "gpt", "tool_calls": [{}]}]'):
        row = Row(origin, {"id": "1", "messages": chat}, {"id": "A", "messages": "C"})
        problem = RowParser(SourceConfig(path="book.xlsx")).parse(row)
        assert isinstance(problem, Problem)
        assert problem.where == "book.xlsx:Sheet1!C7"


def test_rows_with_the_same_columns_are_recognized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = RowParser(SourceConfig(path="mine.csv"))
    assert isinstance(parser.parse(Row(ORIGIN, {"question": "q", "answer": "a"})), Conversation)
    monkeypatch.setattr("tunesmith.data.columns.shape_of", None)
    assert isinstance(parser.parse(Row(ORIGIN, {"question": "r", "answer": "b"})), Conversation)


# Any row at all

NAME = st.sampled_from(
    sorted({name for shape in SHAPES.values() for name in shape.columns} | {"x", "kto_tag", "问题"})
)
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
)
ROLES = ("user", "assistant", "system", "tool", "gpt", "function_call", "tool_call")
BLOCKS = ("text", "tool_use", "tool_result", "thinking")
WORD = st.sampled_from([*ROLES, *BLOCKS, "f", "[", "{", "[{", "[]", "{}", "1", "<s>Human:"])
FIELDS = ("role", "from", "content", "value", "weight", "loss", "tool_calls", "function_call")
FIELDS_WITHIN = ("function", "name", "arguments", "type", "text", "thinking", "input", "messages")
FIELD = st.sampled_from([*FIELDS, *FIELDS_WITHIN])
VALUE = st.recursive(
    SCALAR | WORD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD, inner, max_size=4),
    max_leaves=12,
)
CELL = VALUE | VALUE.map(lambda value: json.dumps(value, ensure_ascii=False))
FORMATS = st.sampled_from(["auto", *SHAPES])


@given(st.dictionaries(NAME, CELL, min_size=1, max_size=4), FORMATS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_row_is_a_sample_or_a_problem(
    row: dict[str, Any], format_: str, has_tags: bool
) -> None:
    found = parse(row, format=format_, tags=SPEAKER if has_tags else {})
    if isinstance(found, Problem):
        assert found.where == str(ORIGIN)
        assert found.code.startswith("data.")
        assert found.found
        assert found.expected
    else:
        assert found.origin == ORIGIN


@given(st.lists(st.fixed_dictionaries({"role": WORD, "content": CELL}), min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_messages_are_a_conversation_or_a_problem(chat: list[Any]) -> None:
    found = parse({"messages": chat})
    assert isinstance(found, Conversation | Problem)
    if isinstance(found, Conversation):
        assert any(message.role == "assistant" for message in found.messages)
    assert parse({"messages": json.dumps(chat)}) == found


# One conversation in all shapes

ONE: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": [USER, ANSWER]}),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}),
    ("qa", {"question": "q", "answer": "a", "context": ""}),
    ("completion", {"prompt": "q", "completion": "a", "system": ""}),
    ("completion", {"prompt": [USER], "completion": [ANSWER]}),
    ("llama-chinese", {"text": "<s>Human: q\n</s><s>Assistant: a\n</s>"}),
]


@pytest.mark.parametrize(("format_", "row"), ONE)
def test_one_conversation_in_all_shapes(format_: str, row: dict[str, Any]) -> None:
    expected = Conversation(QUESTION_AND_ANSWER, ORIGIN)
    assert parse(row) == expected
    assert parse(row, format=format_) == expected


# Tables on disk


def test_messages_in_a_parquet_table(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "assistant", "content": "a", "weight": 0.5, "reasoning_content": "hm"},
    ]
    rows = [{"messages": chat, "tools": None}, {"messages": chat[:2] + chat[4:], "tools": "[]"}]
    path = tmp_path / "chat.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = list(read_samples(SourceConfig(path="chat.parquet"), [path]))
    messages = (
        Message("system", "s"),
        Message("user", "q", name="Ann"),
        Message("assistant", None, (ToolCall("f", '{"x": 1}'),)),
        Message("tool", "r"),
        Message("assistant", "a", reasoning="hm", weight=0.5),
    )
    place = str(path)
    assert found == [
        Conversation(messages, Origin(place, 1)),
        Conversation(messages[:2] + messages[4:], Origin(place, 2)),
    ]


def test_a_workbook(tmp_path: Path) -> None:
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.title = "Fragen"
    for line in (["nr", "问题", " 回答 "], [1, "q", 7], [2, "q", None], [3, 0.5, True]):
        sheet.append(line)
    path = tmp_path / "book.xlsx"
    book.save(path)
    sample, problem, other = read_samples(SourceConfig(path="book.xlsx"), [path])
    assert isinstance(sample, Conversation)
    assert [message.content for message in sample.messages] == ["q", "7"]
    assert isinstance(problem, Problem)
    assert (problem.where, problem.code) == (f"{path}:Fragen!C3", "data.empty-answer")
    assert isinstance(other, Conversation)
    assert [message.content for message in other.messages] == ["0.5", "TRUE"]
