"""Heads of scores: new ones, saved and loaded by plain transformers and PEFT, continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from engine.runs import run_to_end
from tunesmith.errors import ModelError
from tunesmith.infer.score_model import ScoreModel, open_score_model, packed
from tunesmith.model.heads import Head, choose_padding, draw_head, head_of, put_head
from tunesmith.model.load import ModelSource, load_config, load_model
from tunesmith.types import SilentReporter

TEXTS = ("one text", "another, longer text!", "x")
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


def write_data(folder: Path, objective: str) -> Path:
    pair = {"prompt": "a question that is there", "chosen": "please", "rejected": "no"}
    words = ("red", "green", "blue")
    rows = [
        {**pair, "chosen": f"please {n}"}
        if objective == "reward"
        else {"text": f"{words[n % 3]} {n}", "label": words[n % 3]}
        for n in range(24)
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trained(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The run directory of a short run."""

    def run(objective: str, method: Any = "lora", name: str = "run", **changes: Any) -> Path:
        recipe = tiny_recipe(objective=objective, train={"epochs": 1, "max_steps": 4})
        tree = {**json.loads(recipe.read_text()), "method": method}
        tree["train"]["learning_rate"] = 0.02
        tree["data"] = {"train": str(write_data(tmp_path, objective)), "validation": 0}
        for part, values in changes.items():
            tree[part] = {**tree[part], **values}
        recipe.write_text(json.dumps(tree))
        run_to_end(recipe, tmp_path / name)
        return tmp_path / name

    return run


def opened(target: Path) -> ScoreModel:
    return open_score_model(str(target), SilentReporter())


@torch.no_grad()
def plain_scores(model: Any, tokenizer: Any, texts: Any) -> torch.Tensor:
    """Scores of transformers' own forward, all texts in one padded batch."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    return model.eval()(**batch).logits.float()


@pytest.mark.parametrize(
    ("objective", "method"),
    [("classify", "freeze"), pytest.param("reward", "full", marks=pytest.mark.slow)],
)
def test_plain_transformers_gives_the_same_scores(
    trained: Callable[..., Path], objective: str, method: str
) -> None:
    folder = trained(objective, method) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ours = opened(folder.parent)
    expected = plain_scores(model, tokenizer, TEXTS)
    torch.testing.assert_close(ours.scores(TEXTS), expected, rtol=0, atol=1e-5)
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip()
    assert ours.rendered(CHAT) == chat
    # The end token is no padding: the score is that of the conversation's very last token.
    assert chat.endswith(tokenizer.eos_token)
    assert tokenizer.pad_token != tokenizer.eos_token
    assert model.config.pad_token_id == tokenizer.pad_token_id
    short, long = chat, chat.replace("hello", "hello, hello")
    expected = plain_scores(model, tokenizer, [short, long])
    found = ours.scores([short, long], is_rendered=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    if objective == "classify":
        assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
        assert ours.labels == ("blue", "green", "red")
        classify: Any = pipeline(
            "text-classification", model=model, tokenizer=tokenizer, top_k=None
        )
        (said,) = classify([TEXTS[0]])
        chances = ours.scores(TEXTS[:1]).softmax(1)[0].tolist()
        expected = dict(zip(ours.labels, chances, strict=True))
        assert {each["label"]: each["score"] for each in said} == pytest.approx(expected, abs=1e-5)
        with pytest.raises(ModelError, match=r"model\.no-score"):
            ours.score(TEXTS)
    else:
        assert ours.score(TEXTS) == pytest.approx(plain_scores(model, tokenizer, TEXTS)[:, 0])


@pytest.mark.parametrize(
    ("objective", "method"),
    [
        ("reward", {"name": "lora", "rank": 4}),
        pytest.param("classify", {"name": "pissa", "rank": 4}, marks=pytest.mark.slow),
        pytest.param("classify", "ia3", marks=pytest.mark.slow),
        pytest.param("reward", "dora", marks=pytest.mark.slow),
        pytest.param("reward", {"name": "prompt_tuning"}, marks=pytest.mark.slow),
    ],
)
def test_plain_peft_gives_the_same_scores(
    trained: Callable[..., Path], objective: str, method: Any
) -> None:
    from peft import AutoPeftModelForSequenceClassification

    folder = trained(objective, method) / "model"
    head = json.loads((folder / "head.json").read_text())
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **head)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    expected = torch.cat([plain_scores(model, tokenizer, [text]) for text in TEXTS])
    ours = opened(folder.parent)
    torch.testing.assert_close(ours.scores(TEXTS), expected, rtol=0, atol=1e-5)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    assert settings.get("modules_to_save", ["score"]) == ["score"]
    card = (folder / "README.md").read_text()
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("path/to' in card
    assert "**head)" in card


@pytest.mark.slow
def test_a_run_goes_on_from_a_head(trained: Callable[..., Path], tmp_path: Path) -> None:
    """From an adapter with its head, and from a whole model with one; labels keep their order."""
    first = trained("reward", {"name": "lora", "rank": 4})
    before = opened(first).scores(TEXTS)
    again = trained(
        "reward",
        "lora",
        "again",
        model={"adapter": str(first / "model")},
        train={"max_steps": 1, "learning_rate": 1e-9},
    )
    torch.testing.assert_close(opened(again).scores(TEXTS), before, rtol=0, atol=1e-4)
    changed = json.loads((again / "model" / "adapter_config.json").read_text())
    assert changed["modules_to_save"] == ["score"]


@pytest.mark.slow
def test_a_classifier_keeps_its_labels(trained: Callable[..., Path], tmp_path: Path) -> None:
    first = trained("classify", "full")
    rows = [{"text": f"{w} {n}", "label": w} for n in range(9) for w in ("red", "green")]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "some.jsonl"), "validation": 0}
    model = {"id": str(first / "model")}
    again = trained("classify", "full", "again", model=model, data=data)
    assert opened(again).labels == ("blue", "green", "red")
    rows[0]["label"] = "violet"
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError, match=r"model\.head"):
        trained("classify", "full", "other", model=model, data=data)
    with pytest.raises(ModelError, match=r"model\.head"):
        trained("reward", "full", "reward", model=model)


@pytest.mark.slow
def test_an_adapter_of_a_language_model_is_merged_first(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    """The result, one adapter for the base, has both: the head's rows see the merged weights."""
    from peft import AutoPeftModelForSequenceClassification

    rows = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(20)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = trained("sft", data={"train": str(tmp_path / "chat.jsonl")})
    start = {"adapter": str(first / "model"), "merge_adapter": True}
    folder = trained("reward", {"name": "lora", "rank": 2}, "reward", model=start) / "model"
    head = json.loads((folder / "head.json").read_text())
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] > 2
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **head)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    expected = torch.cat([plain_scores(model, tokenizer, [text]) for text in TEXTS])
    torch.testing.assert_close(opened(folder).scores(TEXTS), expected, rtol=0, atol=1e-5)


# Parts


def test_a_new_head_is_zero_until_it_is_drawn(tiny_model_folder: Path) -> None:
    source = ModelSource("tiny", str(tiny_model_folder), head=Head(("a", "b"), pad_id=256))
    model = load_model(source, dtype="float32")
    assert not model.score.weight.any()
    torch.manual_seed(3)
    draw_head(model)
    drawn = model.score.weight.clone()
    assert drawn.std() < 2 / 33
    draw_head(model)
    assert torch.equal(drawn, model.score.weight)
    config = model.config
    assert (config.num_labels, config.id2label) == (2, {0: "a", 1: "b"})
    assert (config.problem_type, config.pad_token_id) == ("single_label_classification", 256)
    assert head_of(load_config(source)) is None


def test_other_heads_are_refused(tiny_model_folder: Path) -> None:
    config = load_config(ModelSource("tiny", str(tiny_model_folder)))
    config.architectures = ["LlamaForSequenceClassification"]
    put_head(config, Head(("c", "d")), "m")
    with pytest.raises(ModelError, match="tell c, d"):
        put_head(config, Head(("b", "a")), "m")
    config = load_config(ModelSource("tiny", str(tiny_model_folder)))
    with pytest.raises(ModelError, match=r"model\.no-head"):
        opened(tiny_model_folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "<|endoftext|>"),
        ({"pad_token": "<|im_end|>"}, "<|im_start|>"),
        ({"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, "<|endoftext|>"),
    ],
)
def test_padding_is_no_end(byte_tokenizer: Any, changes: dict[str, str], expected: str) -> None:
    for name, token in changes.items():
        setattr(byte_tokenizer, name, token)
    assert choose_padding(byte_tokenizer, ["<|im_end|>"]) == expected


def test_packs_hold_everything_once() -> None:
    packs = packed([5, 9, 1, 30, 4], budget=10)
    assert sorted(number for pack in packs for number in pack) == [0, 1, 2, 3, 4]
    assert packs == [[3], [1], [0, 4, 2]]


@pytest.mark.slow
def test_half_precision_and_a_language_model_beside(
    trained: Callable[..., Path], tiny_model_folder: Path
) -> None:
    """In bfloat16 the head computes in float32; the base stays a language model."""
    folder = trained("reward", "lora", model={"dtype": "bfloat16"})
    source = ModelSource("tiny", str(tiny_model_folder))
    assert isinstance(opened(folder).score(TEXTS)[0], float)
    assert type(load_model(replace(source))) is type(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    )
