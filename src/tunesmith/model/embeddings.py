"""What happens between a decoder's embedding and its first layer: virtual tokens, and noise.

PEFT puts virtual tokens before each row of a padded batch. A packed batch has one row; here they
are one more segment at its front, which every sequence goes on from: computed once for all, as a
shared prefix is. The numbers are those of PEFT's own forward, one sequence at a time.

Shape letters: T tokens, V virtual tokens, H hidden size, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tunesmith.model.layers import decoder_of, layer_list
from tunesmith.types import Segments


@dataclass
class DecoderEntry:
    """The forward of a decoder on packed batches; without a segment table, its own.

    Args:
        decoder: of transformers.
        adapted: PEFT's model around it, with virtual tokens; None for none.
        noise_alpha: of NEFTune (arXiv 2310.05914); None for no noise.
    """

    decoder: Any
    adapted: Any = None
    noise_alpha: float | None = None
    prefix: list[tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=list[tuple[torch.Tensor, torch.Tensor]]
    )
    """Keys and values of the virtual tokens in each layer, `[1, K, V, D]`, while it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder; only hidden states of real tokens come out."""
        segments, own = kwargs.get("segments"), type(self.decoder).forward
        if segments is None or args or kwargs.get("input_ids") is None:
            return own(self.decoder, *args, **kwargs)
        embedded_1TH = self.decoder.get_input_embeddings()(kwargs.pop("input_ids"))
        if self.noise_alpha is not None and self.decoder.training:
            embedded_1TH = embedded_1TH + noise(embedded_1TH, segments, self.noise_alpha)
        if self.adapted is None or self.adapted._adapters_disabled:
            return own(self.decoder, inputs_embeds=embedded_1TH, **kwargs)
        virtual_1VH = self._virtual(embedded_1TH)
        count = virtual_1VH.shape[1]
        position_1T = kwargs.pop("position_ids")
        first_1V = torch.arange(count, device=position_1T.device)[None]
        kwargs["segments"] = behind(segments, count)
        try:
            out = own(
                self.decoder,
                inputs_embeds=torch.cat((virtual_1VH, embedded_1TH), 1),
                position_ids=torch.cat((first_1V, position_1T + count), 1),
                **kwargs,
            )
        finally:
            self.prefix.clear()
        out.last_hidden_state = out.last_hidden_state[:, count:]
        return out

    def _virtual(self, embedded_1TH: torch.Tensor) -> torch.Tensor:
        """The virtual tokens' embeddings; for a prefix, whose layers ignore them, zeros."""
        prompt = self.adapted.get_prompt(1)
        if isinstance(prompt, torch.Tensor):
            return prompt.to(embedded_1TH.dtype)
        self.prefix[:] = [(layer.keys, layer.values) for layer in prompt.layers]
        count = self.prefix[0][0].shape[2]
        return embedded_1TH.new_zeros(1, count, embedded_1TH.shape[2])


@dataclass
class PrefixedAttention:
    """The forward of an attention whose first rows have keys and values of their own."""

    attention: Any
    number: int
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the attention; outside of `DecoderEntry`, as it is."""
        if self.prefix:
            kwargs["past_key_values"] = _FirstRows(*self.prefix[self.number])
        return type(self.attention).forward(self.attention, *args, **kwargs)


@dataclass(frozen=True)
class _FirstRows:
    """Stands where a cache does, and gives back what it gets, but for the first rows.

    So these are not rotated, as they are not in PEFT's cache.
    """

    keys_1KVD: torch.Tensor
    values_1KVD: torch.Tensor

    def update(
        self, keys_1KTD: torch.Tensor, values_1KTD: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.keys_1KVD.shape[2]
        return (
            torch.cat((self.keys_1KVD.to(keys_1KTD.dtype), keys_1KTD[:, :, count:]), 2),
            torch.cat((self.values_1KVD.to(values_1KTD.dtype), values_1KTD[:, :, count:]), 2),
        )


def install_prompt(adapted: Any) -> None:
    """Lets a PEFT model with virtual tokens run on packed batches."""
    decoder = decoder_of(adapted)
    entry = DecoderEntry(decoder, adapted)
    decoder.forward = entry
    if adapted.active_peft_config.peft_type == "PREFIX_TUNING":
        layers: Any = layer_list(decoder)[1]
        for number, layer in enumerate(layers):
            layer.self_attn.forward = PrefixedAttention(layer.self_attn, number, entry.prefix)


def install_noise(model: Any, alpha: float | None) -> None:
    """Adds noise to the embeddings in training mode (NEFTune); nothing without an alpha."""
    if alpha is None:
        return
    decoder = decoder_of(model)
    entry = vars(decoder).get("forward")
    if not isinstance(entry, DecoderEntry):
        entry = decoder.forward = DecoderEntry(decoder)
    entry.noise_alpha = alpha


def noise(embedded_1TH: torch.Tensor, segments: Segments, alpha: float) -> torch.Tensor:
    """NEFTune's noise: uniform in `+-alpha / sqrt(L * H)` for a sequence of L tokens.

    arXiv 2310.05914, algorithm 1. Drawn from torch's generator, which is seeded by the step, so a
    resumed run draws the same. Not covered: a micro-batch of another size draws other numbers.
    """
    device, size = embedded_1TH.device, embedded_1TH.shape[2]
    lengths = torch.tensor(segments.lengths, device=device)
    tokens = lengths + torch.tensor(segments.offsets, device=device)
    bound_T = (alpha / (tokens * size).float().sqrt()).repeat_interleave(
        lengths, output_size=embedded_1TH.shape[1]
    )
    uniform_1TH = torch.rand(embedded_1TH.shape, device=device) * 2 - 1
    return (uniform_1TH * bound_T[:, None]).to(embedded_1TH.dtype)


def behind(segments: Segments, count: int) -> Segments:
    """The same segments behind one of `count` tokens that all of them go on from."""
    parents = segments.parents or (-1,) * len(segments.lengths)
    return Segments(
        (count, *segments.lengths), (-1, *(0 if each < 0 else each + 1 for each in parents))
    )
