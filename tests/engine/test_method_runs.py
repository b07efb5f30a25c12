"""Kinds of methods through the whole of a run: it learns, stops, goes on, and loads again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.runs import final_bytes, run_and_stop, run_to_end
from tunesmith.infer.chat_model import open_chat_model
from tunesmith.types import SilentReporter

METHODS: dict[str, dict[str, Any]] = {
    "dora": {"name": "dora", "rank": 4, "dropout": 0.1},
    "pissa": {"name": "pissa", "rank": 4},
    "lora+": {"name": "rslora", "rank": 4, "plus_ratio": 16, "train_modules": ["norm"]},
    "freeze": {"name": "freeze", "first": 1, "pattern": "norm"},
    "ia3": {"name": "ia3"},
    "oft": {"name": "oft", "oft_block_size": 8, "r": 0},
    "prompt": {"name": "prompt_tuning", "num_virtual_tokens": 5},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "prefix": {"name": "prefix_tuning", "num_virtual_tokens": 5, "prefix_projection": True},
}


def recipe_for(tiny_recipe: Callable[..., Path], name: str) -> Path:
    method, train = METHODS[name], {"neftune_alpha": 5.0} if name in ("lora+", "prompt") else {}
    path = tiny_recipe(train={"epochs": 2, **train})
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": method}))
    return path


@pytest.mark.parametrize(
    "name",
    [n if n == "prompt" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
def test_a_stopped_run_ends_in_the_same_bits(
    tiny_recipe: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    recipe = recipe_for(tiny_recipe, name)
    summary = run_to_end(recipe, tmp_path / "whole")
    run_and_stop(recipe, tmp_path / "parts", 3)
    run_to_end(recipe, tmp_path / "parts")
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")
    assert summary["eval_loss"] < summary["eval_loss_before"]
    chat = open_chat_model(str(tmp_path / "whole"), SilentReporter())
    assert hasattr(chat.model, "peft_config") == (name != "freeze")
