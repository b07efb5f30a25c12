"""Heads of scores in the place of the vocabulary's logits: one reward, or a logit for each label.

The model is that of transformers' `AutoModelForSequenceClassification`: a matrix `score` on the
hidden state of each sequence's last token. Transformers finds this token as the last one that is
no padding, so padding must be a token that no sequence ends with. Many tokenizers pad with their
end token, with which all conversations end.

Shape letters: T tokens, H hidden size, S sequences, C scores of a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import linear

from tunesmith.config.heads import ClassifyConfig, RewardConfig
from tunesmith.config.objective import ObjectiveConfig
from tunesmith.errors import ModelError
from tunesmith.io.safeload import adapter_weights, read_settings
from tunesmith.model.layers import decoder_of
from tunesmith.types import Segments

HEAD_FILE = "head.json"
"""Beside an adapter: the settings of its head, which PEFT's file has no place for."""

REWARD = "reward"
"""Name of the score of a reward model, as a classifier's labels are names."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a model's scores are.

    Args:
        labels: of a classifier, in order; empty for a reward model.
        pad_id: a token that no sequence ends with; None if there is none.
    """

    labels: tuple[str, ...] = ()
    pad_id: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each score."""
        return self.labels or (REWARD,)

    def settings(self) -> dict[str, Any]:
        """Values of transformers' configuration."""
        kind = "single_label_classification" if self.labels else "regression"
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
            "problem_type": kind,
            **({} if self.pad_id is None else {"pad_token_id": self.pad_id}),
        }


def planned_head(objective: ObjectiveConfig, labels: Sequence[str] = ()) -> Head | None:
    """The head that an objective needs, with any padding; None for a language model."""
    needs_one = isinstance(objective, RewardConfig | ClassifyConfig)
    return Head(tuple(labels)) if needs_one else None


def make_head(
    objective: ObjectiveConfig, labels: Sequence[str], tokenizer: Any, ends: Collection[str]
) -> Head | None:
    """The head that an objective needs; the tokenizer, too, pads with its token from here on.

    Args:
        objective: of the recipe.
        labels: of a classifier.
        tokenizer: of transformers.
        ends: tokens that sequences end with.
    """
    head = planned_head(objective, labels)
    padding = None if head is None else choose_padding(tokenizer, ends)
    if head is None or padding is None:
        return head
    tokenizer.pad_token = padding
    return replace(head, pad_id=int(tokenizer.pad_token_id))


def has_scores(model: Any) -> bool:
    """Whether a model, adapted or not, has such a head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return isinstance(getattr(base, "score", None), torch.nn.Module)


def labels_of(config: Any) -> tuple[str, ...]:
    """The labels that a model tells apart by its configuration; none if it is no classifier."""
    head = head_of(config)
    return head.labels if head else ()


def head_of(config: Any) -> Head | None:
    """The head that a model's files have by its configuration; None for a language model."""
    names = getattr(config, "architectures", None) or [""]
    if not str(names[0]).endswith("ForSequenceClassification"):
        return None
    labels = tuple(config.id2label[number] for number in sorted(config.id2label))
    return Head(labels if len(labels) > 1 else (), config.get_text_config().pad_token_id)


def put_head(config: Any, head: Head, label: str) -> None:
    """Writes a head into a model's configuration.

    Raises:
        ModelError: the model's files have another one (`model.head`).
    """
    there = head_of(config)
    # A head whose labels were never named goes on with any names.
    numbers = tuple(f"LABEL_{number}" for number in range(len(head.labels)))
    if there is not None and there.labels not in (head.labels, numbers):
        raise ModelError(
            "model.head",
            label,
            found=f"a model that is trained to tell {', '.join(there.names[:12])}",
            expected=f"one for {', '.join(head.names[:12])}, or one without such a head",
            try_="name the model that it was made from, or the same objective and labels",
        )
    for key, value in head.settings().items():
        setattr(config, key, value)
    if head.pad_id is not None:
        config.get_text_config().pad_token_id = head.pad_id


def check_head(model: Any, missing: Collection[str], label: str) -> None:
    """Looks at the head of a loaded model; a new one is zero until it is drawn.

    Args:
        model: from transformers.
        missing: names of weights that its files do not have.
        label: what the user calls it.

    Raises:
        ModelError: it is of another build (`model.head`).
    """
    score = getattr(model, "score", None)
    if not isinstance(score, torch.nn.Linear) or "bias" in score.state_dict():
        raise ModelError(
            "model.head",
            label,
            found=f"{type(model).__name__}, whose scores are no matrix `score`",
            expected="a decoder such as Llama, Qwen, Mistral or Gemma",
        )
    if "score.weight" in missing:
        with torch.no_grad():
            score.weight.zero_()


def draw_head(model: Any) -> None:
    """Draws the weights of a new head, from torch's generator for the processor.

    The deviation is 1 / (H + 1): first scores are near 0 for any width, so a reward model's first
    loss is near ln 2 (0.696 with SmolLM2-135M). The `initializer_range` of most models, 0.02, gives
    scores that grow with the square root of the width, and the 1 / sqrt(H + 1) of arXiv 2009.01325
    scores around 1: pairs would be told apart by chance at first, which must be unlearned.
    """
    if not has_scores(model) or bool(model.score.weight.any()):
        return
    weight_CH = model.score.weight
    drawn_CH = torch.randn(weight_CH.shape) / (weight_CH.shape[1] + 1)
    with torch.no_grad():
        weight_CH.copy_(drawn_CH)


def scores_of(
    model: Any,
    ids_T: torch.Tensor,
    position_T: torch.Tensor,
    segments: Segments,
    last_S: torch.Tensor,
) -> torch.Tensor:
    """The scores of each sequence of a pack, `score_SC`, in float32 at least."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    out = decoder_of(model)(
        input_ids=ids_T[None], position_ids=position_T[None], use_cache=False, segments=segments
    )
    hidden_SH, weight_CH = out.last_hidden_state[0, last_S], base.score.weight
    dtype = torch.promote_types(
        torch.promote_types(hidden_SH.dtype, weight_CH.dtype), torch.float32
    )
    with torch.autocast(hidden_SH.device.type, enabled=False):
        return linear(hidden_SH.to(dtype), weight_CH.to(dtype))


def choose_padding(tokenizer: Any, ends: Collection[str]) -> str | None:
    """A token that is no end of a sequence: the tokenizer's own padding, or another special one.

    Args:
        tokenizer: of transformers.
        ends: tokens that sequences end with.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    named = [token for token in added if "pad" in token.lower()]
    special = [token for token in tokenizer.all_special_tokens if token != tokenizer.bos_token]
    known = (tokenizer.pad_token, *named, tokenizer.unk_token, *special, tokenizer.bos_token)
    ends = {*ends, str(tokenizer.eos_token)}
    return next((str(token) for token in known if token and str(token) not in ends), None)


def write_head(model: Any, folder: Path) -> None:
    """Writes an adapter's `head.json`: arguments of transformers' and PEFT's `from_pretrained`."""
    config = model.get_base_model().config
    keys = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id")
    values = {key: getattr(config, key) for key in keys}
    text = json.dumps(values, ensure_ascii=False, indent=2)
    (folder / HEAD_FILE).write_text(text + "\n", encoding="utf-8")


def head_of_adapter(folder: Path, label: str) -> Head | None:
    """The head that an adapter brings; None if it brings none.

    One of another trainer has no `head.json`: its labels are then numbers.

    Raises:
        ModelError: its files are damaged (`model.bad-config`, `model.bad-safetensors`).
    """
    from safetensors import safe_open

    with safe_open(adapter_weights(folder, label), framework="numpy") as file:  # pyright: ignore[reportUnknownVariableType]
        keys: Any = set(file.keys())
        names: list[str] = [name for name in keys if name.endswith(".score.weight")]
        count = int(file.get_slice(names[0]).get_shape()[0]) if names else 0
    if not count:
        return None
    settings = read_settings(folder / HEAD_FILE) if (folder / HEAD_FILE).exists() else {}
    known: Any = settings.get("id2label")
    pad_id = settings.get("pad_token_id")
    if not isinstance(known, dict) or len(cast("dict[str, Any]", known)) != count:
        known = {str(number): f"LABEL_{number}" for number in range(count)}
    labels = tuple(str(name) for name in cast("dict[str, Any]", known).values())
    return Head(labels if count > 1 else (), pad_id if isinstance(pad_id, int) else None)
