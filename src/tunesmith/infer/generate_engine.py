"""Answers by transformers' own `generate`, for models whose layers slots do not fit."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from tunesmith.errors import OutOfMemoryError
from tunesmith.infer.answers import Answer, Answering, Asked
from tunesmith.infer.batch import Row, answer_of, context_tokens
from tunesmith.infer.stop_text import StopTexts
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.types import Tokenizer

NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
}
"""In place of what a model's own generation config says: slots know none of it, and a model is
compared with the one that it began as, which may be answered for by them."""


@dataclass
class GenerateEngine:
    """Answers in padded batches of like lengths.

    In sampling a row's answer depends on the batch it is in: `generate` draws all of a batch from
    one stream of numbers.

    Args:
        model: in eval mode.
        tokenizer: of it.
        stop_ids: tokens that end an answer.
        at_once: rows of a batch; halved for good where memory ends.
    """

    model: Any
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    at_once: int = 16

    def answer(
        self, questions: Sequence[Asked], answering: Answering
    ) -> Iterator[tuple[int, Answer]]:
        """See `infer.answers.Engine`."""
        stops = StopTexts(self.tokenizer, answering.stop)
        context = context_tokens(self.model)
        waiting = [
            Row(n, each.ids, _most(len(each.ids), answering, context), None)
            for n, each in enumerate(questions)
        ]
        waiting.sort(key=lambda row: -len(row.prompt))
        while waiting:
            batch = _together(waiting[: self.at_once], context)
            if self._try(batch, answering, stops):
                del waiting[: len(batch)]
                for row in batch:
                    yield row.number, answer_of(row, stops, self.stop_ids, answering)

    def _try(self, rows: list[Row], answering: Answering, stops: StopTexts) -> bool:
        """Answers a batch; False where memory ended, after which it is smaller."""
        try:
            self._generate(rows, answering, stops)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
        else:
            return True
        if len(rows) == 1:
            raise OutOfMemoryError(
                "memory.one-answer",
                "max_new_tokens",
                found=f"no memory for one answer of up to {rows[0].most:,} tokens",
                expected="an answer that fits",
                try_="a smaller --max-new-tokens",
            )
        self.at_once = len(rows) // 2
        return False

    @torch.inference_mode()
    def _generate(self, rows: list[Row], answering: Answering, stops: StopTexts) -> None:
        for row in rows:  # memory may have ended in the middle of the last try
            row.begin_anew()
        longest = max(len(row.prompt) for row in rows)
        filler = self.tokenizer.eos_token_id
        ids_BT, mask_BT = (
            torch.tensor([[fill] * (longest - len(row.prompt)) + own(row) for row in rows])
            for fill, own in ((filler, _prompt), (0, lambda row: [1] * len(row.prompt)))
        )
        torch.manual_seed(answering.seed)
        out = self.model.generate(
            input_ids=ids_BT.to(self.model.device),
            attention_mask=mask_BT.to(self.model.device),
            max_new_tokens=max(row.most for row in rows),
            eos_token_id=list(self.stop_ids),
            pad_token_id=filler,
            return_dict_in_generate=True,
            output_logits=answering.has_logprobs,
            **NEUTRAL,
            **_drawing(answering),
        )
        heat = answering.temperature if answering.temperature > 0 else 1.0
        for place, row in enumerate(rows):
            for number, token in enumerate(out.sequences[place, longest:].tolist()):
                logp = 0.0
                if answering.has_logprobs:
                    logp = float((out.logits[number][place].float() / heat).log_softmax(-1)[token])
                row.ids.append(token)
                row.logp.append(logp)
                row.is_complete = token in self.stop_ids or stops.have_come(row.ids)
                if row.is_complete or len(row.ids) == row.most:
                    break


def _together(rows: list[Row], context: int | None) -> list[Row]:
    """The first rows that go on behind the longest prompt without leaving the context."""
    room = math.inf if context is None else context - len(rows[0].prompt)
    return list(takewhile(lambda row: row is rows[0] or row.most <= room, rows))


def _prompt(row: Row) -> list[int]:
    return list(row.prompt)


def _most(length: int, answering: Answering, context: int | None) -> int:
    most = answering.max_new_tokens
    return most if context is None else max(1, min(most, context - length))


def _drawing(answering: Answering) -> dict[str, Any]:
    if answering.temperature <= 0:
        # Sampling values of the model's own generation config would only draw warnings.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": answering.temperature,
        "top_p": answering.top_p,
        "top_k": answering.top_k or 0,
    }
