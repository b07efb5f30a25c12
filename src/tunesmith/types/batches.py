"""Packed batches.

Shape letters: T tokens of a packed batch, N supervised rows of it, S sequences of it, G samples,
K sequences of each.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

from tunesmith.types.json import Json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Segments:
    """The segment table of a packed batch, as host integers.

    A segment may continue an earlier one, its parent: it sees the tokens of the parent, of the
    parent's parent and so on, and its positions go on from there. So a prefix that many sequences
    share is there once; a sequence is a segment without children, after all its ancestors. A parent
    may also be a whole sequence itself: then another one goes on from it.

    Args:
        lengths: tokens of each segment.
        parents: for each segment the index of an earlier one, or -1; empty if none has a parent.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...] = ()

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment, and one past the last token of all."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment, without its ancestors."""
        return max(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each segment's first token: the tokens of all its ancestors."""
        offsets: list[int] = []
        for parent in self.parents or [-1] * len(self.lengths):
            offsets.append(0 if parent < 0 else offsets[parent] + self.lengths[parent])
        return tuple(offsets)

    @cached_property
    def reach(self) -> int:
        """Tokens of the longest segment with its ancestors."""
        return max(map(sum, zip(self.offsets, self.lengths, strict=True)))

    def ancestors(self, segment: int) -> tuple[int, ...]:
        """The segments before a segment, the first one first."""
        found: list[int] = []
        while self.parents and (segment := self.parents[segment]) >= 0:
            found.append(segment)
        return tuple(reversed(found))

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbours of equal length as (first token, number of segments, length)."""
        runs: list[tuple[int, int, int]] = []
        for start, length in zip(self.starts, self.lengths, strict=False):
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((start, 1, length))
        return tuple(runs)

    @cached_property
    def memo(self) -> dict[Hashable, object]:
        """What others derive from the table and keep as long as it lives."""
        return {}


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end without padding, and the list of what is supervised.

    Row `row_N[i]` of the hidden states predicts `target_N[i]` with loss weight `weight_N[i]`, for
    sample `sample_N[i]`. A row that ends a shared prefix predicts the first token of each child, so
    it stands there more than once.

    Args:
        sequence_N: for each supervised row the number of its sequence in this batch.
        group_GK: the K sequences of each of G samples, by these numbers, in the sample's own order
            (chosen, rejected); only where an objective compares them.
        last_S: the row of each sequence's last token; a row of its own, even where sequences are
            equal.
        label_G: 1 where a sample is rated good, 0 where bad; of rated samples only.
        num_tokens: tokens of all sequences, each counted whole: the work that was asked for.
            Shared prefixes make the rows that are computed fewer, the tail makes them more.
        loss_weight: what the loss of this batch is divided by, were it alone: the supervised
            weight, or the samples where the objective counts these.
        columns_N: further numbers of each supervised row, by names that an objective knows.
        reference_S: log-probability of each sequence's answer by the model as it was before
            training, where it was computed in advance.
    """

    ids_T: torch.Tensor
    position_T: torch.Tensor
    segments: Segments
    row_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor
    sample_N: torch.Tensor
    sequence_N: torch.Tensor
    last_S: torch.Tensor
    group_GK: torch.Tensor
    label_G: torch.Tensor
    num_tokens: int
    loss_weight: float
    columns_N: Mapping[str, torch.Tensor] = field(default_factory=dict[str, Any])
    reference_S: torch.Tensor | None = None

    @property
    def num_stored_tokens(self) -> int:
        """Rows that are computed: a shared prefix counts once, and a tail of padding counts."""
        return int(self.ids_T.numel())

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Mapping):
                columns = cast("Mapping[str, torch.Tensor]", value)
                return {name: moved(column) for name, column in columns.items()}
            return value.to(device, non_blocking=True) if hasattr(value, "to") else value

        values = {each.name: moved(getattr(self, each.name)) for each in fields(self)}
        return replace(self, **values)


@dataclass(frozen=True)
class GlobalBatch:
    """All micro-batches of one optimizer step, with the weight that the loss is divided by.

    `num_tokens` and `num_stored_tokens` are the sums of those of the micro-batches; `facts` is what
    else there is to say of it, such as the mean reward of sampled answers.
    """

    epoch: int
    sample_ids: tuple[int, ...]
    micro_batches: tuple[PackedBatch, ...]
    supervised_weight: float
    num_supervised: int
    num_tokens: int
    facts: Mapping[str, Json] = field(default_factory=dict[str, Json])

    @property
    def num_stored_tokens(self) -> int:
        """Rows that are computed in this step."""
        return sum(batch.num_stored_tokens for batch in self.micro_batches)
