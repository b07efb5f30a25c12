"""The loop on a tiny model: exact accumulation, guards, early stopping, plain results."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import make_run, train_step
from tunesmith import fine_tune, load_recipe
from tunesmith.engine.events import EventLog, read_events
from tunesmith.engine.step import Run
from tunesmith.types import Event


def gradients(run: Run) -> list[torch.Tensor]:
    return [p.grad.clone() for _, p in run.parameters if p.grad is not None]


@pytest.mark.parametrize("budget", [24, 60, 100_000])
def test_any_split_into_micro_batches_gives_the_same_gradients(
    tiny_recipe: Callable[..., Path], budget: int
) -> None:
    recipe = tiny_recipe(method={"dropout": 0.0})
    with make_run(recipe, "train.micro_batch_tokens=100000") as whole:
        expected = train_step(whole, 0)
    with make_run(recipe, f"train.micro_batch_tokens={budget}") as parts:
        batch = parts.loader.batch(0)
        assert (len(batch.micro_batches) > 1) == (budget < 1000)
        loss, norm, _ = train_step(parts, 0)
    assert loss == pytest.approx(expected[0], abs=1e-6)
    assert norm == pytest.approx(expected[1], abs=1e-5)
    for ours, theirs in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_bad_numbers_never_reach_the_weights(tiny_recipe: Callable[..., Path]) -> None:
    with make_run(tiny_recipe()) as run:
        with torch.no_grad():
            next(p for n, p in run.parameters if "lora_A" in n).fill_(float("nan"))
        before = [parameter.detach().clone() for _, parameter in run.parameters]
        loss, norm, is_good = train_step(run, 0)
    assert not is_good
    assert math.isnan(loss)
    assert math.isnan(norm)
    for (_, after), old in zip(run.parameters, before, strict=True):
        assert torch.equal(after.detach().nan_to_num(), old.nan_to_num())


@pytest.mark.slow
def test_early_stopping(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(
        train={"learning_rate": 0.5, "schedule": "constant", "epochs": 30},
        evaluate={"every": 2, "early_stopping": 2},
    )
    _, summary = fine_tune(load_recipe(recipe))
    steps = int(str(summary["steps"]))
    assert steps < 120
    assert steps == int(str(summary["best_step"])) + 4


def test_evaluation_every_n_steps_and_the_event_stream(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(evaluate={"every": 6})
    seen: list[Event] = []
    run, summary = fine_tune(load_recipe(recipe), listeners=[seen.append])
    lines = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [line["event"] for line in lines] == [event.kind for event in seen]
    assert [e.step for e in seen if e.kind == "evaluation"] == [0, 6, 12, 18, 20]
    steps = [event for event in seen if event.kind == "step"]
    assert [event.step for event in steps] == list(range(1, 21))
    assert steps[-1].data["epoch"] == 5.0
    assert all(event.data["supervised_tokens"] for event in steps)
    assert seen[-1].kind == "done"
    losses = [float(str(event.data["loss"])) for event in steps]
    assert summary["train_loss"] == pytest.approx(sum(losses) / 20)
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_events_after_a_crash_count_once(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    with EventLog(file) as log:
        log.emit("step", 1, {"loss": 1.0})
        log.emit("step", 2, {"loss": 9.0})
        log.emit("step", 2, {"loss": 2.0})
    with file.open("a") as stream:
        stream.write('{"event": "st')
    assert [event["loss"] for event in read_events(file)] == [1.0, 2.0]


def test_every_sample_once_an_epoch(tiny_recipe: Callable[..., Path]) -> None:
    with make_run(tiny_recipe()) as run:
        per_epoch = run.loader.steps_per_epoch
        for epoch in (0, 1):
            ids = [
                sample
                for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
                for sample in run.loader.batch(step).sample_ids
            ]
            assert sorted(ids) == sorted(run.loader.samples.tolist())
        first, second = run.loader.batch(0), run.loader.batch(per_epoch)
    assert first.sample_ids != second.sample_ids


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_result_loads_in_plain_transformers(
    tiny_recipe: Callable[..., Path], method: str
) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = fine_tune(load_recipe(tiny_recipe(method={"name": "lora"}), [f"method={method}"]))
    kind: Any = AutoPeftModelForCausalLM if method == "lora" else AutoModelForCausalLM
    model = kind.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.chat_template
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids).logits.shape == (1, 3, 259)
    text = (run.model / "README.md").read_text()
    assert "trained with tunesmith" in text
