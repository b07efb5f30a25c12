"""Asks a judge, reads its verdicts, and keeps them on disk by what was asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol, TypeVar

from tunesmith.errors import DiskError
from tunesmith.types import Reporter

T = TypeVar("T")

ATTEMPTS = 3
WORKERS = 8
"""Questions under way at once."""

CHARACTERS_PER_TOKEN = 4
"""For counts where the server tells none; Chinese has fewer."""

DEFAULT_RUBRIC = (
    "Judge how well the answer does what was asked: whether it is right, complete, and follows the "
    "instructions and the format asked for. Neither length nor politeness is a merit of its own."
)

Chat = list[dict[str, Any]]

Winner = Literal["A", "B", "tie"]


class Replied(Protocol):
    """What a server's client may give instead of plain text."""

    @property
    def text(self) -> str:
        """Of the reply."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """That the question took."""
        ...

    @property
    def completion_tokens(self) -> int:
        """That the reply took."""
        ...


Ask = Callable[[list[dict[str, Any]]], "str | Replied"]
"""Sends a chat, gives the reply; raises what cannot be helped after retries of its own."""


@dataclass
class Cost:
    """What judging has taken.

    Args:
        prompt_tokens: of all questions.
        completion_tokens: of all replies.
        num_asked: questions that were sent.
        num_kept: verdicts that were on disk already.
        is_estimated: whether the server gave no counts, and characters were counted instead.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_asked: int = 0
    num_kept: int = 0
    is_estimated: bool = False

    def __str__(self) -> str:
        about = "about " if self.is_estimated else ""
        return (
            f"{self.num_asked:,} questions to the judge, {self.num_kept:,} verdicts kept from "
            f"before; {about}{self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"
        )


@dataclass
class Judge:
    """A judge with its rubric, and the verdicts that it has given.

    Args:
        ask: sends a chat to it.
        model: its name; verdicts on disk are of this model alone.
        kept: file of verdicts, one a line; None keeps none.
        rubric: what counts.
        workers: questions under way at once.
        cost: what has been asked so far.
        lock: of the cost.
    """

    ask: Ask
    model: str
    kept: Path | None = None
    rubric: str = DEFAULT_RUBRIC
    workers: int = WORKERS
    cost: Cost = field(default_factory=Cost)
    lock: Lock = field(default_factory=Lock, repr=False)

    def signature(self, kind: str, instructions: str) -> str:
        """What changes verdicts: the model and what it is told."""
        told = hashlib.sha256((instructions + self.rubric).encode()).hexdigest()[:8]
        return f"{kind}|model:{self.model}|prompt:{told}"


# What it replies


class _UnreadableError(Exception):
    """Says what is wrong about a verdict."""


_FENCE = re.compile(r"```[a-z]*\s*(.*?)\s*```", re.DOTALL)


def read_rating(text: str) -> tuple[float, str]:
    """A mark and its reason."""
    found = _object(text)
    rating = found.get("rating")
    if isinstance(rating, bool) or not isinstance(rating, int) or not 1 <= rating <= 10:
        raise _UnreadableError(f"rating is {rating!r}, not a whole number from 1 to 10")
    return float(rating), _reason(found)


def read_winner(text: str) -> tuple[Winner, str]:
    """Who won, and the reason."""
    found = _object(text)
    winner = found.get("winner")
    if winner not in ("A", "B", "tie"):
        raise _UnreadableError(f'winner is {winner!r}, not "A", "B" or "tie"')
    return winner, _reason(found)


def _object(text: str) -> dict[str, Any]:
    # Servers without a parser for it leave a model's thinking in front of its answer.
    text = text.rpartition("</think>")[2].strip()
    fenced = _FENCE.fullmatch(text)
    try:
        found = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError) as error:
        raise _UnreadableError(f"not one JSON object alone: {error}") from None
    if not isinstance(found, dict):
        raise _UnreadableError("not a JSON object")
    return found


def _reason(found: dict[str, Any]) -> str:
    reason = found.get("reason")
    if not isinstance(reason, str):
        raise _UnreadableError("reason is no text")
    return reason


# Asking


def ask_all(
    judge: Judge,
    verdicts: Verdicts,
    questions: Sequence[Chat],
    read: Callable[[str], T],
    reporter: Reporter,
) -> list[T | None]:
    """Asks several at once; what is known stays known if one of them fails."""
    found: list[T | None] = [None] * len(questions)
    pool = ThreadPoolExecutor(max(1, judge.workers), thread_name_prefix="judge")
    try:
        places: dict[Future[T | None], int] = {
            pool.submit(_ask_one, judge, verdicts, chat, read): place
            for place, chat in enumerate(questions)
        }
        for done in reporter.track("Judging", as_completed(places), len(questions)):
            found[places[done]] = done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _ask_one(judge: Judge, verdicts: Verdicts, chat: Chat, read: Callable[[str], T]) -> T | None:
    """The verdict, asked for up to `ATTEMPTS` times; None if none of them could be read."""
    key = verdicts.key(judge.model, chat)
    # One that cannot be read was written into the file by somebody else.
    with suppress(_UnreadableError):
        if key in verdicts.replies:
            found = read(verdicts.replies[key])
            with judge.lock:
                judge.cost.num_kept += 1
            return found
    talk = list(chat)
    for _ in range(ATTEMPTS):
        reply = judge.ask(talk)
        text = reply if isinstance(reply, str) else reply.text
        _count(judge, talk, reply)
        try:
            found = read(text)
        except _UnreadableError as error:
            again = f"This could not be read: {error}. Reply with the JSON object alone."
            talk += [{"role": "assistant", "content": text}, {"role": "user", "content": again}]
            continue
        verdicts.keep(key, text)
        return found
    return None


def _count(judge: Judge, talk: Chat, reply: str | Replied) -> None:
    if isinstance(reply, str):
        asked = sum(len(content_of(each)) for each in talk)
        tokens = (asked // CHARACTERS_PER_TOKEN, len(reply) // CHARACTERS_PER_TOKEN)
    else:
        tokens = (reply.prompt_tokens, reply.completion_tokens)
    with judge.lock:
        cost = judge.cost
        cost.prompt_tokens += tokens[0]
        cost.completion_tokens += tokens[1]
        cost.num_asked += 1
        cost.is_estimated |= isinstance(reply, str)


def content_of(message: Mapping[str, Any]) -> str:
    """A message's text; parts that are none as JSON."""
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


# Verdicts on disk


@dataclass
class Verdicts:
    """Verdicts by what was asked.

    Args:
        file: they are appended to; None for none.
        replies: by key.
        lock: of both.
    """

    file: Path | None
    replies: dict[str, str] = field(default_factory=dict[str, str])
    lock: Lock = field(default_factory=Lock)

    @staticmethod
    def key(model: str, chat: Chat) -> str:
        """Of a question to a model."""
        text = json.dumps([model, chat], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def keep(self, key: str, text: str) -> None:
        """Appends a verdict, in one write."""
        with self.lock:
            self.replies[key] = text
            if self.file is None:
                return
            line = json.dumps({"key": key, "verdict": text}, ensure_ascii=False)
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
            except OSError as error:
                raise DiskError(
                    "disk.write", str(self.file), found=str(error), expected="a writable file"
                ) from error


def open_verdicts(file: Path | None) -> Verdicts:
    """The verdicts that there are; a line that a kill has cut is not read, and ended."""
    memory = Verdicts(file)
    if file is not None and file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n"):
            try:
                found = json.loads(line)
                memory.replies[str(found["key"])] = str(found["verdict"])
            except (ValueError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            with file.open("a", encoding="utf-8") as end:
                end.write("\n")
    return memory
