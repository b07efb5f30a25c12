"""A conversation with one model, or with two that answer the same messages."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from tunesmith.errors import DataError, ModelError, Problem
from tunesmith.infer.chat_model import ChatModel, find_result, open_chat_model
from tunesmith.infer.generate import Sampling, stream_answer
from tunesmith.types import Reporter

Message = dict[str, Any]

BASE = "base"
"""In place of a model's name: the one that training began with."""


@dataclass(frozen=True)
class Side:
    """Who answers: a model, or an adapted model with its adapter switched off."""

    label: str
    chat: ChatModel
    is_base: bool = False

    def stream(self, messages: list[Message], sampling: Sampling) -> Generator[str]:
        """The answer piece by piece; closing the iterator stops it."""
        switch: AbstractContextManager[Any] = nullcontext()
        if self.is_base:
            switch = self.chat.model.disable_adapter()
        with switch:
            yield from stream_answer(self.chat, messages, sampling)


def open_against(first: ChatModel, target: str, against: str, reporter: Reporter) -> Side:
    """The other side of a comparison; the base of an adapter is not loaded a second time.

    Args:
        first: the model that is compared, which `target` names.
        target: a run directory, adapter, model, or hub id.
        against: another such, or `base`.
        reporter: shows the loading.

    Raises:
        ModelError: nobody knows what the base of a whole model is (`model.no-base`), or it cannot
            be loaded.
    """
    if against != BASE:
        return Side(against, open_chat_model(against, reporter))
    if hasattr(first.model, "disable_adapter"):
        return Side(BASE, first, is_base=True)
    _, recipe = find_result(target)
    if recipe is None:
        raise ModelError(
            "model.no-base",
            target,
            found="a whole model, which does not say what it was trained from",
            expected="a run directory or an adapter, to compare with its base",
            try_="name the other model: --against MODEL",
        )
    base = open_chat_model(recipe.model.id, reporter)
    return Side(BASE, replace(base, template_arguments=first.template_arguments))


@dataclass
class Turn:
    """A question and what each side said."""

    question: str
    answers: list[str] = field(default_factory=list[str])


@dataclass
class Dialogue:
    """What was said so far. Each side sees its own answers alone."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list[Turn])

    def messages(self, side: int = 0) -> list[Message]:
        """The conversation as one side saw it, up to its last answer or the open question."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        found: list[Message] = [*start]
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            if len(turn.answers) > side:
                found.append({"role": "assistant", "content": turn.answers[side]})
        return found

    def save(self, file: Path) -> int:
        """Appends the conversation of the first side to a file of training samples.

        Returns:
            how many answers the sample has.

        Raises:
            DataError: there is nothing to save, an answer is empty, or the file is no .jsonl
                (`data.save`).
        """
        answers = [turn.answers[0] for turn in self.turns if turn.answers]
        found = None
        if file.suffix != ".jsonl":
            found = f"a file of another kind ({file.suffix or 'no ending'})"
        elif not answers or not all(answer.strip() for answer in answers):
            found = "an empty answer" if answers else "no answer yet"
        if found is not None:
            problem = Problem(
                str(file),
                "data.save",
                found,
                "a conversation with answers, and a name that ends in .jsonl",
            )
            raise DataError([problem], try_="/answer TEXT puts another text in place of the last")
        append_line(file, {"messages": self.messages()})
        return len(answers)


def append_line(file: Path, row: Mapping[str, Any]) -> None:
    """Appends a row of JSON, on a line of its own.

    Raises:
        DataError: the file cannot be written (`data.save`).
    """
    try:
        is_open_line = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
        with file.open("a", encoding="utf-8") as lines:
            lines.write("\n" * is_open_line + json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        found, expected = error.strerror or str(error), "a file that can be written"
        raise DataError([Problem(str(file), "data.save", found, expected)]) from error


# Files of prompts


def read_prompts(file: Path, system: str | None = None) -> list[list[Message]]:
    """Conversations that wait for an answer.

    A .jsonl file has a text, `{"prompt": ...}` or `{"messages": [...]}` (an answer at the end is
    left out) on each line; any other file has a prompt on each line. Blank lines are skipped.

    Args:
        file: UTF-8.
        system: a system message for conversations without one.

    Raises:
        DataError: the file cannot be read (`data.missing-file`, `data.encoding`, `data.empty-file`)
            or lines of it are none of these (`data.json`, `data.columns`).
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise _unreadable(file, "data.missing-file", error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise _unreadable(file, "data.encoding", str(error)) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise _unreadable(file, "data.empty-file", "no prompt")
    found, problems = list[list[Message]](), list[Problem]()
    for number, line in numbered:
        messages: list[Message] | Problem = [{"role": "user", "content": line}]
        if file.suffix == ".jsonl":
            messages = _messages_of(line, f"{file}:{number}")
        if isinstance(messages, Problem):
            problems.append(messages)
        else:
            has_system = not system or messages[0].get("role") == "system"
            found.append(messages if has_system else [_system(system), *messages])
    if problems:
        raise DataError(problems)
    return found


def _messages_of(line: str, where: str) -> list[Message] | Problem:
    try:
        row: object = json.loads(line)
    except ValueError as error:
        return Problem(where, "data.json", str(error), "one JSON value on the line")
    if isinstance(row, dict):
        row = cast("dict[str, object]", row)
        row = row.get("prompt", row.get("messages"))
    if isinstance(row, str) and row.strip():
        return [{"role": "user", "content": row}]
    if isinstance(row, list):
        messages = [
            cast("Message", each)
            for each in cast("list[object]", row)
            if isinstance(each, dict) and {"role", "content"} <= {*each}
        ]
        if len(messages) == len(cast("list[object]", row)) and messages:
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    expected = 'a text, {"prompt": ...}, or {"messages": [{"role": ..., "content": ...}, ...]}'
    return Problem(where, "data.columns", line.strip()[:80], expected)


def _system(text: str | None) -> Message:
    return {"role": "system", "content": text}


def _unreadable(file: Path, code: str, found: str) -> DataError:
    return DataError([Problem(str(file), code, found, "a UTF-8 file with a prompt on each line")])
