"""A base's weights with an adapter added, one tensor at a time, in float32.

LoRA is added by its formula: W + s B A with s = alpha / r (arXiv 2106.09685, section 4.1), or
alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); with DoRA each row then gets the length that was learned
(arXiv 2402.09353, equation 5). Rows of tokens and modules trained whole take the place of the
base's. What is none of these (other adapters of PEFT, convolutions, DoRA on embeddings, layers that
transformers names otherwise than the files do) is not read here: see `folder_of_whole_model`.

Shape letters: R rank, I inputs, O outputs, V tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import UserError
from tunesmith.export.trained import Trained
from tunesmith.export.weights import Facts, FileWeights, Weights
from tunesmith.io.safeload import ADAPTER_WEIGHTS, adapter_settings
from tunesmith.model.load import load_model
from tunesmith.model.load_adapter import load_adapter
from tunesmith.model.vocabulary import make_room

PREFIX = "base_model.model."

# The end of a tensor's name in PEFT's file -> what it is.
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
    "trainable_tokens_delta": "rows",
}
_STRANGE = (
    *("alora_invocation_tokens", "layer_replication", "megatron_config", "trainable_token_groups"),
    *("target_parameters", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
)
"""Settings of LoRA that change what its matrices mean; they are left to PEFT."""


class NotPlainError(ValueError):
    """The adapter is not one that this module can add; says what of it."""


@dataclass
class _Change:
    """What happens to one weight; the names of tensors in the adapter's file."""

    parts: dict[str, str] = field(default_factory=dict[str, str])
    replaced_by: str | None = None
    scale: float = 1.0
    is_embedding: bool = False


class AdaptedWeights:
    """A base's weights with a LoRA adapter added.

    Args:
        base: the base's weights.
        trained: with an adapter.
        is_tied: whether the base's head is its embedding.

    Raises:
        NotPlainError: the adapter needs PEFT's own code.
    """

    def __init__(self, base: Weights, trained: Trained, *, is_tied: bool) -> None:
        self.base = base
        folder = trained.adapter or Path()
        self.settings = adapter_settings(folder, trained.label)
        self.file = FileWeights([folder / ADAPTER_WEIGHTS])
        _check_settings(self.settings)
        self._changes: dict[str, _Change] = {}
        for key in self.file.facts:
            self._note(key)
        self.is_tied = is_tied and not self._unties()
        # The head's own files, where the embedding was its only one.
        self._copies = {} if self.is_tied or not is_tied else {HEAD: _embedding_of(base)}
        self._facts = self._all_facts(len(trained.tokenizer), has_scores=trained.head is not None)
        for name, change in self._changes.items():
            self._check(name, change)

    @property
    def facts(self) -> Mapping[str, Facts]:
        """Of every tensor, in the order of the base's files."""
        return self._facts

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """One tensor with what the adapter adds, in float32 if it does add something."""
        change = self._changes.get(name)
        if change is None or (change.replaced_by is None and not change.parts):
            return self._with_room(name, self._plain(name))
        if change.replaced_by is not None:
            value = self.file.read(change.replaced_by).float()
        else:
            value = self._with_room(name, self._plain(name)).float()
        return self._added(value, change)

    def _plain(self, name: str) -> torch.Tensor:
        return self.base.read(self._copies.get(name, name))

    def _with_room(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """An embedding with rows for the tokenizer's new tokens, which the adapter fills."""
        missing = self._facts[name].shape[0] - value.shape[0] if value.dim() else 0
        return torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) if missing else value

    def _added(self, value: torch.Tensor, change: _Change) -> torch.Tensor:
        parts = {kind: self.file.read(key).float() for kind, key in change.parts.items()}
        if "a" in parts:
            product = parts["b"] @ parts["a"]
            turned = bool(self.settings.get("fan_in_fan_out")) != change.is_embedding
            value = value + change.scale * (product.T if turned else product)
        if "magnitude" in parts:
            length_O1 = torch.linalg.norm(value, dim=1, keepdim=True)
            value = parts["magnitude"].reshape(-1, 1) / length_O1 * value
        if "rows" in parts:
            value = value.clone()
            value[self._token_ids(change.parts["rows"])] = parts["rows"]
        return value

    def _token_ids(self, key: str) -> list[int]:
        """The tokens whose rows a tensor holds."""
        known: Any = self.settings.get("trainable_token_indices")
        if known is None:
            known = self.settings.get("token_indices")
        if isinstance(known, dict):
            module = key.removeprefix(PREFIX)
            found = [ids for name, ids in known.items() if f".{name}." in f".{module}"]
            return [int(each) for each in found[0]]
        return [int(each) for each in known]

    def _note(self, key: str) -> None:
        """Finds out what a tensor of the adapter's file is for.

        Raises:
            NotPlainError: nothing that is known.
        """
        if not key.startswith(PREFIX):
            raise NotPlainError(f"the tensor {key}")
        own = key.removeprefix(PREFIX)
        for ending, kind in _PARTS.items():
            if not own.endswith(f".{ending}"):
                continue
            module = own.removesuffix(f".{ending}")
            change = self._changes.setdefault(_weight_of(module), _Change())
            change.parts[kind] = key
            change.is_embedding = "embedding" in ending
            change.scale = self._scale(module, key) if kind == "b" else change.scale
            return
        if "lora_" in own or "trainable_tokens" in own:
            raise NotPlainError(f"the tensor {own}")
        # A module that was trained whole, a bias, or the frozen weight below an adapter.
        change = self._changes.setdefault(own.replace(".base_layer.", "."), _Change())
        change.replaced_by = key

    def _scale(self, module: str, key: str) -> float:
        from peft.utils.other import get_pattern_key

        patterns: Any = self.settings.get("alpha_pattern") or {}
        found = get_pattern_key(patterns.keys(), module)
        alpha = float(patterns.get(found, self.settings["lora_alpha"]))
        rank = self.file.facts[key].shape[1]
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _unties(self) -> bool:
        """Whether head and embedding, one matrix in the base, differ with the adapter.

        PEFT keeps them one for rows of tokens and with `ensure_weight_tying`.
        """
        embedding = self._changes.get(_embedding_of(self.base))
        head = self._changes.get(HEAD)
        if self.settings.get("ensure_weight_tying"):
            self._changes.pop(HEAD, None)
            return False
        if head is not None and set(head.parts) <= {"rows"} and head.replaced_by is None:
            self._changes.pop(HEAD)
            head = None
        is_lone = embedding is not None and not set(embedding.parts) <= {"rows"}
        is_replaced = embedding is not None and embedding.replaced_by is not None
        return head is not None or is_lone or (is_replaced and self._is_trained(embedding))

    def _is_trained(self, change: _Change | None) -> bool:
        """Whether a whole matrix in the file was trained, and not the frozen one put beside."""
        key = change.replaced_by if change else None
        return key is not None and ".base_layer." not in key

    def _all_facts(self, num_tokens: int, *, has_scores: bool) -> dict[str, Facts]:
        is_without_head = has_scores or self.is_tied
        facts = {n: f for n, f in self.base.facts.items() if not (is_without_head and n == HEAD)}
        for name, source in self._copies.items():
            facts[name] = facts[source]
        for name, change in self._changes.items():
            if change.replaced_by is not None:
                there = facts.get(name)
                own = self.file.facts[change.replaced_by]
                facts[name] = Facts(own.shape, there.dtype if there else _dtype_of(self.base))
        for name in (_embedding_of(self.base), HEAD):
            if name in facts and facts[name].shape[0] < num_tokens:
                facts[name] = Facts((num_tokens, *facts[name].shape[1:]), facts[name].dtype)
        return facts

    def _check(self, name: str, change: _Change) -> None:
        """Refuses a change of something that is not there or of another size."""
        facts = self._facts.get(name)
        if facts is None:
            raise NotPlainError(f"{name}, which is not in the base's files")
        kinds = set(change.parts)
        if kinds & {"a", "b"} and not {"a", "b"} <= kinds:
            raise NotPlainError(f"half of the adapter of {name}")
        if "a" in kinds:
            a, b = (self.file.facts[change.parts[kind]].shape for kind in "ab")
            if len(a) != 2 or len(facts.shape) != 2:
                raise NotPlainError(f"{name}, which is no matrix")
            is_turned = bool(self.settings.get("fan_in_fan_out")) != change.is_embedding
            shape = (b[0], a[1])
            if facts.shape != (shape[::-1] if is_turned else shape):
                raise NotPlainError(f"{name} of shape {list(facts.shape)}")
        if "magnitude" in kinds and (change.is_embedding or self.settings.get("fan_in_fan_out")):
            raise NotPlainError(f"DoRA on {name}")


HEAD = "lm_head.weight"


def _weight_of(module: str) -> str:
    """The parameter that a part of an adapter changes."""
    return f"{module.removesuffix('.base_layer')}.weight"


def _embedding_of(base: Weights) -> str:
    found = (name for name in base.facts if name.endswith("embed_tokens.weight"))
    return next(found, "model.embed_tokens.weight")


def _dtype_of(base: Weights) -> torch.dtype:
    return next(iter(base.facts.values())).dtype


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises NotPlainError for what is no LoRA, or one of its variants."""
    if settings["peft_type"] not in ("LORA", "TRAINABLE_TOKENS"):
        raise NotPlainError(f"{settings['peft_type']}")
    for key in _STRANGE:
        if settings.get(key):
            raise NotPlainError(f"LoRA with {key}")


def folder_of_whole_model(trained: Trained, folder: Path) -> None:
    """Merges by PEFT's own code with all of the model in memory, in float32.

    Args:
        trained: with an adapter.
        folder: gets the merged weights, under the names that the base's files have.

    Raises:
        UserError: PEFT cannot merge it (`export.not-mergeable`).
    """
    model = load_model(replace(trained.base, head=trained.head), dtype="float32")
    make_room(model, len(trained.tokenizer))
    adapted = load_adapter(model, trained.adapter or Path(), trained.label)
    try:
        plain = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        kind = str(adapted.peft_config["default"].peft_type)
        raise not_mergeable(trained, kind, str(error)) from error
    plain.save_pretrained(folder)


def not_mergeable(trained: Trained, kind: str, reason: str) -> UserError:
    """What to say of an adapter that no weights can hold."""
    return UserError(
        "export.not-mergeable",
        trained.label,
        found=f"an adapter of the kind {kind} ({reason.splitlines()[0][:200]})",
        expected="one that changes weights, such as LoRA or DoRA",
        try_="`--to adapter` writes it as it is, for PEFT",
    )
