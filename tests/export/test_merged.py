"""Merging: the sum of base and adapter is what PEFT computes, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.errors import UserError
from tunesmith.export.merged import open_merged, write_merged
from tunesmith.export.merged_sum import AdaptedWeights
from tunesmith.export.trained import Trained
from tunesmith.export.verify import Sample, compare, logits_of
from tunesmith.export.weights import weights_of_folder
from tunesmith.export.written import folder_logits, folder_prompts, load_trained
from tunesmith.model.heads import Head
from tunesmith.types import SilentReporter

SAMPLES = [Sample("a", tuple(range(40))), Sample("b", tuple(range(200, 230)))]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has .tie_word"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:Adapter .default."),
]

MakeTrained = Callable[..., Trained]


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    values: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    return LoraConfig(**{"task_type": "CAUSAL_LM", **values, **settings})


def differences(trained: Trained, folder: Path) -> float:
    """The largest difference of logits between the adapted and the merged model."""
    ours = folder_logits(folder, trained, "float32")(SAMPLES)
    return compare(logits_of(load_trained(trained, dtype="float32"), SAMPLES), ours).max_difference


def write(trained: Trained, folder: Path, **how: Any) -> tuple[str, ...]:
    folder.mkdir()
    values: dict[str, Any] = {"dtype": "auto", "max_bytes": 10**9, "reporter": SilentReporter()}
    return write_merged(trained, folder, **{**values, **how})


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": PATTERNS,
    "rslora with patterns": {"use_rslora": True, **PATTERNS},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [3, 7]}},
}


FAST = ("lora", "dora", "rows")


@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in KINDS]
)
def test_the_sum_is_that_of_peft(
    name: str, is_tied: bool, make_trained: MakeTrained, tmp_path: Path
) -> None:
    trained = make_trained(lora(**KINDS[name]), tie_word_embeddings=is_tied)
    notes = write(trained, tmp_path / "merged")
    assert notes == ()
    assert differences(trained, tmp_path / "merged") < 2e-6


@pytest.mark.slow
def test_biases_are_taken_over(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained(lora(bias="all"), attention_bias=True, mlp_bias=True)
    write(trained, tmp_path / "merged")
    assert differences(trained, tmp_path / "merged") < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied"])
def test_new_tokens_get_rows(is_tied: bool, make_trained: MakeTrained, tmp_path: Path) -> None:
    rows = {"embed_tokens": [259, 260]} | ({} if is_tied else {"lm_head": [259, 260]})
    adapter = lora(trainable_token_indices=rows, target_modules=["q_proj"])
    trained = make_trained(adapter, new=("<a>", "<b>"), tie_word_embeddings=is_tied)
    write(trained, tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["vocab_size"] == 261
    assert differences(trained, tmp_path / "merged") < 2e-6


@pytest.mark.slow
def test_other_adapters_are_merged_by_peft(make_trained: MakeTrained, tmp_path: Path) -> None:
    from peft import LoHaConfig

    trained = make_trained(LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "down_proj"]))
    (note,) = write(trained, tmp_path / "merged")
    assert note.startswith("LOHA: merged by PEFT with the whole model in memory")
    assert differences(trained, tmp_path / "merged") < 2e-6


def test_virtual_tokens_cannot_be_merged(make_trained: MakeTrained, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    trained = make_trained(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match=r"export\.not-mergeable.*PROMPT_TUNING") as caught:
        write(trained, tmp_path / "merged")
    assert "--to adapter" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [(), ("no", "yes", "maybe")], ids=["reward", "classifier"])
def test_models_of_scores_are_merged(
    labels: tuple[str, ...], make_trained: MakeTrained, tmp_path: Path
) -> None:
    adapter = lora(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    trained = make_trained(adapter, head=Head(labels, 256))
    write(trained, tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    assert len(settings["id2label"]) == max(len(labels), 1)
    assert "lm_head.weight" not in weights_of_folder(tmp_path / "merged").facts
    assert differences(trained, tmp_path / "merged") < 2e-6


@pytest.mark.slow
def test_tied_weights_stay_tied_unless_training_parts_them(
    make_trained: MakeTrained, tmp_path: Path
) -> None:
    write(make_trained(lora()), tmp_path / "tied")
    assert "lm_head.weight" not in weights_of_folder(tmp_path / "tied").facts
    write(make_trained(lora(target_modules=["embed_tokens"])), tmp_path / "parted")
    assert "lm_head.weight" in weights_of_folder(tmp_path / "parted").facts
    settings = json.loads((tmp_path / "parted" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False


def test_types_and_shards(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained(lora())
    write(trained, tmp_path / "merged", dtype="bfloat16", max_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    facts = weights_of_folder(tmp_path / "merged").facts
    assert set(index["weight_map"]) == set(facts)
    assert index["metadata"]["total_size"] == sum(each.num_bytes() for each in facts.values())
    assert {each.dtype for each in facts.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert differences(trained, tmp_path / "merged") < 0.05


def test_stop_ids_and_template_defaults_are_written(
    make_trained: MakeTrained, tmp_path: Path
) -> None:
    from dataclasses import replace

    trained = make_trained(lora())
    trained.tokenizer.chat_template += "{% if not enable_thinking %}<none>{{ words.a }}{% endif %}"
    arguments = {"enable_thinking": False, "words": {"a": ["'\"", None]}}
    trained = replace(trained, template_arguments=arguments)
    write(trained, tmp_path / "merged")
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [258, 256]
    messages = [{"role": "user", "content": "q"}]
    text = trained.tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    assert text.endswith("<none>['\\'\"', None]")
    ids = trained.tokenizer.backend_tokenizer.encode_batch(
        [
            trained.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **arguments
            )
        ],
        add_special_tokens=False,
    )[0].ids
    assert folder_prompts(tmp_path / "merged")(messages) == ids


def test_a_quantized_base_is_refused(make_trained: MakeTrained) -> None:
    trained = make_trained(lora())
    file = Path(trained.base.path) / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    file.write_text(json.dumps(values))
    with (
        pytest.raises(UserError, match=r"export\.quantized-base.*gptq"),
        open_merged(trained, SilentReporter()),
    ):
        pass


def test_one_tensor_is_held_at_a_time(make_trained: MakeTrained, tmp_path: Path) -> None:
    """Of all tensors alive while shards are written, none but the one that is read is large."""
    trained = make_trained(lora())
    with open_merged(trained, SilentReporter()) as merged:
        assert isinstance(merged.weights, AdaptedWeights)
        first = merged.weights.read("model.layers.0.mlp.up_proj.weight")
        again = merged.weights.read("model.layers.0.mlp.up_proj.weight")
    assert first.dtype == torch.float32
    assert first.data_ptr() != again.data_ptr()  # made anew each time: nothing is kept
