"""Which engine samples answers, and whether it can."""

from __future__ import annotations

from importlib.util import find_spec

from tunesmith.config.auto import number
from tunesmith.config.method import AdapterConfig
from tunesmith.config.policy import SamplingConfig
from tunesmith.config.recipe import Recipe
from tunesmith.engine.step import Run
from tunesmith.errors import RecipeError
from tunesmith.infer.vllm_engine import cannot_be_sent, open_vllm
from tunesmith.rollout.sampler import Engine, TransformersEngine

VLLM_MEMORY = 0.3
"""Share of the device that vLLM takes: its weights, and a cache for some hundred answers."""


def check_engine(recipe: Recipe) -> None:
    """Refuses a sampling engine that is not there, or that the model cannot be sent to.

    Raises:
        RecipeError: `recipe.engine`.
    """
    config = recipe.objective
    if not isinstance(config, SamplingConfig) or config.engine == "transformers":
        return
    if find_spec("vllm") is None:
        raise _engine_error(
            "vllm, which is not installed",
            "it, or transformers",
            "pip install 'tunesmith[vllm]', or ",
        )
    model, method = recipe.model, recipe.method
    if model.quantize != "none":
        raise _engine_error("vllm with model.quantize", "weights that are not quantized")
    if model.new_tokens or model.new_special_tokens or model.pad_vocabulary_to:
        raise _engine_error("vllm with new tokens", "the vocabulary of the model's files")
    if isinstance(method, AdapterConfig) and method.is_prompt:
        raise _engine_error(f"vllm with method {method.kind}", "a method that changes weights")


def open_engine(run: Run, config: SamplingConfig) -> Engine:
    """What samples answers of a run.

    Raises:
        RecipeError: the model cannot be sent to it (`recipe.engine`).
    """
    at_once = config.num_at_once(run.device.type)
    if config.engine == "vllm":
        check_engine(run.recipe)
        problem = cannot_be_sent(run.model)
        if problem is not None:
            raise _engine_error(f"vllm with {problem}", "a model that is its weights")
        return open_vllm(
            run.model,
            dtype=run.recipe.model.dtype,
            revision=run.recipe.model.revision,
            memory_share=config.engine_memory or VLLM_MEMORY,
            answers_at_once=at_once,
            max_tokens=number(run.recipe.data.max_length) + config.max_new_tokens,
            is_cut=config.top_p < 1 or config.top_k is not None,
        )
    return TransformersEngine(run.model, run.plain_autocast, at_once)


def _engine_error(found: str, expected: str, try_: str = "") -> RecipeError:
    return RecipeError(
        "recipe.engine",
        "objective.engine",
        found=found,
        expected=expected,
        try_=f"{try_}engine: transformers",
    )
