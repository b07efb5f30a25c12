"""Chat templates in Go's template language, as Ollama's Modelfiles have them.

A Jinja template cannot be translated in general. Its renders can be learned from: conversations
with marked texts show what stands before, between and behind them. From these pieces a Go template
is put together, and `render` runs it here, in the part of the language that it is written in, so
that it can be compared with the Jinja template before anybody relies on it. Not covered: tools,
images, and templates that strip or otherwise change the texts of messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

Render = Callable[[Sequence[Mapping[str, Any]]], str]
"""Renders messages up to where the answer begins."""

SYSTEM, FIRST, ANSWER, SECOND = "Sy7stem", "Fi7rst", "An7swer", "Se7cond"

REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


class UnlikeError(ValueError):
    """The template's renders do not fall into the pieces that a Go template is made of."""


@dataclass(frozen=True)
class Pieces:
    """What a template writes round the texts of messages.

    Args:
        start: at the very start where there is no system message.
        before_user: before every user message.
        before_system: before a system message.
        after_system: behind it.
        after_user: behind a user message, whatever follows.
        before_answer: then, before an answer that was given.
        after_answer: behind such an answer.
        prompt: behind the last user message, before the answer to be given.
        is_folded: whether the template refuses system messages: they go into the user's first one.
    """

    start: str
    before_user: str
    before_system: str
    after_system: str
    after_user: str
    before_answer: str
    after_answer: str
    prompt: str
    is_folded: bool = False


def find_pieces(render: Render) -> Pieces:
    """Finds the pieces by rendering marked conversations.

    Raises:
        UnlikeError: they are not the same in all of them.
    """
    turns = [_message("user", FIRST), _message("assistant", ANSWER), _message("user", SECOND)]
    start, given, after_answer, prompt = _cut(render(turns), (FIRST, ANSWER, SECOND))
    if _cut(render(turns[:1]), (FIRST,)) != [start, prompt]:
        raise UnlikeError("a first message is not written as a later one")
    shared = _common([given, prompt])
    before_system, after_system, is_folded = start, "\n\n", True
    try:
        text = render([_message("system", SYSTEM), *turns])
    except REFUSALS:
        text = ""
    if SYSTEM in text:
        before_system, after_system, *rest = _cut(text, (SYSTEM, FIRST, ANSWER, SECOND))
        is_folded = False
        if rest != [given, after_answer, prompt]:
            raise UnlikeError("a system message changes what follows")
    # What all three end with begins a user message.
    ends = [each[::-1] for each in (start, after_system, after_answer)]
    before_user = "" if is_folded else _common(ends)[::-1]
    return Pieces(
        start.removesuffix(before_user),
        before_user,
        before_system,
        after_system.removesuffix(before_user),
        shared,
        given[len(shared) :],
        after_answer.removesuffix(before_user),
        prompt[len(shared) :],
        is_folded,
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    pairs = zip(first, last, strict=False)
    return first[: next((n for n, (a, b) in enumerate(pairs) if a != b), len(first))]


def _cut(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and behind marks."""
    found: list[str] = []
    for mark in marks:
        before, there, text = text.partition(mark)
        if not there or mark in text:
            raise UnlikeError(f"a message stands {'nowhere' if not there else 'twice'} in a prompt")
        found.append(before)
    return [*found, text]


def go_template(pieces: Pieces) -> str:
    """The Go template of these pieces."""
    parts = (
        *("{{ if .System }}", _text(pieces.before_system), "{{ .System }}"),
        *(_text(pieces.after_system), "{{ else }}", _text(pieces.start), "{{ end }}"),
        *('{{ range .Messages }}{{ if eq .Role "user" }}', _text(pieces.before_user)),
        *("{{ .Content }}", _text(pieces.after_user)),
        *('{{ else if eq .Role "assistant" }}', _text(pieces.before_answer)),
        *("{{ .Content }}", _text(pieces.after_answer), "{{ end }}{{ end }}"),
        _text(pieces.prompt),
    )
    return "".join(parts)


def _text(text: str) -> str:
    """Text as it stands in a template."""
    return text.replace("{{", '{{ "{{" }}')


_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)


def render_go(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Renders a template as Ollama does.

    Neighbors of one role are one message there, and `.System` is all system messages.

    Raises:
        UnlikeError: the template has something besides texts, `if`, `else if`, `range .Messages`
            and fields.
    """
    joined: list[dict[str, str]] = []
    for message in messages:
        role, content = str(message["role"]), str(message["content"])
        if joined and joined[-1]["Role"] == role:
            joined[-1]["Content"] += f"\n\n{content}"
        else:
            joined.append({"Role": role, "Content": content})
    system = "\n\n".join(each["Content"] for each in joined if each["Role"] == "system")
    parts = _parts(template)
    text, rest = _run(parts, {"System": system, "Messages": joined})
    if rest:
        raise UnlikeError(f"{rest[0][1]} without a beginning")
    return text


def _parts(template: str) -> list[tuple[bool, str]]:
    """Texts (False) and actions (True) in order, white space trimmed where `-` asks for it."""
    found: list[tuple[bool, str]] = []
    at, is_trimmed = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip() if is_trimmed else text
        found += [(False, text.rstrip() if match[1] else text), (True, match[2])]
        at, is_trimmed = match.end(), bool(match[3])
    rest = template[at:]
    return [*found, (False, rest.lstrip() if is_trimmed else rest)]


Parts = list[tuple[bool, str]]


def _run(parts: Parts, scope: Mapping[str, Any], *, is_on: bool = True) -> tuple[str, Parts]:
    """The text of parts up to an `else` or `end` that belongs to what is around, and the rest."""
    out = ""
    while parts:
        (is_action, text), parts = parts[0], parts[1:]
        if not is_action:
            out += text
        elif text == "end" or text.startswith("else"):
            return (out if is_on else ""), [(True, text), *parts]
        elif text.startswith("if "):
            said, parts = _choose(text.removeprefix("if "), parts, scope, is_on=is_on)
            out += said
        elif text == "range .Messages":
            body = parts
            _, parts = _run(body, {"Role": "", "Content": "", **scope}, is_on=False)
            parts = parts[1:]
            for message in scope["Messages"] if is_on else ():
                out += _run(body, {**scope, **message})[0]
        elif text.startswith('"'):
            out += text[1:-1]
        elif is_on:
            out += str(_value(text, scope))
    return (out if is_on else ""), []


def _choose(
    condition: str, parts: Parts, scope: Mapping[str, Any], *, is_on: bool
) -> tuple[str, Parts]:
    """What an `if` with its `else` branches writes."""
    is_chosen = is_on and bool(_value(condition, scope))
    out, parts = _run(parts, scope, is_on=is_chosen)
    is_done = is_chosen
    while parts and parts[0][1] != "end":
        words = parts[0][1].removeprefix("else").strip()
        is_chosen = is_on and not is_done
        is_chosen = is_chosen and (not words or bool(_value(words.removeprefix("if "), scope)))
        said, parts = _run(parts[1:], scope, is_on=is_chosen)
        out, is_done = out + said, is_done or is_chosen
    return out, parts[1:]


def _value(words: str, scope: Mapping[str, Any]) -> Any:
    """The value of a field, or of `eq .Field "text"`."""
    if match := re.fullmatch(r'eq \.(\w+) "(\w+)"', words):
        return scope.get(match[1]) == match[2]
    if match := re.fullmatch(r"\.(\w+)", words):
        return scope.get(match[1], "")
    raise UnlikeError(f"the action {words!r}")
