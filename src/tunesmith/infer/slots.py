"""Keys and values of many answers under way, each in a slot of its own; and attention over them.

A batch is one row of tokens without padding: whole prompts laid end to end, or the last token of
each answer. transformers runs its layers on that row; attention alone knows what belongs together.
It is registered under a name of its own, as in training (`ops.attention`).

Shape letters: T tokens of the row, H query heads, K key/value heads, G = H / K, D head size, S
slots, C tokens that a slot has room for, B answers under way (slots 0 to B - 1), L tokens that the
longest of them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.ops.attention import attend
from tunesmith.types import Segments

SLOT_ATTENTION = "tunesmith-slots"
"""Name in transformers' attention registry; it has no mask function, so no mask is built."""

ROUND_TOKENS = 64
"""Lengths are rounded up to it: libraries make kernels anew for every new shape."""


@dataclass
class Slots:
    """Keys and values, made when the first prompts are read; zero where there is none yet.

    Args:
        num_slots: S.
        num_tokens: C.
        keys: `[S, K, C, D]` of each layer.
        values: the same.
    """

    num_slots: int
    num_tokens: int
    keys: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    values: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])

    def write(
        self, layer: int, places: tuple[torch.Tensor, torch.Tensor], key: Any, value: Any
    ) -> None:
        """Puts `[1, K, T, D]` of some tokens at their (slot, place)."""
        slot_T, place_T = places
        for kept, new in ((self.keys, key), (self.values, value)):
            if layer not in kept:
                _, heads, _, size = new.shape
                # Zeros: a masked place must not hold a NaN. On a CPU untouched pages cost nothing.
                kept[layer] = new.new_zeros(self.num_slots, heads, self.num_tokens, size)
            kept[layer][slot_T, :, place_T] = new[0].transpose(0, 1)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copies one slot over another."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def spread(self, source: int, count: int, num_tokens: int) -> None:
        """Copies the start of a slot to those behind it, `count` with itself."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[source + 1 : source + count, :, :num_tokens] = tensor[source, :, :num_tokens]

    def resized(self, num_slots: int, num_tokens: int) -> None:
        """Makes other room; what does not fit into it is lost."""
        slots, tokens = min(num_slots, self.num_slots), min(num_tokens, self.num_tokens)
        self.num_slots, self.num_tokens = num_slots, num_tokens
        for kept in (self.keys, self.values):
            for layer, old in kept.items():
                new = old.new_zeros(num_slots, old.shape[1], num_tokens, old.shape[3])
                new[:slots, :, :tokens] = old[:slots, :, :tokens]
                kept[layer] = new


@dataclass
class Reading:
    """One forward of the model: which tokens its row has and where they belong.

    Args:
        slots: that are read and written.
        places: slot and place of each token, `slot_T` and `place_T`.
        segments: of whole prompts; None where each token is the last of an answer, those of slots
            0 to B - 1 in order.
        longest: L, rounded up.
    """

    slots: Slots
    places: tuple[torch.Tensor, torch.Tensor]
    segments: Segments | None
    longest: int
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict[Any, torch.Tensor])

    def mask_B11L(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """To be added to scores: minus infinity where a token must not look, else 0."""
        if window not in self._masks:
            _, place_B = self.places
            number_L = torch.arange(self.longest, device=place_B.device)
            hidden_BL = number_L > place_B[:, None]
            if window is not None:
                hidden_BL |= number_L <= place_B[:, None] - window
            mask_BL = torch.zeros(hidden_BL.shape, dtype=dtype, device=place_B.device)
            self._masks[window] = mask_BL.masked_fill_(hidden_BL, -torch.inf)[:, None, None]
        return self._masks[window]


def attend_slots(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    reading: Reading,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each token to its own answer so far, in the form of transformers' registry.

    Returns:
        the output `[1, T, H, D]`, and None in place of attention weights.

    Raises:
        NotImplementedError: the model asks for attention sinks (`s_aux`).
    """
    if more.get("s_aux") is not None:
        raise NotImplementedError("attention sinks (s_aux)")
    slots, layer = reading.slots, int(getattr(module, "layer_idx"))  # noqa: B009 - of any module
    slots.write(layer, reading.places, key_1KTD, value_1KTD)
    if reading.segments is not None:
        return attend(
            module, query_1HTD, key_1KTD, value_1KTD, None,
            segments=reading.segments, scaling=scaling, sliding_window=sliding_window,
            softcap=softcap,
        )  # fmt: skip
    key_BKLD, value_BKLD = (
        kept[layer][: query_1HTD.shape[2], :, : reading.longest]
        for kept in (slots.keys, slots.values)
    )
    query_BHD = query_1HTD[0].transpose(0, 1)
    # The query heads that share keys are rows of one product: repeating keys and values for each of
    # them, as transformers does where there is a mask, took 12 times as long (64 answers of 190
    # tokens, a CPU).
    query_BKGD = query_BHD.unflatten(1, (key_BKLD.shape[1], -1)).to(key_BKLD)
    window = sliding_window or None
    if softcap is None:
        # Not a mask of truths: torch would make one of numbers of it in every layer.
        mask_B1GL = reading.mask_B11L(window, key_BKLD.dtype).expand(
            -1, -1, query_BKGD.shape[2], -1
        )
        out_BKGD = scaled_dot_product_attention(
            query_BKGD, key_BKLD, value_BKLD, attn_mask=mask_B1GL, scale=scaling
        )
    else:
        score_BKGL = (query_BKGD * scaling) @ key_BKLD.transpose(2, 3)
        score_BKGL = softcap * torch.tanh(score_BKGL / softcap)
        score_BKGL = score_BKGL + reading.mask_B11L(window, score_BKGL.dtype)
        out_BKGD = score_BKGL.softmax(-1, dtype=torch.float32).to(value_BKLD) @ value_BKLD
    return out_BKGD.flatten(1, 2)[None], None


def read_prompts(
    model: Any, slots: Slots, prompts: Sequence[Sequence[int]], first_slot: int
) -> torch.Tensor:
    """Reads whole prompts into neighboring slots; the logits of their next tokens, `[P, V]`.

    What all of them begin with, such as a system message, is read once.
    """
    num_slots = len(prompts)
    shared = _shared_start(prompts)
    rests = [list(ids[shared:]) for ids in prompts]
    parts = ([list(prompts[0][:shared])] if shared else []) + rests
    offsets = [0] * bool(shared) + [shared] * num_slots
    numbers = [first_slot] * bool(shared) + list(range(first_slot, first_slot + num_slots))
    parents = [-1] * bool(shared) + [0 if shared else -1] * num_slots
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)[-num_slots:] - 1
    missing = -sum(map(len, parts)) % ROUND_TOKENS
    if missing and first_slot + num_slots < slots.num_slots and missing <= slots.num_tokens:
        # What fills up goes to a slot that the next answer begins anew.
        parts, offsets = [*parts, [0] * missing], [*offsets, 0]
        numbers, parents = [*numbers, first_slot + num_slots], [*parents, -1]
    table = (
        [token for part in parts for token in part],
        [number for number, part in zip(numbers, parts, strict=True) for _ in part],
        [
            n
            for start, part in zip(offsets, parts, strict=True)
            for n in range(start, start + len(part))
        ],
    )
    segments = Segments(tuple(map(len, parts)), tuple(parents) if shared else ())
    logits_PV = _forward(model, slots, table, segments, ends.to(model.device))
    slots.spread(first_slot, num_slots, shared)
    return logits_PV


LEAST_SHARED = 8
"""A shorter start is read with each prompt."""


def _shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; each has one more at least."""
    if len(prompts) < 2:
        return 0
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    most = min(map(len, prompts)) - 1
    same = next((n for n in range(most) if low[n] != high[n]), most)
    return same if same >= LEAST_SHARED else 0


def read_tokens(
    model: Any, slots: Slots, ids: Sequence[int], places: Sequence[int]
) -> torch.Tensor:
    """Reads the last token of each answer, those of slots 0 to B - 1; the next logits, `[B, V]`."""
    return _forward(model, slots, (ids, range(len(ids)), places), None, None)


def _forward(
    model: Any,
    slots: Slots,
    table: tuple[Sequence[int], Sequence[int], Sequence[int]],
    segments: Segments | None,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    device = model.device
    id_T, slot_T, place_T = torch.tensor([list(column) for column in table]).to(device).unbind()
    longest = -(-(max(table[2]) + 1) // ROUND_TOKENS) * ROUND_TOKENS
    reading = Reading(slots, (slot_T, place_T), segments, min(longest, slots.num_tokens))
    out = model(
        input_ids=id_T[None],
        position_ids=place_T[None],
        use_cache=False,
        logits_to_keep=0 if kept is None else kept,
        reading=reading,
    )
    return out.logits[0]
