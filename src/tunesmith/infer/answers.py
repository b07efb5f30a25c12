"""What engines answer, how, and with what: shared by all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


class Asked(Protocol):
    """A row to be answered, as far as engines look at it."""

    @property
    def id(self) -> str:
        """Of the row: its own random numbers are made of it."""
        ...

    @property
    def prompt(self) -> str:
        """The rendered text; for a server, the plain prompt or nothing."""
        ...

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's tokens; none where nothing is known of the model's tokenizer."""
        ...

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """The conversation, as the OpenAI API writes it; none for a plain prompt."""
        ...

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """Functions that may be called."""
        ...


@dataclass(frozen=True, slots=True)
class Answering:
    """How rows are answered.

    Args:
        max_new_tokens: of an answer, the token that ends it included.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that together have this probability.
        top_k: draw among the k likeliest only; None among all.
        seed: of sampling. With a row's id it gives that row's random numbers, so a row is answered
            alike in any batch and after a restart.
        stop: texts that end an answer; they are cut off.
        has_logprobs: whether log-probabilities of the answer's tokens are wanted.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    has_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; see `evaluate.prediction.Prediction` for the fields."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[tuple[str, float], ...] | None = None


class Engine(Protocol):
    """Answers rows."""

    def answer(
        self, questions: Sequence[Asked], answering: Answering
    ) -> Iterator[tuple[int, Answer]]:
        """Yields (place in `questions`, answer) as soon as each answer ends, in any order.

        Raises:
            OutOfMemoryError: one row alone does not fit (`memory.one-answer`).
            EvaluationError: a server fails for good (`evaluate.endpoint`).
        """
        ...
