"""Samples answers with vLLM, which holds a second copy of the weights on the same device.

Before each sampling the weights as they are now are sent to it, adapters added. It computes with
kernels of its own, so the log-probabilities of what it samples differ from those that the training
computes: `engine_ratio` in the log says how far, and `objective.engine_weight_cap` weighs tokens
by it, at most so much (truncated importance sampling). Each prompt has a seed of its own, so a
sampling repeats as far as vLLM's kernels do; bits are not promised.

Written for vLLM from 0.22 on (`LLM.enqueue`, `apply_model`, `reset_prefix_cache`, and of its
`llm_engine` `step` and `has_unfinished_requests`), as its documentation has them; TRL 1.16 names
0.22 to 0.31. Never run with vLLM itself: tests use a stand-in with the same interface.

Shape letters: P prompts, K answers of each, L new tokens at most.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tunesmith.infer.sample import Drawing, Drawn
from tunesmith.model.merged import base_view, cannot_be_merged, merged_weights

SEED_BITS = 53
"""All that a double in [0, 1) has to give; vLLM adds an answer's number to its prompt's seed."""

Weights = Iterator[tuple[str, torch.Tensor]]


@dataclass
class VllmEngine:
    """vLLM in this process.

    Args:
        llm: a `vllm.LLM`.
        make_params: `vllm.SamplingParams`.
        weights: gives the names and weights of the model as it is now.
    """

    llm: Any
    make_params: Callable[..., Any]
    weights: Callable[[], Weights]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniform_PKL: torch.Tensor,
        drawing: Drawing,
        is_stopped: Callable[[], bool],
    ) -> list[list[Drawn]] | None:
        """K answers to each prompt; None if it was stopped, after which it samples no more.

        Args:
            prompts: token ids.
            uniform_PKL: the first number of each prompt seeds its answers.
            drawing: how.
            is_stopped: asked before each token of all answers.
        """
        self.llm.apply_model(partial(_take_over, self.weights()))
        self.llm.reset_prefix_cache()  # of other weights
        seeds = (uniform_PKL[:, 0, 0].double() * 2.0**SEED_BITS).long().tolist()
        self.llm.enqueue(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            [self._params(drawing, uniform_PKL.shape[1], seed) for seed in seeds],
            use_tqdm=False,
        )
        finished: list[Any] = []
        while self.llm.llm_engine.has_unfinished_requests():
            if is_stopped():
                return None
            finished += [output for output in self.llm.llm_engine.step() if output.finished]
        # As vLLM's own `generate` puts them in order.
        finished.sort(key=lambda output: int(output.request_id))
        stop_ids = frozenset(drawing.stop_ids)
        return [[_drawn(each, stop_ids) for each in _by_index(output)] for output in finished]

    def _params(self, drawing: Drawing, num_answers: int, seed: int) -> Any:
        return self.make_params(
            n=num_answers,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            top_k=drawing.top_k or 0,
            max_tokens=drawing.max_tokens,
            # Ours alone end an answer, in both engines.
            ignore_eos=True,
            stop_token_ids=list(drawing.stop_ids),
            seed=seed,
            logprobs=1,
            detokenize=False,
        )


def open_vllm(
    model: Any,
    *,
    dtype: str,
    revision: str | None,
    memory_share: float,
    answers_at_once: int,
    max_tokens: int,
    is_cut: bool,
) -> VllmEngine:
    """Starts vLLM beside a model in training.

    Args:
        model: with its adapter, as it is trained.
        dtype: float32 or bfloat16.
        revision: of its base, if that is of a hub.
        memory_share: of the device's memory, for weights and cache of vLLM together.
        answers_at_once: at most so many.
        max_tokens: of prompt and answer together.
        is_cut: tokens are drawn among the likeliest only.

    Raises:
        ModelError: the base model's files cannot be read any more.
    """
    # Read at its import: the engine is to run in this process, where it sees our tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    vllm = importlib.import_module("vllm")
    with base_view(model, revision) as view:
        llm = vllm.LLM(
            model=str(view),
            # Token ids go in and come out; and its warm-up would render the model's own template.
            skip_tokenizer_init=True,
            trust_remote_code=False,
            dtype=dtype,
            gpu_memory_utilization=memory_share,
            max_model_len=max_tokens,
            max_num_seqs=answers_at_once,
            # Processed ones are at the temperature, but of the tokens that are left after a cut;
            # raw ones are of all tokens, but at temperature 1.
            logprobs_mode="raw_logprobs" if is_cut else "processed_logprobs",
            generation_config="vllm",  # nothing of the model's own
        )
    return VllmEngine(llm, vllm.SamplingParams, partial(merged_weights, model))


def cannot_be_sent(model: Any) -> str | None:
    """What of a model vLLM could not be sent; None if nothing."""
    return cannot_be_merged(model)


def _take_over(weights: Weights, model: Any) -> None:
    """Runs in vLLM's worker, which is this process."""
    model.load_weights(weights)


def _by_index(output: Any) -> list[Any]:
    return sorted(output.outputs, key=lambda answer: answer.index)


def _drawn(answer: Any, stop_ids: frozenset[int]) -> Drawn:
    ids = tuple(answer.token_ids)
    logp = (place[token].logprob for place, token in zip(answer.logprobs, ids, strict=True))
    return Drawn(ids, tuple(logp), ids[-1] in stop_ids)
