"""Rows of data as questions: what a model is asked, token for token as training showed it.

Any row that can be trained on can be asked: its last answer is the label, all before it the prompt.
A row without an answer is read in the form `prompt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data.columns import RowParser
from tunesmith.data.readers import Row, read_rows
from tunesmith.data.sources import Source
from tunesmith.data.templates import Renderer, Segment
from tunesmith.data.templates.guard import GUARD
from tunesmith.data.templates.traits import spell_calls
from tunesmith.data.tokenize import Encoder
from tunesmith.errors import DataError, Problem
from tunesmith.evaluate.prediction import prediction_id
from tunesmith.types import (
    Completion,
    Conversation,
    Labeled,
    Message,
    Origin,
    Preference,
    Rated,
    Reporter,
    Sample,
)


@dataclass(frozen=True, slots=True)
class Question:
    """A row to be answered.

    Args:
        id: of the row, the same for all models.
        path: the data file, with the sheet of a workbook.
        line: in it.
        messages: the conversation before the answer, as the OpenAI API writes it; empty for a
            plain prompt.
        tools: functions that may be called.
        prompt: as rendered; without a renderer a plain prompt itself, else empty.
        ids: the prompt's tokens; empty without a renderer.
        label: the data's own answer without its thinking; None if the row has none.
    """

    id: str
    path: str
    line: int
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    prompt: str
    ids: tuple[int, ...]
    label: str | None


def spoken(text: str) -> str:
    """An answer without the thinking before it; other answers come back as they are.

    A thinking that was cut before its end leaves nothing.
    """
    thinking, mark, rest = text.rpartition("</think>")
    if mark:
        return rest.lstrip()
    return "" if thinking == "" and text.lstrip().startswith("<think>") else text


def read_questions(
    sources: Sequence[Source],
    data: DataConfig,
    renderer: Renderer | None,
    reporter: Reporter,
    *,
    system: str | None = None,
    rows: int | None = None,
) -> list[Question]:
    """All rows as questions, in the order of the data; one that comes twice is asked once.

    Args:
        sources: the data.
        data: whether bad rows stop the work or are left out (`bad_rows`).
        renderer: of the model's tokenizer (`build_renderer`); None for a server, which renders
            messages itself.
        reporter: shows bars.
        system: a system message for rows without one.
        rows: the first ones alone; None for all.

    Raises:
        DataError: there are no rows, or some of them cannot be asked; all are named.
    """
    asked: list[_Asked] = []
    problems: list[Problem] = []
    for sample in islice(_read(sources, reporter), rows):
        found = sample if isinstance(sample, Problem) else _to_ask(sample, system, renderer)
        (problems if isinstance(found, Problem) else asked).append(found)  # pyright: ignore[reportArgumentType]
    questions = _asked_once(_questions(asked, renderer, problems), reporter)
    if problems and (data.bad_rows == "stop" or not questions):
        raise DataError(
            problems,
            num_problems=len(problems),
            try_="correct these rows, or leave them out with data.bad_rows=drop",
        )
    if problems:
        reporter.note(f"{len(problems):,} bad rows are left out (data.bad_rows=drop)")
    if not questions:
        place = str(sources[0].files[0]) if sources and sources[0].files else "data"
        raise DataError([Problem(place, "data.empty-file", "no rows", "at least one row")])
    return questions


@dataclass(frozen=True, slots=True)
class _Asked:
    """A sample that can be asked.

    Args:
        sample: what is rendered, with an answer behind the prompt.
        before: the prompt's messages.
        answer: what was or could have been said.
        label: given by the data apart from an answer; None if the answer is the label.
        is_answered: whether the data has an answer.
    """

    sample: Conversation | Completion
    before: tuple[Message, ...]
    answer: Message
    label: str | None
    is_answered: bool

    @property
    def origin(self) -> Origin:
        return self.sample.origin


# Reading

UNANSWERED = ("data.no-assistant", "data.empty-answer", "data.columns")
"""What training says against rows that have a question alone."""


def _read(sources: Sequence[Source], reporter: Reporter) -> Iterator[Sample | Problem]:
    for source in sources:
        yield from reporter.track(f"Reading {source.config.label}", _rows_of(source))


def _rows_of(source: Source) -> Iterator[Sample | Problem]:
    """The samples of a source; rows without an answer are read in the form `prompt`."""
    config = source.config
    parser = RowParser(config)
    plain = RowParser(config.model_copy(update={"format": "prompt"}))
    rows = (
        row
        for file in source.files
        for row in read_rows(file, encoding=config.encoding, sheet=config.sheet)
    )
    for row in islice(rows, config.limit):
        yield row.value if isinstance(row.value, Problem) else _parse(row, parser, plain)
    yield from _unseen(parser, config)


def _parse(row: Row, parser: RowParser, plain: RowParser) -> Sample | Problem:
    sample = parser.parse(row)
    if isinstance(sample, Problem) and sample.code in UNANSWERED:
        unanswered = plain.parse(row)
        return sample if isinstance(unanswered, Problem) else unanswered
    return sample


def _unseen(parser: RowParser, config: SourceConfig) -> Iterator[Problem]:
    for name in sorted(parser.unseen):
        found = f"no row with a column `{name}`"
        yield Problem(config.path, "data.columns", found, "the column that is mapped")


# Samples to questions

PLACEHOLDER = Message("assistant", "x")
"""Stands where a row has no answer: a prompt is what comes before one."""


def _to_ask(sample: Sample, system: str | None, renderer: Renderer | None) -> _Asked | Problem:
    """What is asked by a sample; a problem if it asks nothing."""
    match sample:
        case Completion():
            return _ask_completion(sample, system, renderer)
        case Conversation():
            return _ask_conversation(sample, system)
        case Preference():
            chosen = Conversation((*sample.prompt, *sample.chosen), sample.origin, sample.tools)
            return _ask_conversation(chosen, system)
        case Rated():
            return _ask_conversation(sample.conversation, system)
        case Labeled(content=Conversation() as content, label=label):
            found = _ask_conversation(content, system)
            return found if isinstance(found, Problem) else replace(found, label=label)
        case Labeled(label=label):
            text = sample.content.text  # pyright: ignore[reportAttributeAccessIssue]
            return _ask_completion(Completion(text, label, sample.origin), system, renderer)
        case _:
            return Problem(
                str(sample.origin),
                "data.no-prompt",
                "raw text",
                "a prompt to answer (data.format=prompt takes the text for one)",
            )


def _ask_completion(
    sample: Completion, system: str | None, renderer: Renderer | None
) -> _Asked | Problem:
    """A plain prompt: bare where training would leave it so, else a user message."""
    answer = Message("assistant", sample.completion) if sample.completion.strip() else PLACEHOLDER
    before = (Message("user", sample.prompt),)
    is_answered = answer is not PLACEHOLDER
    if not system and renderer is not None and renderer.is_plain:
        bare = replace(sample, completion=answer.content or "")
        return _Asked(bare, before, answer, None, is_answered)
    messages = (*before, answer) if is_answered else before
    return _ask_conversation(Conversation(messages, sample.origin), system)


def _ask_conversation(sample: Conversation, system: str | None) -> _Asked | Problem:
    """All before the last answer; of a conversation that ends with a question, all of it."""
    messages = sample.messages
    if system and not any(message.role == "system" for message in messages):
        messages = (Message("system", system), *messages)
    is_answered = bool(messages) and messages[-1].role == "assistant"
    before = messages[:-1] if is_answered else messages
    answer = replace(messages[-1], weight=1.0) if is_answered else PLACEHOLDER
    if not (answer.content or "").strip() and not answer.tool_calls:
        is_answered, answer = False, PLACEHOLDER
    # Data has answers to a system message alone; by itself it is no question.
    if not before or not (is_answered or any(m.role in ("user", "tool") for m in before)):
        found = "an answer with nothing before it" if is_answered else "no question"
        return _nothing_asked(sample.origin, found)
    silent = tuple(
        replace(message, weight=0.0) if message.role == "assistant" else message
        for message in before
    )
    asked = Conversation((*silent, answer), sample.origin, sample.tools)
    return _Asked(asked, before, answer, None, is_answered)


def _nothing_asked(origin: Origin, found: str) -> Problem:
    return Problem(str(origin), "data.no-prompt", found, "a question to answer")


def _questions(
    asked: Sequence[_Asked], renderer: Renderer | None, problems: list[Problem]
) -> list[Question]:
    """The questions of what can be rendered; what cannot is added to the problems."""
    if renderer is None:
        return [_question(each, _label(each, _spelled(each)), "", ()) for each in asked]
    rendered: list[tuple[_Asked, Segment]] = []
    for each in asked:
        segments = renderer.render(each.sample)
        if isinstance(segments, Problem):
            problems.append(segments)
        else:
            rendered.append((each, segments[-1]))
    prompts = [_prompt_of(segment) for _, segment in rendered]
    encodings = Encoder(renderer.tokenizer.backend_tokenizer).encode_texts(prompts)
    questions: list[Question] = []
    for (each, segment), prompt, encoding in zip(rendered, prompts, encodings, strict=True):
        if not encoding.ids:
            problems.append(_nothing_asked(each.origin, "an empty prompt"))
            continue
        label = _label(each, _answer_of(segment, renderer))
        text = prompt.replace(GUARD, "")
        questions.append(_question(each, label, text, tuple(encoding.ids)))
    return questions


def _question(asked: _Asked, label: str | None, prompt: str, ids: tuple[int, ...]) -> Question:
    origin, sample = asked.origin, asked.sample
    messages = tuple(openai_messages(asked.before))
    path = f"{origin.path}:{origin.sheet}" if origin.sheet else origin.path
    return Question(
        # Not of the rendered text: that differs from model to model.
        id=prediction_id(path, origin.line, messages, ""),
        path=path,
        line=origin.line,
        messages=() if isinstance(sample, Completion) else messages,
        tools=sample.tools if isinstance(sample, Conversation) else (),
        prompt=prompt,
        ids=ids,
        label=label,
    )


def _prompt_of(segment: Segment) -> str:
    """The text before a sequence's last answer."""
    last = max(number for number, span in enumerate(segment) if span.is_supervised)
    return "".join(span.text for span in segment[:last])


def _answer_of(segment: Segment, renderer: Renderer) -> str:
    """A sequence's last answer as the template writes it, without its end."""
    text = next(span.text for span in reversed(segment) if span.is_supervised)
    for mark in (*renderer.traits.end_marks, str(renderer.tokenizer.eos_token)):
        text = text.removesuffix(mark)
    return text.replace(GUARD, "").strip()


def _spelled(asked: _Asked) -> str:
    """An answer with its calls as text, where no template writes them."""
    whole = spell_calls(Conversation((asked.answer,), asked.origin))
    return whole.messages[0].content or ""


def _label(asked: _Asked, written: str) -> str | None:
    """The data's own answer: its text as it stands there; calls as `written`."""
    if asked.label is not None:
        return asked.label
    if not asked.is_answered:
        return None
    return spoken(written if asked.answer.tool_calls else asked.answer.content or "")


def _asked_once(questions: Sequence[Question], reporter: Reporter) -> list[Question]:
    """The first of questions of the same row: a file may be named twice."""
    once = list({question.id: question for question in reversed(questions)}.values())[::-1]
    if len(once) < len(questions):
        reporter.note(f"{len(questions) - len(once):,} rows are there twice and asked once")
    return once


def openai_messages(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Messages as the OpenAI API writes them; calls are numbered, results follow in their order."""
    waiting: list[str] = []
    count = 0
    for message in messages:
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name:
            item["name"] = message.name
        if message.reasoning:
            item["reasoning_content"] = message.reasoning
        if message.tool_calls:
            waiting = [f"call_{count + number}" for number in range(len(message.tool_calls))]
            count += len(waiting)
            item["tool_calls"] = [
                {
                    "id": name,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for name, call in zip(waiting, message.tool_calls, strict=True)
            ]
        if message.role == "tool" and waiting:
            item["tool_call_id"] = waiting.pop(0)
        yield item
