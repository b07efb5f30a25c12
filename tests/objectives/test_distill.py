"""Distillation: exact against full logits, with all heads; teachers found, checked, noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CohereConfig, Gemma2Config, LlamaConfig, PhiConfig

from conftest import ROOT, TINY_SIZES, make_byte_tokenizer, make_tiny_config, write_tiny_recipe
from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from tunesmith import fine_tune, load_recipe
from tunesmith.config.recipe import FullConfig, LoraConfig
from tunesmith.data.pack import build_batch
from tunesmith.data.tokenize import TokenSequence
from tunesmith.engine.step import evaluate_loss
from tunesmith.errors import ModelError, RecipeError, RunError
from tunesmith.job import prepare
from tunesmith.model.adapters import attach, trainable_parameters
from tunesmith.model.load import random_model
from tunesmith.objectives import distill
from tunesmith.objectives.distill import DistillObjective
from tunesmith.objectives.lm import decode
from tunesmith.objectives.preference_losses import kl_rows
from tunesmith.types import PackedBatch, SilentReporter

SIZES = {**TINY_SIZES, "pad_token_id": 0}
FULL = FullConfig(name="full")
STUDENTS = {
    "tied head": (LlamaConfig(**SIZES, tie_word_embeddings=True), FULL),
    "own head": (LlamaConfig(**SIZES, tie_word_embeddings=False), FULL),
    "biased head": (PhiConfig(**SIZES, resid_pdrop=0.0), FULL),
    "soft cap": (Gemma2Config(**SIZES, query_pre_attn_scalar=8), FULL),
    "frozen head": (LlamaConfig(**SIZES), LoraConfig(rank=4, alpha=8.0)),
    "adapted head": (
        LlamaConfig(**SIZES, tie_word_embeddings=False),
        LoraConfig(rank=4, alpha=8.0, target=["q_proj", "lm_head"]),
    ),
}
OBJECTIVES = {
    "forward": {},
    "reverse": {"divergence": "reverse", "temperature": 2.0},
    "jsd": {"divergence": "jsd", "beta": 0.2, "sft_weight": 0.3},
}


@pytest.fixture
def batch() -> PackedBatch:
    rng = np.random.default_rng(0)

    def sequence(length: int, *runs: tuple[int, int, float]) -> TokenSequence:
        return TokenSequence(rng.integers(1, 90, length).astype(np.int32), runs)

    runs = [(9, (4, 5, 1.0)), (7, (2, 2, 0.5)), (3, (0, 3, 0.25)), (4,)]
    return build_batch([(i, sequence(length, *of)) for i, (length, *of) in enumerate(runs)])


def build(config: Any, method: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config.initializer_range = 0.5  # far apart, so that the divergences are not tiny
    model = attach(random_model(config, is_bf16=False).double(), method).double()
    for name, parameter in trainable_parameters(model):
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_teacher(vocabulary: int = 97) -> Any:
    """Another shape, another head, another scale, and fewer rows in it."""
    config = CohereConfig(
        **{**SIZES, "vocab_size": vocabulary, "hidden_size": 16, "head_dim": 4}, logit_scale=0.7
    )
    return build(config, FULL, seed=1).eval().requires_grad_(False)


def plain_logits(model: Any, batch: PackedBatch) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits = base.get_output_embeddings()(decode(base, batch))[batch.row_N]
    if base.config.model_type == "cohere":
        logits = logits * base.config.logit_scale
    if base.config.model_type == "gemma2":
        cap = base.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
    return logits


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", STUDENTS)
def test_loss_and_gradients_equal_full_logits(
    name: str, objective: str, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "CHUNK_BYTES", 3 * 4 * 101)  # several parts of an adapted head
    model, teacher = build(*STUDENTS[name], seed=0).train(), make_teacher()
    options: Any = OBJECTIVES[objective]
    tensors = [parameter for _, parameter in trainable_parameters(model)]
    student_NV, teacher_NV = plain_logits(model, batch)[:, :97], plain_logits(teacher, batch)
    temperature = options.get("temperature", 1.0)
    share, kind = options.get("sft_weight", 0.0), options.get("divergence", "forward")
    loss_N = kl_rows(
        student_NV, teacher_NV, kind,
        temperature=temperature, teacher_share=options.get("beta", 0.5),
    )  # fmt: skip
    plain_N = torch.nn.functional.cross_entropy(student_NV, batch.target_N, reduction="none")
    expected = ((1 - share) * loss_N + share * plain_N) @ batch.weight_N.double()
    wanted = torch.autograd.grad(expected, tensors, allow_unused=True)
    kl_N = kl_rows(student_NV, teacher_NV, temperature=temperature)
    same_N = (student_NV.argmax(-1) == teacher_NV.argmax(-1)).double()

    result = DistillObjective(teacher, **options).step(model, batch)
    grads = torch.autograd.grad(result.loss_sum, tensors, allow_unused=True)
    # Rotary tables and norms of transformers are fp32 in places: the same on both sides.
    torch.testing.assert_close(result.loss_sum, expected, rtol=0, atol=1e-11)
    sums = {"kl": kl_N, "agreement": same_N}
    for key, value_N in sums.items():
        sum_ = value_N.detach() @ batch.weight_N.double()
        torch.testing.assert_close(result.metrics[key], sum_, rtol=0, atol=1e-11)
        assert not result.metrics[key].requires_grad
    for ours, theirs in zip(grads, wanted, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["own head", "adapted head"])
def test_a_teacher_like_the_student_costs_nothing(name: str, batch: PackedBatch) -> None:
    model = build(*STUDENTS[name], seed=0)
    with torch.no_grad():
        result = DistillObjective(model).step(model, batch)
    assert abs(result.loss_sum.item()) < 1e-12
    assert result.metrics["agreement"].item() == pytest.approx(batch.loss_weight)


# Runs


def save_teacher(folder: Path, vocabulary: int = 259, **changes: Any) -> Path:
    from transformers import LlamaForCausalLM

    torch.manual_seed(5)
    config = make_tiny_config(vocabulary, **{"initializer_range": 0.3, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe with a teacher that is wider and has a padded vocabulary."""

    def make(**changes: Any) -> Path:
        teacher = save_teacher(tmp_path / "teacher", 320, hidden_size=48, num_hidden_layers=3)
        objective = {"name": "distill", "teacher": str(teacher), **changes.pop("objective", {})}
        method = {"name": "lora", "rank": 8}
        return tiny_recipe(**{"objective": objective, "method": method, **changes})

    return make


@pytest.fixture(scope="module")
def pupil(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model with a LoRA adapter: a teacher that can be followed."""
    folder = tmp_path_factory.mktemp("pupil")
    method = {"name": "lora", "rank": 4, "dropout": 0.0}
    path = write_tiny_recipe(folder, tiny_model_folder, method=method)
    fine_tune(load_recipe(path, [f"output={folder / 'run'}"]))
    return folder / "run"


@pytest.mark.parametrize(
    "divergence",
    ["forward", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("reverse", "jsd"))],
)
def test_the_held_out_kl_falls(
    recipe: Callable[..., Path], pupil: Path, tmp_path: Path, divergence: str
) -> None:
    path = recipe(objective={"divergence": divergence, "teacher": str(pupil)})
    run_to_end(path, tmp_path / "run")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    measured = [e for e in map(json.loads, lines) if e["event"] == "evaluation"]
    assert measured[-1]["loss"] < 0.2 * measured[0]["loss"]
    assert measured[-1]["kl"] < 0.2 * measured[0]["kl"]
    assert measured[-1]["agreement"] > measured[0]["agreement"]


def test_the_teacher_is_frozen_and_its_forward_is_ours(recipe: Callable[..., Path]) -> None:
    with make_run(recipe()) as run:
        teacher: Any = run.objective.teacher  # type: ignore[attr-defined]
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        names = {name for name, _ in run.parameters}
        assert names
        assert run.validation is not None
        found = evaluate_loss(run, run.validation.all_batches())
        assert not teacher.training
    assert found is not None
    loss, kl, agreement = found
    assert loss == pytest.approx(kl)
    assert 0 <= agreement <= 1


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_same(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(objective={"divergence": "jsd", "sft_weight": 0.2})
    run_to_end(path, tmp_path / "whole")
    run_and_stop(path, tmp_path / "parts", 7)
    run_to_end(path, tmp_path / "parts")
    assert final_bytes(tmp_path / "whole") == final_bytes(tmp_path / "parts")


def test_a_changed_teacher_is_noticed(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe()
    run_and_stop(path, tmp_path / "run", 7)
    save_teacher(tmp_path / "teacher", 320, hidden_size=48, num_hidden_layers=2)
    with pytest.raises(RunError, match="teacher"):
        run_to_end(path, tmp_path / "run")


@pytest.mark.parametrize("name", [".", "model"])
def test_runs_and_adapters_are_teachers(
    recipe: Callable[..., Path], pupil: Path, name: str
) -> None:
    """A run directory, and its adapter's folder, are the model with the adapter merged."""
    path = recipe(objective={"teacher": str(pupil / name)})
    job = prepare(load_recipe(path), SilentReporter())
    assert job.teacher is not None
    assert job.teacher.source.adapter == str(pupil / "model")
    assert "teacher: adapter_model.safetensors" in job.fingerprints
    with make_run(path) as run:
        teacher: Any = run.objective.teacher  # type: ignore[attr-defined]
        assert not any("lora" in name for name, _ in teacher.named_parameters())
        assert run.validation is not None
        _, kl, _ = evaluate_loss(run, run.validation.all_batches()) or (0, 0, 0)
    assert kl > 0.001  # it has learned something that the base does not know


@pytest.mark.slow
def test_the_teacher_in_four_bits(recipe: Callable[..., Path], pupil: Path) -> None:
    """It keeps its adapter beside the quantized weights, and says nearly the same."""
    pytest.importorskip("bitsandbytes")
    found: list[float] = []
    for quantize in ("none", "nf4"):
        objective = {"teacher": str(pupil), "teacher_quantize": quantize}
        with make_run(recipe(objective=objective, output=str(pupil.parent / quantize))) as run:
            assert run.validation is not None
            found.append((evaluate_loss(run, run.validation.all_batches()) or [0.0])[0])
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.3)


@pytest.mark.slow
def test_the_example_follows_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of both recipes on the real model."""
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "examples"
    for name, steps in (("smithy", 10), ("distill", 6)):
        overrides = [f"train.max_steps={steps}", "data.validation=8", "evaluate.every=null"]
        _, summary = fine_tune(load_recipe(folder / f"{name}.yaml", overrides))
    assert float(str(summary["eval_loss"])) < 0.8 * float(str(summary["eval_loss_before"]))


def test_memory_counts_the_teacher(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe()
    with_teacher = prepare(load_recipe(path), SilentReporter())
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "objective": "sft"}))
    without = prepare(load_recipe(path), SilentReporter())
    assert with_teacher.teacher is not None
    added = with_teacher.facts.needs.other_bytes - without.facts.needs.other_bytes
    # The process itself may have grown a little in between.
    assert abs(added - 4 * with_teacher.teacher.num_parameters) < 8 << 20
    assert without.teacher is None


def test_another_vocabulary_is_refused_before_weights_are_loaded(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe()
    monkeypatch.setattr("tunesmith.goal.load_teacher", None)
    file = tmp_path / "teacher" / "tokenizer.json"
    whole = file.read_text(encoding="utf-8")
    tokenizer = json.loads(whole)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ModelError, match=r"'b' under .* where the student has 'a'") as caught:
        prepare(load_recipe(path), SilentReporter())
    assert caught.value.code == "model.teacher-vocabulary"
    file.write_text(whole, encoding="utf-8")
    save_teacher(tmp_path / "teacher", 257, eos_token_id=2)
    with pytest.raises(ModelError, match="token id 258 for 257 embeddings"):
        prepare(load_recipe(path), SilentReporter())


def test_no_teacher_is_a_clear_error(recipe: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder or file"):
        prepare(load_recipe(recipe(objective={"teacher": "./nobody"})), SilentReporter())
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.resolved.yaml").write_text("model: x\n")
    with pytest.raises(ModelError, match="unfinished-run"):
        path = recipe(objective={"teacher": str(tmp_path / "unfinished")})
        prepare(load_recipe(path), SilentReporter())


@pytest.mark.parametrize("settings", [{"beta": 0.3}, {"sft_weight": 1.0}, {"temperature": 0}])
def test_settings_without_effect_are_refused(
    recipe: Callable[..., Path], settings: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError):
        load_recipe(recipe(objective=settings))
