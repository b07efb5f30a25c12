"""Loads a reward model or a classifier, and scores texts and token ids with it.

Sequences go through the model in packs, without padding, as they did in training.

Shape letters: T tokens of a pack, S sequences, C scores of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.recipe import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.infer.chat_model import find_result
from tunesmith.model.device import find_device
from tunesmith.model.embeddings import install_prompt
from tunesmith.model.heads import Head, head_of, head_of_adapter, scores_of
from tunesmith.model.load import (
    PACKED_ATTENTION,
    ModelSource,
    check_weights_exist,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
)
from tunesmith.model.load_adapter import base_of, find_adapter, load_adapter
from tunesmith.model.packing import check_packing
from tunesmith.types import Reporter, Segments, SilentReporter, Tokenizer

PACK_TOKENS = 4096
"""Tokens of a pack; a longer sequence has one of its own."""

Item = Sequence[int] | str
"""Token ids, or a text."""


@dataclass(frozen=True)
class ScoreModel:
    """A model ready to score, with its tokenizer.

    Args:
        model: of transformers, or adapted by PEFT.
        tokenizer: its own.
        label: what the user calls it.
        labels: of a classifier, in the order of its scores; empty for a reward model.
        template_arguments: variables that the run gave the chat template.
    """

    model: Any
    tokenizer: Tokenizer
    label: str
    labels: tuple[str, ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def score(
        self,
        items: Sequence[Item],
        *,
        is_rendered: bool = False,
        reporter: Reporter | None = None,
    ) -> list[float]:
        """The reward of each item.

        Args:
            items: token ids, as generation gave them with the end token, or texts.
            is_rendered: texts have their special tokens (see `rendered`); others get those that
                the tokenizer puts around any text.
            reporter: shows a bar.

        Raises:
            ModelError: it is a classifier, or an item has no token (`model.no-score`).
        """
        if self.labels:
            raise ModelError(
                "model.no-score", self.label, found="a classifier", expected="a reward model"
            )
        scores_SC = self.scores(items, is_rendered=is_rendered, reporter=reporter)
        return scores_SC[:, 0].tolist()

    def rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as training saw it: up to the end of its last answer."""
        template: Any = self.tokenizer.apply_chat_template
        text: str = template(list(messages), tokenize=False, **self.template_arguments)
        text = text.rstrip()
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        has_end = any(text.endswith(token.content) for token in added if token.special)
        return text if has_end else f"{text}{self.tokenizer.eos_token}"

    @torch.no_grad()
    def scores(
        self,
        items: Sequence[Item],
        *,
        is_rendered: bool = False,
        reporter: Reporter | None = None,
    ) -> torch.Tensor:
        """All scores of each item, `score_SC` on the CPU; a classifier's are logits.

        Raises:
            ModelError: an item has no token (`model.no-score`).
        """
        ids = [self._ids(item, is_rendered=is_rendered) for item in items]
        if not all(ids):
            raise ModelError(
                "model.no-score", self.label, found="a text without a token", expected="some text"
            )
        packs = packed([len(each) for each in ids])
        score_SC = torch.zeros(len(ids), max(len(self.labels), 1))
        for pack in (reporter or SilentReporter()).track("Scoring", packs, total=len(packs)):
            score_SC[pack] = self._score_pack([ids[number] for number in pack]).float().cpu()
        return score_SC

    def _ids(self, item: Item, *, is_rendered: bool) -> list[int]:
        if not isinstance(item, str):
            return list(item)
        backend = self.tokenizer.backend_tokenizer
        (encoding,) = backend.encode_batch([item], add_special_tokens=not is_rendered)
        return encoding.ids

    def _score_pack(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        device = self.model.device
        lengths = tuple(map(len, ids))
        ids_T = torch.tensor([token for each in ids for token in each], device=device)
        position_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        last_S = torch.tensor(lengths, device=device).cumsum(0) - 1
        return scores_of(self.model, ids_T, position_T, Segments(lengths), last_S)


def packed(lengths: Sequence[int], budget: int = PACK_TOKENS) -> list[list[int]]:
    """Numbers of sequences in packs of at most `budget` tokens, neighbors in length together."""
    packs: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if lengths[number] > room or not packs:
            packs.append([])
            room = budget
        packs[-1].append(number)
        room -= lengths[number]
    return packs


def open_score_model(target: str, reporter: Reporter) -> ScoreModel:
    """Loads the reward model or the classifier in a run directory, an adapter, a folder or a hub.

    Weights keep the number format of their files; the base of a run with `model.quantize` is
    quantized again.

    Raises:
        ModelError: there is nothing to load (`model.*`), or it has no head (`model.no-head`).
    """
    path, recipe = find_result(target)
    with reporter.waiting(f"Loading {target}"):
        opened = _open(path, target, reporter, recipe.model if recipe else None)
    if recipe is not None:
        opened = replace(opened, template_arguments=recipe.data.template_arguments)
    return opened


def _open(path: Path, target: str, reporter: Reporter, trained: ModelConfig | None) -> ScoreModel:
    source = ModelSource(target, str(path))
    if not (path / "adapter_config.json").exists():
        source = find_model(ModelConfig(id=str(path) if path.exists() else target), reporter)
        found = find_adapter(source)
        if found is None:
            check_weights_exist(source)
            head = _required(head_of(load_config(source)), target)
            return _ready(load_scored(source, head), load_tokenizer(source), target, head)
        path = found
    head = _required(head_of_adapter(path, target), target)
    base = find_model(base_of(path, target), reporter)
    check_weights_exist(base)
    how: dict[str, str] = {}
    if trained is not None and trained.quantize != "none":
        how = {"quantize": trained.quantize, "dtype": trained.dtype}
    model = load_adapter(load_scored(base, head, **how), path, target)
    if model.active_peft_config.is_prompt_learning:
        install_prompt(model)
    has_tokenizer = (path / "tokenizer.json").exists()
    tokenizer = load_tokenizer(ModelSource(target, str(path)) if has_tokenizer else base)
    return _ready(model, tokenizer, target, head)


def load_scored(source: ModelSource, head: Head, **how: str) -> Any:
    """A model with a head, which takes packs.

    Raises:
        ModelError: it cannot be loaded (see `load_model`), or mixes the sequences of a pack
            (`model.no-packing`).
    """
    model = load_model(replace(source, head=head), attention=PACKED_ATTENTION, **how)
    check_packing(model, source.label)
    return model


def _required(head: Head | None, target: str) -> Head:
    if head is None:
        raise ModelError(
            "model.no-head",
            target,
            found="a language model, which gives no scores",
            expected="a reward model or a classifier",
            try_="train one: `objective: reward` on preference pairs, `objective: classify` on "
            "texts with labels",
        )
    return head


def _ready(model: Any, tokenizer: Tokenizer, target: str, head: Head) -> ScoreModel:
    device = find_device().torch_device
    return ScoreModel(model.to(device).eval(), tokenizer, target, head.labels)
