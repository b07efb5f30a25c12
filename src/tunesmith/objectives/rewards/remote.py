"""`http`: rewards from a server."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from typing import IO, cast

from tunesmith.errors import RewardError, UserError
from tunesmith.objectives.rewards.base import Answered, checked_rewards

MAX_RETRY_SECONDS = 30.0
MAX_ANSWER_BYTES = 64 << 20


class _PassingError(Exception):
    """What may not be there when the same is asked again."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead the secret headers, or the request, where the recipe does not say."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message
    ) -> None:
        """Follows none: urllib then raises the answer as an error."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@dataclass(frozen=True)
class HttpReward:
    """Posts answers to a server, `batch_size` at a time, and takes what it says.

    It sends `{"answers": [{"prompt", "answer", "reference"}, ...]}` and expects
    `{"rewards": [number or null, ...]}`. What may pass (no connection, no answer in time, status
    408, 429 and 5xx) is tried again, each time after twice as long.

    Args:
        url: http or https.
        headers_from: names of headers, each with the environment variable that holds its value.
    """

    url: str
    batch_size: int = 64
    timeout_seconds: float = 60.0
    attempts: int = 4
    retry_seconds: float = 1.0
    headers_from: Mapping[str, str] = field(default_factory=dict[str, str])

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One reward for each answer.

        Raises:
            RewardError: `reward.http`.
        """
        rewards: list[float | None] = []
        for start in range(0, len(answers), self.batch_size):
            rewards.extend(self._judge(answers[start : start + self.batch_size]))
        return rewards

    def _judge(self, answers: Sequence[Answered]) -> list[float | None]:
        body = json.dumps({"answers": [_as_json(answered) for answered in answers]})
        request = self._request(body.encode())
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(self.retry_seconds * 2 ** (attempt - 1), MAX_RETRY_SECONDS))
            try:
                text = self._send(request)
            except _PassingError as error:
                reason = str(error)
            else:
                return self._read(text, len(answers))
        raise self._error(f"{reason} (the last of {self.attempts} attempts)")

    def headers(self) -> dict[str, str]:
        """What goes with each request.

        Raises:
            UserError: `reward.header`: an environment variable is not set.
        """
        headers = {"Content-Type": "application/json"}
        for name, variable in self.headers_from.items():
            value = os.environ.get(variable, "")
            # http.client would show a value that cannot be sent, and it is a secret.
            if not value or not (value.isascii() and value.isprintable()):
                raise UserError(
                    "reward.header",
                    self.url,
                    found=f"nothing that can be sent in the environment variable {variable}",
                    expected=f"the value of the header {name}, one line of ASCII",
                    try_=f"export {variable}=...",
                )
            headers[name] = value
        return headers

    def _request(self, body: bytes) -> urllib.request.Request:
        if not self.url.startswith(("http://", "https://")):
            raise self._error(f"the address {self.url!r}")
        return urllib.request.Request(self.url, body, self.headers())  # noqa: S310 - checked above

    def _send(self, request: urllib.request.Request) -> bytes:
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=self.timeout_seconds) as response:
                return response.read(MAX_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(200).decode(errors="replace")
            text = f"status {error.code}: {said}"
            if error.code in (408, 429) or error.code >= 500:
                raise _PassingError(text) from None
            raise self._error(text) from None
        except (OSError, HTTPException, UnicodeError) as error:
            raise _PassingError(str(error) or type(error).__name__) from None

    def _read(self, text: bytes, num_answers: int) -> list[float | None]:
        try:
            answer = cast("dict[str, object]", json.loads(text))
            rewards = answer["rewards"]
        except (ValueError, KeyError, TypeError):
            raise self._error(f"{text[:100]!r}") from None
        if not isinstance(rewards, list):
            raise self._error(f"rewards of type {type(rewards).__name__}")
        return checked_rewards(cast("list[object]", rewards), num_answers, self._error)

    def _error(self, found: str) -> RewardError:
        return RewardError(
            "reward.http",
            self.url,
            found=found,
            expected='{"rewards": [...]} with one finite number or null for each answer',
            try_="look at the server's log; the same command goes on from the last checkpoint",
        )


def _as_json(answered: Answered) -> dict[str, object]:
    return {
        "prompt": answered.prompt,
        "answer": answered.answer,
        "reference": answered.reference,
    }
