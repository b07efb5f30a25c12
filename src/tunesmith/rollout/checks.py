"""Refuses, before a model is loaded, what goes wrong where it samples answers itself."""

from __future__ import annotations

from tunesmith.config.auto import Facts, number
from tunesmith.config.method import AdapterConfig, draws_numbers
from tunesmith.config.policy import SamplingConfig
from tunesmith.config.recipe import Recipe
from tunesmith.errors import RecipeError
from tunesmith.rollout.engines import check_engine


def check_sampling(recipe: Recipe) -> None:
    """Refuses what makes an answer less likely in learning than it was when it was sampled.

    Dropout and noise do. PEFT's forward with virtual tokens does, too: with a cache it puts them
    before every token again (0.21).

    Raises:
        RecipeError: it is asked for (`recipe.sampling`), or an engine that is not there
            (`recipe.engine`).
    """
    if not isinstance(recipe.objective, SamplingConfig):
        return
    check_engine(recipe)
    method, noise = recipe.method, recipe.train.neftune_alpha
    if draws_numbers(method):
        raise _refusal("method.dropout", "dropout", "0")
    if noise is not None:
        raise _refusal("train.neftune_alpha", f"{noise:g}", "null")
    if isinstance(method, AdapterConfig) and method.is_prompt:
        raise _refusal("method", f"virtual tokens ({method.kind})", "a method that changes weights")


def check_context(recipe: Recipe, facts: Facts) -> None:
    """Refuses answers that could reach over the end of what the model knows.

    Raises:
        RecipeError: they could (`recipe.sampling`).
    """
    if not isinstance(recipe.objective, SamplingConfig):
        return
    most = recipe.objective.max_new_tokens
    longest = min(number(recipe.data.max_length), facts.longest_tokens)
    if longest + most > facts.context_tokens:
        raise RecipeError(
            "recipe.sampling",
            "objective.max_new_tokens",
            found=f"{most} behind a prompt of {longest} tokens",
            expected=f"together at most {facts.context_tokens}, the model's context",
            try_="a smaller one, or a smaller data.max_length, which leaves longer prompts out",
        )


def _refusal(where: str, found: str, expected: str) -> RecipeError:
    return RecipeError(
        "recipe.sampling",
        where,
        found=f"{found} with answers that the model samples itself",
        expected=f"{expected}: answers are learned from by the model that sampled them",
    )
