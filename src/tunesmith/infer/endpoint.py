"""Answers from a server that speaks the OpenAI API: a hosted model, vLLM, llama.cpp, Ollama.

The key stands in the environment (`TUNESMITH_API_KEY`, else `OPENAI_API_KEY`); it is part of no
message, and goes to no other place: redirects are not followed.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import IO, Any, cast
from urllib.parse import urlsplit

from tunesmith.errors import EvaluationError
from tunesmith.infer.answers import Answer, Answering, Asked

MAX_RETRY_SECONDS = 60.0
MAX_ANSWER_BYTES = 64 << 20
KEY_VARIABLES = ("TUNESMITH_API_KEY", "OPENAI_API_KEY")
HERE = ("localhost", "127.0.0.1", "::1")


class _PassingError(Exception):
    """What may not be there when the same is asked again.

    Args:
        said: what happened.
        seconds: that the server asks to wait for; None if it does not.
    """

    def __init__(self, said: str, seconds: float | None = None) -> None:
        super().__init__(said)
        self.seconds = seconds


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead the key, or the data, where nobody has said."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message
    ) -> None:
        """Follows none: urllib then raises the answer as an error."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@dataclass(frozen=True)
class Endpoint:
    """A server and one of its models.

    What may pass (no connection, no answer in time, status 408, 409, 429 and 5xx) is tried again,
    after as long as the server asks for, else each time after twice as long.

    Args:
        url: `http(s)://HOST/v1`, or the whole address of `chat/completions` or `completions`.
        model: its name there.
        key: sent as bearer token; None sends none.
        attempts: at one request.
        timeout_seconds: for one answer.
        retry_seconds: before the second attempt.
        wait: for some seconds; ends sooner where the work is given up.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    attempts: int = 6
    timeout_seconds: float = 600.0
    retry_seconds: float = 1.0
    wait: Callable[[float], object] = time.sleep

    @property
    def is_plain(self) -> bool:
        """Whether it completes texts: the address is that of `completions`."""
        path = self.url.rstrip("/")
        return path.endswith("/completions") and not path.endswith("/chat/completions")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        answering: Answering | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        seed: int | None = None,
        **more: Any,
    ) -> Answer:
        """The answer to a conversation; calls of functions are written as `<tool_call>` text.

        Args:
            messages: as the OpenAI API writes them.
            answering: how it is drawn; the server's own way if left out.
            tools: functions that may be called.
            seed: of sampling.
            more: other fields of the request.

        Raises:
            EvaluationError: it fails for good (`evaluate.endpoint`).
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), **more}
        if tools:
            body["tools"] = list(tools)
        if answering is not None:
            body |= _fields(answering, seed)
            if answering.has_logprobs:
                body["logprobs"] = True
        return _checked(self, lambda: _chat_answer(self._post("chat/completions", body)), answering)

    def complete(self, prompt: str, answering: Answering, *, seed: int | None = None) -> Answer:
        """What follows a text.

        Raises:
            EvaluationError: it fails for good (`evaluate.endpoint`).
        """
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, **_fields(answering, seed)}
        if answering.has_logprobs:
            body["logprobs"] = 1
        return _checked(self, lambda: _text_answer(self._post("completions", body)), answering)

    def _post(self, way: str, body: dict[str, Any]) -> dict[str, Any]:
        reason, pause = "", self.retry_seconds
        for attempt in range(self.attempts):
            if attempt and self.wait(min(pause, MAX_RETRY_SECONDS)) is True:
                break  # the work was given up
            try:
                return self._send(way, body)
            except _PassingError as error:
                reason = str(error)
                pause = error.seconds or self.retry_seconds * 2**attempt
        raise self.failure(f"{reason} (the last of {self.attempts} attempts)")

    def _send(self, way: str, body: dict[str, Any]) -> dict[str, Any]:
        opener, said = urllib.request.build_opener(_NoRedirects), ""
        try:
            with opener.open(self._request(way, body), timeout=self.timeout_seconds) as response:
                text = response.read(MAX_ANSWER_BYTES)
                # `read` says nothing of a connection that broke in the middle.
                length = int(response.headers.get("Content-Length") or 0)
                if len(text) < min(length, MAX_ANSWER_BYTES):
                    raise _PassingError("an answer that broke off")
        except urllib.error.HTTPError as error:
            with error, suppress(OSError, HTTPException):
                said = error.read(300).decode(errors="replace")
            if error.code == 400 and "max_completion_tokens" in said and "max_tokens" in body:
                # Newer models of OpenAI know the limit under this name alone.
                body["max_completion_tokens"] = body.pop("max_tokens")
                return self._send(way, body)
            found = f"status {error.code}: {' '.join(said.split())}"
            if error.code in (408, 409, 429) or error.code >= 500:
                raise _PassingError(found, _retry_after(error.headers)) from None
            raise self.failure(found) from None
        except (OSError, HTTPException, UnicodeError) as error:
            raise _PassingError(str(error) or type(error).__name__) from None
        try:
            return cast("dict[str, Any]", json.loads(text))
        except ValueError:
            raise self.failure(f"{text[:100]!r}") from None

    def _request(self, way: str, body: Mapping[str, Any]) -> urllib.request.Request:
        base = self.url.rstrip("/")
        if not base.startswith(("http://", "https://")):
            raise self.failure(f"the address {self.url!r}")
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = base if base.endswith(f"/{way}") else f"{base}/{way}"
        return urllib.request.Request(address, json.dumps(body).encode(), headers)  # noqa: S310 - checked above

    def failure(self, found: str) -> EvaluationError:
        """The error that ends the work."""
        return EvaluationError(
            "evaluate.endpoint",
            self.url,
            found=found,
            expected=f"an answer of the model {self.model} by the OpenAI API",
            try_="look at the address (it mostly ends in /v1), the model's name and the key in "
            f"{KEY_VARIABLES[0]}; the same command goes on where it stopped",
        )


def api_key(url: str) -> str | None:
    """The key for a server, from the environment.

    OpenAI's own variable is meant for OpenAI: it is not sent in the clear to another machine.

    Raises:
        EvaluationError: it cannot be sent (`evaluate.key`).
    """
    for variable in KEY_VARIABLES:
        value = os.environ.get(variable, "").strip()
        is_open = url.startswith("http://") and urlsplit(url).hostname not in HERE
        if not value or (is_open and variable != KEY_VARIABLES[0]):
            continue
        if not (value.isascii() and value.isprintable()):
            raise EvaluationError(
                "evaluate.key",
                variable,
                found="a value that cannot be sent",
                expected="one line of ASCII",
                try_=f"export {variable}=...",
            )
        return value
    return None


def _fields(answering: Answering, seed: int | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": answering.max_new_tokens,
        "temperature": answering.temperature,
    }
    if answering.stop:
        fields["stop"] = list(answering.stop)
    if answering.temperature > 0:
        fields["top_p"] = answering.top_p
        if answering.top_k is not None:  # no part of OpenAI's API, but of most others
            fields["top_k"] = answering.top_k
        if seed is not None:
            fields["seed"] = seed
    return fields


def _retry_after(headers: Message) -> float | None:
    """Seconds that a server asks to wait for: a number or a date."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


# Answers


def _checked(endpoint: Endpoint, ask: Callable[[], Answer], answering: Answering | None) -> Answer:
    """The answer, cut at stop texts that the server left in it."""
    try:
        answer = ask()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        found = f"an answer of another form ({type(error).__name__}: {error})"
        raise endpoint.failure(found) from None
    stops = [answer.text.find(stop) for stop in answering.stop] if answering else []
    end = min((place for place in stops if place >= 0), default=None)
    if end is None:
        return answer
    return Answer(
        answer.text[:end], "stop", answer.prompt_tokens, answer.completion_tokens, answer.logprobs
    )


def _chat_answer(found: dict[str, Any]) -> Answer:
    choice = found["choices"][0]
    message = choice["message"]
    calls = [
        json.dumps(
            {"name": call["function"]["name"], "arguments": _arguments(call["function"])},
            ensure_ascii=False,
        )
        for call in message.get("tool_calls") or ()
    ]
    parts = [
        message.get("content") or "",
        *(f"<tool_call>\n{each}\n</tool_call>" for each in calls),
    ]
    logprobs = (choice.get("logprobs") or {}).get("content")
    pairs = None if logprobs is None else [(each["token"], each["logprob"]) for each in logprobs]
    return _answer(found, choice, "\n".join(part for part in parts if part), pairs)


def _arguments(function: Mapping[str, Any]) -> Any:
    """The arguments of a call as values; text that is no JSON stays text."""
    try:
        return json.loads(function["arguments"])
    except ValueError:
        return function["arguments"]


def _text_answer(found: dict[str, Any]) -> Answer:
    choice = found["choices"][0]
    logprobs, pairs = choice.get("logprobs"), None
    if logprobs:
        pairs = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))
    return _answer(found, choice, str(choice["text"]), pairs)


def _answer(
    found: Mapping[str, Any],
    choice: Mapping[str, Any],
    text: str,
    pairs: Sequence[tuple[str, float]] | None,
) -> Answer:
    usage = found.get("usage") or {}
    return Answer(
        # Half of a pair, which JSON can spell and no file hold.
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        "length" if choice.get("finish_reason") == "length" else "stop",
        int(usage.get("prompt_tokens", 0)),
        int(usage.get("completion_tokens", 0)),
        None if pairs is None else tuple((str(token), float(logp)) for token, logp in pairs),
    )


# Many at once


@dataclass
class EndpointEngine:
    """Answers by a server, several requests at a time.

    Args:
        endpoint: the server.
        at_once: requests.
    """

    endpoint: Endpoint
    at_once: int = 8

    def answer(
        self, questions: Sequence[Asked], answering: Answering
    ) -> Iterator[tuple[int, Answer]]:
        """See `infer.answers.Engine`."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(questions)):
            waiting.put(number)
        done: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        is_over = threading.Event()
        endpoint = replace(self.endpoint, wait=is_over.wait)

        def work() -> None:
            while not is_over.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((number, ask(endpoint, questions[number], answering)))
                except BaseException as error:  # noqa: BLE001 - handed to the reader below
                    done.put((number, error))
                    return

        # Daemons: a request that hangs must not keep a process that was told to end.
        for _ in range(min(self.at_once, len(questions))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in questions:
                number, found = done.get()
                if isinstance(found, BaseException):
                    raise found
                yield number, found
        finally:
            is_over.set()


def ask(endpoint: Endpoint, question: Asked, answering: Answering) -> Answer:
    """One row's answer.

    Raises:
        EvaluationError: the server fails for good, or completes plain texts alone and this is a
            conversation (`evaluate.endpoint`).
    """
    seed = (answering.seed + int(question.id[:8], 16)) % 2**31
    if not endpoint.is_plain:
        messages = question.messages or ({"role": "user", "content": question.prompt},)
        return endpoint.chat(messages, answering, tools=question.tools, seed=seed)
    is_one = len(question.messages) == 1 and question.messages[0]["role"] == "user"
    if question.messages and not is_one:
        raise endpoint.failure("a conversation, where the address completes plain texts alone")
    prompt = question.messages[0]["content"] if is_one else question.prompt
    return endpoint.complete(str(prompt), answering, seed=seed)
