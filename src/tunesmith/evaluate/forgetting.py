"""The forgetting meter: what a model that is being tuned still makes of general questions.

Before the first step the model is read on answers to general questions, and what it finds
likeliest at every place is kept. Each later reading gives the loss on these answers and the
divergence from what was kept. Training on narrow data makes both grow; how much is harmless, only
a benchmark says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.recipe import SourceConfig
from tunesmith.data.columns import read_samples
from tunesmith.data.encode import Pipeline
from tunesmith.data.templates import Renderer
from tunesmith.errors import DataError, Problem
from tunesmith.evaluate.given import given_answers
from tunesmith.infer.likelihood import GivenAnswer, Likeliest, Likelihood, read_likelihoods
from tunesmith.io.atomic import write_atomic
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.types import Sample

SHIPPED = Path(__file__).parent / "general" / "questions.jsonl"
"""Sixty-four questions with answers, half of them Chinese: knowledge, arithmetic, language, format,
refusals. Written for this purpose. Every second one is read: 135 million parameters take 3 seconds
of one core for them, at every evaluation."""

MOST_ROWS = 200
"""Of data of the user's own: every evaluation reads them all."""

MOST_TOKENS = 1024
"""Longer ones would cost more than they tell."""

WARN_NATS = 0.2
"""A rise of the loss by so much is worth a word: perplexity has grown by a fifth."""


def general_answers(renderer: Renderer, file: Path | None = None) -> list[GivenAnswer]:
    """The general questions with their answers, as a model's template has them.

    Args:
        renderer: of the model.
        file: data of the user's own; None takes what is shipped.

    Raises:
        DataError: the file's rows are wrong, or none has an answer (`data.no-general`).
    """
    path = file or SHIPPED
    rows = list(islice(read_samples(SourceConfig(path=str(path)), [path]), MOST_ROWS))
    problems = [row for row in rows if isinstance(row, Problem)]
    if problems:
        raise DataError(problems)
    samples: list[Sample] = [row for row in rows if not isinstance(row, Problem)]
    samples = samples if file else samples[::2]
    found = [given for _, given in given_answers(Pipeline(renderer), samples) if given]
    found = [given for given in found if len(given.ids) <= MOST_TOKENS]
    if not found:
        expected = f"questions with answers, in at most {MOST_TOKENS:,} tokens each"
        raise DataError([Problem(str(path), "data.no-general", "no such row", expected)])
    return found


@dataclass
class ForgettingMeter:
    """Reads general answers while a run goes on.

    Args:
        model: in training.
        answers: that are read.
        file: keeps what the model found likeliest before the first step.
        autocast: the number format that the model's plain forward wants.
        is_stopped: asked before each batch.
        first_loss: before the first step; None until it is known.
        said: the rise that was warned of last.
        is_off: memory did not suffice.
        has_said_off: and that was said.
    """

    model: Any
    answers: Sequence[GivenAnswer]
    file: Path
    autocast: Callable[[], AbstractContextManager[Any]]
    is_stopped: Callable[[], bool]
    first_loss: float | None = None
    said: float = 0.0
    is_off: bool = False
    has_said_off: bool = False

    def measure(self, step: int) -> dict[str, float] | None:
        """`general_loss` and, where the beginning is known, `general_kl`; None if stopped.

        Nothing is found once memory did not suffice.

        Args:
            step: at 0 the model is what later readings are compared with.
        """
        is_first = step == 0
        if self.is_off:
            return {}
        try:
            readings = self._read(None if is_first else self._known(), remembers=is_first)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.is_off = True
            return {}
        if len(readings) < len(self.answers):
            return None
        in_order = [readings[number] for number in range(len(self.answers))]
        loss = -float(torch.cat([each.logp_L for each in in_order]).double().mean())
        if is_first:
            self.first_loss = loss
            _save(self.file, [e.likeliest for e in in_order if e.likeliest is not None], loss)
            return {"general_loss": loss, "general_kl": 0.0}
        found = {"general_loss": loss}
        divergences = [each.kl_L for each in in_order if each.kl_L is not None]
        if divergences:
            found["general_kl"] = float(torch.cat(divergences).double().mean())
        return found

    def _read(self, known: list[Likeliest] | None, *, remembers: bool) -> dict[int, Likelihood]:
        with self.autocast():
            found = read_likelihoods(
                self.model,
                self.answers,
                remembers=remembers,
                beside=known,
                is_stopped=self.is_stopped,
            )
            return dict(found)

    def warning(self, found: dict[str, float]) -> str | None:
        """A word on a loss that has grown, at each doubling of the rise."""
        if self.is_off and not self.has_said_off:
            self.has_said_off = True
            return "no memory to measure what the model forgets: general questions are left out"
        if self.first_loss is None or not found:
            return None
        rise = found["general_loss"] - self.first_loss
        if rise < max(WARN_NATS, 2 * self.said):
            return None
        self.said = rise
        return (
            f"the model forgets: its loss on general questions rose from {self.first_loss:.3f} to "
            f"{found['general_loss']:.3f}; a lower learning rate, fewer epochs or data.replay "
            "keep more"
        )

    def _known(self) -> list[Likeliest] | None:
        """What the model found likeliest before the first step, if it was of the same answers."""
        from safetensors.torch import load_file

        if not self.file.exists():
            return None
        kept = load_file(self.file)
        lengths = [len(answer.ids) - answer.first for answer in self.answers]
        if kept["lengths"].tolist() != lengths:
            return None
        self.first_loss = float(kept["loss"])
        parts = zip(kept["ids"].split(lengths), kept["logp"].split(lengths), strict=True)
        return [Likeliest(ids_LK, logp_LK) for ids_LK, logp_LK in parts]


def _save(file: Path, likeliest: Sequence[Likeliest], loss: float) -> None:
    from safetensors.torch import save

    tensors = {
        "ids": torch.cat([each.ids_LK for each in likeliest]),
        "logp": torch.cat([each.logp_LK for each in likeliest]),
        "lengths": torch.tensor([len(each.ids_LK) for each in likeliest]),
        "loss": torch.tensor(loss, dtype=torch.float64),
    }
    write_atomic(file, save(tensors))
