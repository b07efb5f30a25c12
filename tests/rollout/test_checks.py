"""What goes wrong with sampled answers is refused before a model is loaded, or does not happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import make_run
from tunesmith.config.load import recipe_from
from tunesmith.config.policy import GroupConfig, policy_presets
from tunesmith.errors import RecipeError
from tunesmith.rollout.judge import open_judge
from tunesmith.rollout.prompts import prompts_of, spoken
from tunesmith.types import SilentReporter

OBJECTIVE = {"name": "grpo", "rewards": "math", "max_new_tokens": 8}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"method": {"name": "lora", "dropout": 0.1}}, "method.dropout"),
        ({"method": "prefix_tuning"}, "method"),
        ({"method": "prompt_tuning"}, "method"),
        ({"method": {"dropout": 0.0}, "train": {"neftune_alpha": 5.0}}, "train.neftune_alpha"),
        (
            {"method": {"dropout": 0.0}, "objective": {**OBJECTIVE, "max_new_tokens": 490}},
            "objective.max_new_tokens",
        ),
    ],
)
def test_what_would_go_wrong_is_refused(
    tiny_recipe: Callable[..., Path], changes: dict[str, Any], where: str
) -> None:
    changes = {"objective": OBJECTIVE, "data": {"max_length": 40}, **changes}
    if isinstance(changes["method"], str):
        changes["method"] = {"name": changes["method"], "rank": None, "dropout": None}
        recipe = tiny_recipe(**changes)
        tree = json.loads(recipe.read_text())
        tree["method"] = changes["method"]["name"]
        recipe.write_text(json.dumps(tree))
    else:
        recipe = tiny_recipe(**changes)
    with pytest.raises(RecipeError) as caught, make_run(recipe):
        pass
    assert (caught.value.code, caught.value.where) == ("recipe.sampling", where)


def test_only_prompts_count_for_the_length(tiny_recipe: Callable[..., Path]) -> None:
    """Long references are no reason to leave a prompt out; long prompts are left out, never cut."""
    rows = [{"prompt": "short", "answer": "x" * 300}] * 3 + [{"prompt": "y" * 100}] * 3
    rows = [{**row, "prompt": f"{n} {row['prompt']}"} for n, row in enumerate(rows)]
    recipe = tiny_recipe(method={"dropout": 0.0}, objective=OBJECTIVE)
    data = recipe.parent / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.train={data}", "data.validation=0", "data.max_length=60"]
    for overlong in ("auto", "cut_left"):
        with make_run(recipe, *changes, f"data.overlong={overlong}") as run:
            assert sorted(run.loader.samples.tolist()) == [0, 1, 2]


def test_what_a_template_thinks_is_no_reference() -> None:
    assert spoken("<think>\n\n</think>\n\n4") == "4"
    assert spoken(" 4 ") == "4"


@pytest.mark.slow
def test_the_reference_of_qwen_is_the_rows_own(
    tokenizers_folder: Path, tiny_recipe: Callable[..., Path]
) -> None:
    """Its template writes an empty thinking block before every answer."""
    from transformers import AutoTokenizer

    from conftest import make_tiny_config

    recipe = tiny_recipe(method={"dropout": 0.0}, objective=OBJECTIVE)
    folder = recipe.parent / "qwen"
    torch.manual_seed(0)
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(make_tiny_config(vocab_size=151_936)).save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizers_folder / "qwen3")
    tokenizer.save_pretrained(folder)
    data = recipe.parent / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "2+2?", "answer": "4"}) + "\n")
    changes = [f"model.id={folder}", f"data.train={data}", "data.validation=0"]
    with make_run(recipe, *changes) as run:
        assert prompts_of(run.loader, [0], tokenizer)[0].reference == "4"


def test_answers_end_where_the_template_ends_them(byte_tokenizer: Any) -> None:
    """Also where the tokenizer's EOS is another token, as of base models with a chat template."""
    byte_tokenizer.eos_token = "<|endoftext|>"
    config = recipe_from({"model": "m", "data": "d", "objective": OBJECTIVE}).objective
    ends = (byte_tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    judge = open_judge(config, byte_tokenizer, ends, Path, SilentReporter())
    assert judge is not None
    assert judge.end_ids == (byte_tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_a_clip_of_the_users_own_holds_upward_too() -> None:
    for name, expected in (("gspo", 4e-4), ("dapo", 0.28), ("grpo", 0.2)):
        config = GroupConfig.model_validate({"name": name, "rewards": "math"})
        assert policy_presets(config)["clip_high"] == expected
        config = GroupConfig.model_validate({"name": name, "rewards": "math", "clip": 0.05})
        assert policy_presets(config)["clip_high"] == 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "grpo", "ratio_cap": 1.05},
        {"name": "rloo", "drop_equal": True},
        {"name": "ppo", "kl_weight": 0, "kl_target": 6},
        {"name": "grpo", "rewards": []},
    ],
)
def test_settings_without_an_effect_are_refused(settings: dict[str, Any]) -> None:
    objective = {"rewards": "math", **settings}
    with pytest.raises(RecipeError):
        recipe_from({"model": "m", "data": "d", "objective": objective})
