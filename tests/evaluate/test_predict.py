"""Rows as questions: the prompt that training saw; predictions in a file that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data.encode import Pipeline
from tunesmith.data.sources import Source
from tunesmith.data.templates import build_renderer
from tunesmith.errors import DataError, LockError, RunError
from tunesmith.evaluate.predict import predict_file
from tunesmith.evaluate.prediction import read_predictions
from tunesmith.evaluate.prediction_file import PredictionFile
from tunesmith.evaluate.prediction_table import write_table
from tunesmith.evaluate.prompts import Question, read_questions, spoken
from tunesmith.infer.answers import Answer, Answering
from tunesmith.types import Conversation, Message, Origin, SilentReporter, ToolCall

CALL = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
DATA = DataConfig(train=[SourceConfig(path="unused")])
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def data_with(**values: Any) -> DataConfig:
    return DATA.model_copy(update=values)


def ask(file: Path, tokenizer: Any, data: DataConfig | None = None, **more: Any) -> list[Question]:
    data = data or DATA
    renderer = build_renderer(tokenizer, data)[0] if tokenizer is not None else None
    source = Source(SourceConfig(path=str(file)), (file,))
    return read_questions([source], data, renderer, SilentReporter(), **more)


def test_any_row_with_an_answer_can_be_asked(write_jsonl: Any, byte_tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": chat},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completion": "a", "label": True},
        {"question": "q", "answer": "a"},
        {"messages": [*chat, {"role": "user", "content": "q"}]},
        {"messages": chat[:1]},
        {"prompt": "q"},
        {"question": "q", "answer": ""},
    ]
    found = ask(write_jsonl(rows), byte_tokenizer)
    assert [each.label for each in found] == ["a"] * 6 + [None] * 4
    short = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert [each.prompt for each in found[:6] + found[7:]] == [short] * 9
    assert found[6].prompt.endswith(f"a<|im_end|>\n{short}")
    assert all(each.messages[-1] == {"role": "user", "content": "q"} for each in found)
    assert len({each.id for each in found}) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseek_v3"])
def test_the_prompt_is_what_training_saw(
    tokenizers_folder: Path, write_jsonl: Any, name: str
) -> None:
    """Token for token, with tools, special tokens in texts and answers that begin with a space."""
    from tunesmith.model.load import ModelSource, load_tokenizer

    tokenizer = load_tokenizer(ModelSource(name, str(tokenizers_folder / name)))
    talk = [
        {"role": "system", "content": "Be brief <|im_end|>"},
        {"role": "user", "content": "一加一？"},
        {"role": "assistant", "content": "2", "reasoning_content": "easy"},
        {"role": "user", "content": "and two  "},
    ]
    rows = [
        {"messages": [*talk, {"role": "assistant", "content": " three"}]},
        {"messages": [*talk, {"role": "assistant", "tool_calls": CALL}], "tools": [ADD]},
        {"prompt": "plain <|eot_id|>", "completion": "done"},
    ]
    file = write_jsonl(rows)
    data = data_with(template_arguments={"enable_thinking": False})
    found = ask(file, tokenizer, data)
    last, _ = build_renderer(tokenizer, data.model_copy(update={"train_on": "last"}))
    from tunesmith.data.columns import read_samples

    samples = list(read_samples(SourceConfig(path=str(file)), [file]))
    trained = [tokens for _, tokens in Pipeline(last).tokens_of(samples)]  # pyright: ignore
    for question, sequences in zip(found, trained, strict=True):
        assert isinstance(sequences, list), sequences
        first, _, _ = sequences[-1].runs[-1]
        assert list(question.ids) == sequences[-1].ids[:first].tolist()
    assert found[0].label == " three"
    assert "add" in (found[1].label or "")
    assert found[1].messages[-1]["role"] == "user"


def test_a_plain_tokenizer_is_asked_the_bare_prompt(write_jsonl: Any, byte_tokenizer: Any) -> None:
    file = write_jsonl([{"prompt": "once upon", "completion": " a time"}])
    data = data_with(template="plain")
    (bare,) = ask(file, byte_tokenizer, data)
    assert (bare.prompt, bare.messages, bare.label) == ("once upon", (), " a time")
    (chat,) = ask(file, byte_tokenizer, data, system="be good")
    assert "be good" in chat.prompt
    assert chat.messages[0] == {"role": "system", "content": "be good"}


def test_ids_are_those_of_the_rows_whatever_the_model(
    write_jsonl: Any, byte_tokenizer: Any
) -> None:
    file = write_jsonl([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    templates = [ask(file, byte_tokenizer, data_with(template=t)) for t in ("auto", "plain")]
    server = ask(file, None)
    assert len({tuple(each.id for each in found) for found in (*templates, server)}) == 1
    assert server[0].messages == ({"role": "user", "content": "a"},)
    assert [each.label for each in server] == ["b", "d"]


def test_rows_that_ask_nothing_are_all_named(write_jsonl: Any, byte_tokenizer: Any) -> None:
    rows = [
        {"text": "raw"},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "nobody", "content": "hello"}]},
        {"prompt": "fine", "completion": "yes"},
        {"other": 1},
    ]
    file = write_jsonl(rows)
    with pytest.raises(DataError) as caught:
        ask(file, byte_tokenizer)
    assert sorted((p.where.rpartition(":")[2], p.code) for p in caught.value.problems) == [
        ("1", "data.no-prompt"),
        ("2", "data.no-prompt"),
        ("3", "data.no-prompt"),
        ("4", "data.bad-role"),
        ("6", "data.columns"),
    ]
    assert len(ask(file, byte_tokenizer, data_with(bad_rows="drop"))) == 1
    assert ask(write_jsonl([{"prompt": "x"}] * 9), byte_tokenizer, rows=2)[1].line == 2
    file.write_text("")
    with pytest.raises(DataError, match=r"data\.empty-file"):
        ask(file, byte_tokenizer)


def test_tool_results_name_their_calls() -> None:
    from tunesmith.evaluate.prompts import openai_messages

    calls = (ToolCall("a", "{}"), ToolCall("b", "{}"))
    messages = [
        Message("user", "q"),
        Message("assistant", None, tool_calls=calls),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", None, tool_calls=calls[:1]),
        Message("tool", "3"),
    ]
    found = list(openai_messages(messages))
    names = [call["id"] for item in found for call in item.get("tool_calls", ())]
    assert names == ["call_0", "call_1", "call_2"]
    assert [item["tool_call_id"] for item in found if item["role"] == "tool"] == names
    assert Conversation(tuple(messages), Origin("f", 1)).messages[0].content == "q"


def test_what_is_said_is_what_follows_the_thinking() -> None:
    assert spoken("<think>\n\n</think>\n\nyes") == "yes"
    assert spoken("plain </b>") == "plain </b>"
    assert spoken("<think>never ends") == ""


# Files


class Parrot:
    """Answers with the length of the prompt, last row first; fails after some."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.dies_after = dies_after
        self.asked = 0

    def answer(
        self, questions: Sequence[Any], answering: Answering
    ) -> Iterator[tuple[int, Answer]]:
        for place in reversed(range(len(questions))):
            if self.asked == self.dies_after:
                raise KeyboardInterrupt
            self.asked += 1
            text = f"{len(questions[place].ids)} 字"
            yield place, Answer(text, "stop", len(questions[place].ids), 2)


def predict(path: Path, questions: list[Question], engine: Parrot, **more: Any) -> Any:
    settings = {"model": "m", **more.pop("settings", {})}
    answering = more.pop("answering", Answering())
    return predict_file(
        path, questions, lambda: engine, answering, settings=settings,
        reporter=SilentReporter(), **more,
    )  # fmt: skip


@pytest.fixture
def questions(write_jsonl: Any, byte_tokenizer: Any) -> list[Question]:
    rows = [{"prompt": f"{n}" * (n + 1), "completion": "x"} for n in range(7)]
    return ask(write_jsonl(rows, "rows.jsonl"), byte_tokenizer)


def test_a_stopped_prediction_goes_on(tmp_path: Path, questions: list[Question]) -> None:
    whole = tmp_path / "whole.jsonl"
    predict(whole, questions, Parrot())
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict(path, questions, Parrot(dies_after=3))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "cut in tw')
    engine = Parrot()
    found = predict(path, questions, engine)
    assert (engine.asked, found.num_new) == (4, 4)
    assert path.read_bytes() == whole.read_bytes()
    assert [each.line for each in read_predictions(path)] == [1, 2, 3, 4, 5, 6, 7]
    again = Parrot()
    assert predict(path, questions, again).num_new == 0
    assert again.asked == 0


def test_other_settings_do_not_go_on(tmp_path: Path, questions: list[Question]) -> None:
    path = tmp_path / "out.jsonl"
    predict(path, questions, Parrot())
    before = path.read_bytes()
    for change in (
        {"settings": {"model": "another"}},
        {"answering": Answering(max_new_tokens=9)},
        {"answering": Answering(stop=("x",))},
    ):
        with pytest.raises(RunError, match=r"run\.other-predictions") as caught:
            predict(path, questions, Parrot(), **change)
        assert "now" in caught.value.found
        assert path.read_bytes() == before
    with pytest.raises(RunError, match="rows"):
        predict(path, questions[:3], Parrot())
    # What greedy answers do not depend on does not matter.
    assert predict(path, questions, Parrot(), answering=Answering(seed=4, top_p=0.5)).num_new == 0
    changed = {"answering": Answering(max_new_tokens=9)}
    assert predict(path, questions, Parrot(), restart=True, **changed).num_new == 7


def test_foreign_files_are_left_alone(tmp_path: Path, questions: list[Question]) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(RunError, match=r"run\.other-predictions"):
        predict(path, questions, Parrot())
    assert path.read_text() == "precious\n"


def test_one_process_alone_writes(tmp_path: Path, questions: list[Question]) -> None:
    path = tmp_path / "deeper" / "out.jsonl"
    with (
        PredictionFile(path).opened(),
        pytest.raises(LockError, match=r"lock\.held"),
    ):
        predict(path, questions, Parrot())


def test_a_row_named_twice_is_asked_once(write_jsonl: Any, byte_tokenizer: Any) -> None:
    file = write_jsonl([{"prompt": "a", "completion": "b"}] * 2)
    source = Source(SourceConfig(path=str(file)), (file,))
    renderer, _ = build_renderer(byte_tokenizer, DATA)
    found = read_questions([source, source], DATA, renderer, SilentReporter())
    assert [each.line for each in found] == [1, 2]


@pytest.mark.parametrize("ending", [".csv", ".xlsx"])
def test_tables_for_people(tmp_path: Path, questions: list[Question], ending: str) -> None:
    from tunesmith.data.readers import read_rows

    found = predict(tmp_path / "out.jsonl", questions, Parrot())
    write_table(tmp_path / f"out{ending}", found.predictions)
    rows = [row.value for row in read_rows(tmp_path / f"out{ending}", encoding="auto", sheet=None)]
    assert len(rows) == 7
    assert rows[2]["question"] == "222"  # pyright: ignore
    assert "字" in rows[2]["prediction"]  # pyright: ignore


def test_a_line_is_valid_json_by_itself(tmp_path: Path, questions: list[Question]) -> None:
    found = predict(tmp_path / "out.jsonl", questions, Parrot())
    for line in found.path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert {"id", "prompt", "messages", "label", "prediction", "finish_reason"} <= set(row)
