"""Preference pairs in the spellings of TRL, LLaMA-Factory and OpenAI, and KTO's labels."""

from __future__ import annotations

import re
from dataclasses import replace

from tunesmith.data.shapes.fields import MistakeError, from_json_text, show, text, truth
from tunesmith.data.shapes.messages import (
    check_answer,
    check_order,
    check_tools,
    conversation,
    prompt_messages,
    read_messages,
    read_tools,
)
from tunesmith.data.shapes.pairs import (
    alpaca_prompt,
    before,
    from_completion,
    messages_or_text,
    question_prompt,
)
from tunesmith.types import Completion, Conversation, Json, Message, Origin, Preference, Rated

Messages = tuple[Message, ...]


def from_preference(row: dict[str, Json], origin: Origin) -> Preference:
    """A prompt with `chosen` and `rejected`.

    The prompt is text, a list of messages, ShareGPT's `conversations`, Alpaca's instruction and
    input, a question, or (where both sides are whole conversations) what they share at the start.
    """
    chosen, rejected = _side(row["chosen"], "chosen"), _side(row["rejected"], "rejected")
    prompt = _prompt(row)
    if not prompt or (_is_whole(chosen) and _is_whole(rejected)):
        shared, chosen, rejected = _shared_start(chosen, rejected)
        prompt = _joined(prompt, shared)
    return _preference(prompt, chosen, rejected, row, origin)


def from_openai_preference(row: dict[str, Json], origin: Origin) -> Preference:
    """OpenAI's `input`, `preferred_output` and `non_preferred_output`."""
    given = from_json_text(row["input"], "input")
    if not isinstance(given, dict) or "messages" not in given:
        found = f"input = {show(row['input'])}"
        raise MistakeError("data.bad-type", found, "an object with `messages`", "input")
    prompt = read_messages(given["messages"], "input.messages")
    chosen = _side(row["preferred_output"], "preferred_output")
    rejected = _side(row["non_preferred_output"], "non_preferred_output")
    return _preference(prompt, chosen, rejected, {"tools": given.get("tools")}, origin)


def from_rated(row: dict[str, Json], origin: Origin) -> Rated:
    """A conversation of any spelling with a good-or-bad label for its last answer."""
    is_good = truth(row["label"], "label")
    column = next((name for name in ("messages", "conversations") if row.get(name)), None)
    if column is not None:
        rated = conversation(prompt_messages(row, column), read_tools(row), origin)
    else:
        rated = _rated_pair(row, origin)
    if rated.messages[-1].role != "assistant":
        found = f"a {rated.messages[-1].role} message at the end"
        raise MistakeError("data.no-assistant", found, "the answer that the label speaks of there")
    return Rated(rated, is_good)


def _rated_pair(row: dict[str, Json], origin: Origin) -> Conversation:
    answer = next((name for name in ("output", "completion") if name in row), None)
    if answer is None:
        found = f"columns {', '.join(row)}"
        raise MistakeError("data.columns", found, "messages, or an output (completion) to rate")
    if "prompt" in row:
        pair = from_completion({**row, "completion": row[answer]}, origin)
        return _as_conversation(pair) if isinstance(pair, Completion) else pair
    prompt = _prompt(row)
    if not prompt:
        found = f"columns {', '.join(row)}"
        raise MistakeError("data.columns", found, "a prompt or an instruction beside the answer")
    message = Message("assistant", text(row[answer], answer))
    return conversation((*prompt, message), read_tools(row), origin)


def _as_conversation(pair: Completion) -> Conversation:
    messages = (Message("user", pair.prompt), Message("assistant", pair.completion))
    return Conversation(messages, pair.origin)


def _preference(
    prompt: Messages, chosen: Messages, rejected: Messages, row: dict[str, Json], origin: Origin
) -> Preference:
    tools = read_tools(row)
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[-1].role != "assistant":
            raise MistakeError(
                "data.preference", f"a {column} side without an answer", "an answer", column
            )
        check_answer(replace(side[-1], weight=1.0))
        if prompt:
            check_order((*prompt, *side))
        check_tools(side, tools)
    if not prompt:
        raise MistakeError("data.preference", "no prompt", "a prompt before both answers", "prompt")
    if chosen == rejected:
        raise MistakeError(
            "data.preference", "chosen and rejected that are equal", "two different answers"
        )
    return Preference(prompt, chosen, rejected, origin, tools)


def _side(value: Json, column: str) -> Messages:
    value = messages_or_text(value)
    if isinstance(value, list):
        return read_messages(value, column)
    if isinstance(value, dict):  # LLaMA-Factory's {"from": "gpt", "value": ...}
        return read_messages([value], column)
    written = text(value, column)
    return _turns_of_transcript(written) or (Message("assistant", written),)


TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _turns_of_transcript(written: str) -> Messages:
    r"""The turns of hh-rlhf's texts (`\n\nHuman: ...\n\nAssistant: ...`); () for other texts."""
    nothing, *parts = TRANSCRIPT_TURN.split(written)
    if nothing.strip() or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
        return ()
    if not parts[-1].strip():  # a prompt may end with the name of who is to speak
        del parts[-2:]
    return tuple(
        Message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _prompt(row: dict[str, Json]) -> Messages:
    """What stands before both answers; () if no column holds it."""
    for column in ("conversations", "messages"):
        if row.get(column):
            return prompt_messages(row, column)
    if "instruction" in row:
        return alpaca_prompt(row)
    if "question" in row:
        return question_prompt(row)
    column = next((name for name in ("prompt", "input") if row.get(name)), None)
    if column is None:
        return ()
    value = messages_or_text(row[column])
    if isinstance(value, list):
        return prompt_messages({**row, column: value}, column)
    written = text(value, column)
    return (*before(row), *(_turns_of_transcript(written) or (Message("user", written),)))


def _is_whole(side: Messages) -> bool:
    """Whether a side repeats the prompt, as in implicit prompts."""
    return bool(side) and side[0].role in ("system", "user")


def _shared_start(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Splits two whole conversations where they part."""
    shared = 0
    for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
        if left != right:
            break
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _joined(prompt: Messages, shared: Messages) -> Messages:
    """The shared start, behind those parts of the prompt column that it does not repeat."""
    if not shared:
        return prompt
    system = prompt[:1] if prompt and prompt[0].role == "system" else ()
    said = prompt[len(system) :]
    if system and shared[0].role == "system":
        system = ()
    spoken = tuple(message for message in shared if message.role != "system")
    goes_on = bool(said) and said[-1].role == "assistant" and said[0] != spoken[0]
    return (*system, *(said if goes_on else ()), *shared)
