"""A stand-in for vLLM, which no machine of these tests has: only what `infer/vllm_engine.py` calls.

It answers by our own `sample_answers` on transformers' forward, takes no argument that vLLM would
not, and gives requests back in another order than they came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tunesmith.infer.sample import Drawing, sample_answers


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.temperature < 1e-5 and self.n > 1:
            raise ValueError("n must be 1 when using greedy sampling")


class Worker:
    """The model that vLLM holds: it takes weights by the names of the model's files."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.num_loads = 0

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own, loaded = dict(self.model.named_parameters()), set[str]()
        for name, weight in weights:
            own[name].copy_(weight)
            loaded.add(name)
        assert loaded == set(own)
        self.num_loads += 1
        return loaded


class Engine:
    """Requests under way; a step is a token of each."""

    def __init__(self, worker: Worker, logprobs_mode: str) -> None:
        self.worker = worker
        self.logprobs_mode = logprobs_mode
        self.requests: list[tuple[str, list[int], SamplingParams]] = []
        self.num_steps = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        self.num_steps += 1
        if self.num_steps % self.requests[0][2].max_tokens:
            return []
        outputs = [self.answered(*request) for request in reversed(self.requests)]
        self.requests = []
        return outputs

    def answered(self, request_id: str, ids: list[int], params: SamplingParams) -> Any:
        drawing = Drawing(
            tuple(params.stop_token_ids or ()),
            params.max_tokens,
            params.temperature,
            params.top_k or None,
            params.top_p,
        )
        shape = (params.max_tokens,)
        rows = []
        for index in range(params.n):  # as vLLM seeds the answers to one prompt
            generator = torch.Generator().manual_seed((params.seed or 0) + index)
            rows.append(torch.rand(shape, generator=generator, dtype=torch.float64))
        found = sample_answers(self.worker.model, [ids], torch.stack(rows)[None], drawing)
        assert found is not None
        assert self.logprobs_mode == "processed_logprobs" or params.temperature in (0.0, 1.0)
        outputs = [
            SimpleNamespace(
                index=index,
                token_ids=list(drawn.ids),
                logprobs=[
                    {0: SimpleNamespace(logprob=-99.0), token: SimpleNamespace(logprob=logp)}
                    for token, logp in zip(drawn.ids, drawn.logp, strict=True)
                ],
                finish_reason="stop" if drawn.is_complete else "length",
            )
            for index, drawn in enumerate(found[0])
        ]
        return SimpleNamespace(request_id=request_id, finished=True, outputs=outputs[::-1])


class LLM:
    """The offline entry of vLLM."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
    ) -> None:
        from transformers import AutoModelForCausalLM

        assert skip_tokenizer_init
        assert not trust_remote_code
        assert generation_config == "vllm"
        assert max_model_len
        assert max_num_seqs
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.memory_share = gpu_memory_utilization
        self.worker = Worker(loaded)
        self.llm_engine = Engine(self.worker, logprobs_mode)
        self.num_requests = 0
        self.has_stale_cache = True

    def apply_model(self, func: Callable[[Worker], Any]) -> list[Any]:
        self.has_stale_cache = True
        return [func(self.worker)]

    def reset_prefix_cache(self) -> bool:
        self.has_stale_cache = False
        return True

    def enqueue(
        self, prompts: list[Any], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[str]:
        assert not use_tqdm
        assert not self.has_stale_cache
        names = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            names.append(str(self.num_requests))
            self.llm_engine.requests.append((names[-1], prompt["prompt_token_ids"], params))
            self.num_requests += 1
        return names


def make_module() -> ModuleType:
    """What `import vllm` gives."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    vars(module).update(LLM=LLM, SamplingParams=SamplingParams)
    return module
