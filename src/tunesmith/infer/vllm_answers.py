"""Answers by vLLM, where it is installed: the fastest way on a large GPU.

The adapter is merged into a copy of the weights first, in a folder that is gone afterwards, so all
kinds of adapters fare alike. Written for vLLM from 0.22 on (`LLM.generate` with token ids, as its
documentation has it). Never run with vLLM itself: tests use a stand-in with the same interface.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.infer.answers import Answer, Answering, Asked
from tunesmith.infer.stop_text import StopTexts, pieces
from tunesmith.types import Tokenizer

CHUNK_ROWS = 512
"""Rows that are handed over at once: each chunk is written down when it is done."""


@dataclass
class VllmAnswers:
    """vLLM in this process.

    Args:
        llm: a `vllm.LLM`.
        make_params: `vllm.SamplingParams`.
        tokenizer: of the model.
        stop_ids: tokens that end an answer.
    """

    llm: Any
    make_params: Callable[..., Any]
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]

    def answer(
        self, questions: Sequence[Asked], answering: Answering
    ) -> Iterator[tuple[int, Answer]]:
        """See `infer.answers.Engine`; the longest prompts come first."""
        order = sorted(range(len(questions)), key=lambda n: -len(questions[n].ids))
        for start in range(0, len(order), CHUNK_ROWS):
            numbers = order[start : start + CHUNK_ROWS]
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(questions[number].ids)} for number in numbers],
                [self._params(questions[number], answering) for number in numbers],
                use_tqdm=False,
            )
            for number, output in zip(numbers, outputs, strict=True):
                yield number, self._answer(questions[number], output.outputs[0], answering)

    def _params(self, question: Asked, answering: Answering) -> Any:
        return self.make_params(
            temperature=answering.temperature,
            top_p=answering.top_p,
            top_k=answering.top_k or 0,
            max_tokens=answering.max_new_tokens,
            # Ours alone end an answer, in all engines.
            ignore_eos=True,
            stop_token_ids=list(self.stop_ids),
            stop=list(answering.stop) or None,
            seed=(answering.seed + int(question.id[:8], 16)) % 2**31,
            logprobs=1 if answering.has_logprobs else None,
            # Stop texts are looked for in the text.
            detokenize=bool(answering.stop),
        )

    def _answer(self, question: Asked, output: Any, answering: Answering) -> Answer:
        ids = list(output.token_ids)
        is_ended = bool(ids) and ids[-1] in self.stop_ids
        pairs = None
        if answering.has_logprobs:
            logps = [
                place[token].logprob for place, token in zip(output.logprobs, ids, strict=True)
            ]
            pairs = tuple(zip(pieces(self.tokenizer, ids), logps, strict=True))
        stops = StopTexts(self.tokenizer, answering.stop)
        return Answer(
            stops.answer(ids[:-1] if is_ended else ids),
            "stop" if is_ended or output.finish_reason == "stop" else "length",
            len(question.ids),
            len(ids),
            pairs,
        )


def find_vllm() -> Any:
    """The module.

    Raises:
        RecipeError: it is not installed (`recipe.engine`).
    """
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise RecipeError(
            "recipe.engine",
            "--engine",
            found=f"vllm, which cannot be imported ({error})",
            expected="vLLM 0.22 or newer, beside a GPU",
            try_="pip install vllm, or leave --engine out; a server of it is named by its URL",
        ) from error


def open_vllm_answers(
    vllm: Any,
    folder: Path,
    tokenizer: Tokenizer,
    stop_ids: tuple[int, ...],
    *,
    dtype: str,
    most_tokens: int,
) -> VllmAnswers:
    """Starts vLLM with the model in a folder.

    Args:
        vllm: the module.
        folder: with config.json and weights, adapters merged.
        tokenizer: of the model.
        stop_ids: tokens that end an answer.
        dtype: number format of the weights.
        most_tokens: of a prompt and its answer together.
    """
    llm = vllm.LLM(
        model=str(folder),
        tokenizer=str(folder),
        trust_remote_code=False,
        dtype=dtype,
        max_model_len=most_tokens,
        generation_config="vllm",  # nothing of the model's own
    )
    return VllmAnswers(llm, vllm.SamplingParams, tokenizer, stop_ids)
