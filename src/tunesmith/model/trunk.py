"""The frozen layers below everything that is trained, computed once for each sequence.

What enters the first trained layer depends on the sequence alone: attention stays inside a
sequence, and nothing below changes. It is kept on disk, and from the second epoch on the layers
below do not run. With the last 2 of 30 layers trained that is most of the work: 1,279 tokens of
SmolLM2-135M, half of them supervised, take 429 ms instead of 1,336 (one core, bfloat16), of which
165 are the head's.

A decoder of some of the layers is an ordinary decoder of the model's own class that holds the same
modules, so nothing of transformers is replaced.

Shape letters: T tokens, H hidden size, L tokens of a segment.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tunesmith.model.agreement import relative_error
from tunesmith.model.layers import decoder_of, first_trainable_layer, layer_list, parts_below
from tunesmith.model.trunk_cache import TrunkCache, room_for
from tunesmith.ops.kernels import are_fused
from tunesmith.types import PackedBatch, Segments

TRUNK_VERSION = 1
"""Goes up when the same weights and tokens give other hidden states, or the files change."""

MAX_BYTES = 20 * 2**30
"""Disk for all trunks together by default."""

CHECK_LENGTHS = (13, 8)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
HALF_TOLERANCE = 0.02


@dataclass(frozen=True)
class CachedTrunk:
    """A decoder cut in two, with what comes out of the lower half kept on disk.

    Args:
        lower: the frozen half.
        upper: the half with all that is trained.
        cache: rows that enter the upper half.
    """

    lower: LowerLayers
    upper: Any
    cache: TrunkCache

    def decode(self, base: Any, batch: PackedBatch) -> torch.Tensor:
        """The decoder's last hidden states, `hidden_TH`; the lower half runs for what is new."""
        del base  # both halves hold its modules
        hidden_TH = self._entering(batch)
        out = self.upper(
            inputs_embeds=hidden_TH[None],
            position_ids=batch.position_T[None],
            use_cache=False,
            segments=batch.segments,
        )
        return out.last_hidden_state[0]

    def _entering(self, batch: PackedBatch) -> torch.Tensor:
        segments = batch.segments
        keys = segment_keys(batch.ids_T, segments)
        size = (batch.ids_T.numel(), self.cache.width)
        kept_TH = torch.empty(size, dtype=self.cache.dtype)
        parts_LH = [kept_TH[start:stop] for start, stop in pairwise(segments.starts)]
        pairs = enumerate(zip(keys, parts_LH, strict=True))
        missing = [number for number, (key, part) in pairs if not self.cache.read(key, part)]
        device = batch.ids_T.device
        if not missing:
            return kept_TH.to(device, non_blocking=True)
        # A segment that goes on from another needs it: then all are computed. So they are where
        # most are new: a part has another number of rows, for which a CPU makes new kernels.
        num_missing = sum(segments.lengths[number] for number in missing)
        if segments.parents or 2 * num_missing > len(batch.ids_T):
            hidden_TH = self.lower(batch.ids_T, batch.position_T, segments)
            self.cache.write(keys, hidden_TH, segments.lengths)
            return hidden_TH
        rows_T, part = _rows_of(segments, missing)
        rows_T = rows_T.to(device)
        made_TH = self.lower(batch.ids_T[rows_T], batch.position_T[rows_T], part)
        self.cache.write([keys[number] for number in missing], made_TH, part.lengths)
        return kept_TH.to(device).index_copy_(0, rows_T, made_TH)


class LowerLayers:
    """The embedding and the layers below a cut."""

    def __init__(self, decoder: Any, cut: int) -> None:
        _, layers = layer_list(decoder)
        self.tap = _Tap(layers[min(cut, len(layers) - 1)])
        self.decoder = _decoder_with(decoder, [*layers[:cut], self.tap], first=0)

    @torch.no_grad()
    def __call__(
        self, ids_T: torch.Tensor, position_T: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """What enters the layer at the cut, `hidden_TH`."""
        self.decoder(
            input_ids=ids_T[None], position_ids=position_T[None], use_cache=False, segments=segments
        )
        return self.tap.take()[0]


class _Tap(torch.nn.Module):
    """Stands where the first trained layer would, and keeps what comes in."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.attention_type = getattr(like, "attention_type", None)
        self.hidden_1TH: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden_1TH = hidden_states
        return hidden_states

    def take(self) -> torch.Tensor:
        if self.hidden_1TH is None:
            raise RuntimeError("the layers below did not run")
        taken, self.hidden_1TH = self.hidden_1TH, None
        return taken


def open_trunk(
    model: Any,
    folder: Path,
    *,
    num_tokens: int,
    note: Callable[[str], None],
    autocast_dtype: torch.dtype | None = None,
    max_bytes: int = MAX_BYTES,
) -> CachedTrunk | None:
    """The cached trunk of a model, or None where it cannot be used, with a note that says why.

    Args:
        model: ready to train, on its device.
        folder: where all caches are.
        num_tokens: tokens of all sequences that will come.
        note: told what is kept and what does not fit.
        autocast_dtype: of the products, None without autocast.
        max_bytes: disk for all caches in `folder`.
    """
    decoder = decoder_of(model)
    try:
        cut = first_trainable_layer(model)
        if cut == 0:
            return None
        lower, upper = LowerLayers(decoder, cut), upper_layers(decoder, cut)
        with _autocast(decoder, autocast_dtype):
            hidden_TH, problem = check_trunk(decoder, lower, upper)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        note(f"frozen layers are computed in every epoch: a decoder of another build ({error})")
        return None
    if problem:
        note(f"frozen layers are computed in every epoch: {problem}")
        return None
    name = fingerprint(decoder, cut, hidden_TH.dtype, autocast_dtype)
    wanted = num_tokens * hidden_TH.shape[1] * hidden_TH.element_size()
    folder.mkdir(parents=True, exist_ok=True)
    room = room_for(folder, name, wanted, max_bytes)
    try:
        cache = TrunkCache(
            folder / name, hidden_TH.shape[1], hidden_TH.dtype, max_bytes=room, note=note
        )
    except OSError as error:
        reason = "another run uses it" if isinstance(error, BlockingIOError) else error.strerror
        note(f"frozen layers are computed in every epoch: no cache in {folder / name}: {reason}")
        return None
    fit = "" if wanted <= room else f", of which {room / 2**30:.1f} GiB fit"
    note(f"the first {cut} layers run once a sequence: {wanted / 2**30:.2f} GiB on disk{fit}")
    return CachedTrunk(lower, upper, cache)


def upper_layers(decoder: Any, cut: int) -> Any:
    """A decoder of the layers from the cut on; it takes `inputs_embeds`."""
    return _decoder_with(decoder, list(layer_list(decoder)[1][cut:]), first=cut)


def check_trunk(decoder: Any, lower: LowerLayers, upper: Any) -> tuple[torch.Tensor, str | None]:
    """Runs both halves and the whole on a few tokens.

    Returns:
        rows as they enter the upper half, and what forbids keeping them: random numbers below the
        cut (dropout), or halves that make another whole, as in a model that scales its embeddings
        outside the embedding. None if all is well.
    """
    device = decoder.get_input_embeddings().weight.device
    count = decoder.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(7)
    ids_T = torch.randint(0, count, (sum(CHECK_LENGTHS),), generator=generator).to(device)
    position_T = torch.cat([torch.arange(length) for length in CHECK_LENGTHS]).to(device)
    segments = Segments(CHECK_LENGTHS)
    was_training = decoder.training
    with torch.no_grad():
        decoder.train()
        first_TH, second_TH = (lower(ids_T, position_T, segments) for _ in range(2))
        decoder.eval()
        common: dict[str, Any] = {
            "position_ids": position_T[None], "use_cache": False, "segments": segments
        }  # fmt: skip
        whole = decoder(input_ids=ids_T[None], **common).last_hidden_state
        halves = upper(inputs_embeds=first_TH[None], **common).last_hidden_state
        decoder.train(was_training)
    if not torch.equal(first_TH, second_TH):
        return first_TH, "they draw random numbers (dropout)"
    error = relative_error(halves, whole)
    if not error <= TOLERANCE.get(first_TH.dtype, HALF_TOLERANCE):
        return first_TH, f"cut in two, the decoder differs from the whole by {error:.2g}"
    return first_TH, None


def fingerprint(
    decoder: Any, cut: int, dtype: torch.dtype, autocast_dtype: torch.dtype | None
) -> str:
    """Name of a cache: all that decides the rows, but for the tokens.

    The weights below the cut are read whole (about a second a GB).
    """
    config = decoder.config.to_json_string(use_diff=True)
    device = decoder.get_input_embeddings().weight.device.type
    forwards = [type(vars(layer).get("forward")).__name__ for layer in layer_list(decoder)[1][:1]]
    how = f"{device} {forwards} {are_fused()}"
    text = f"{TRUNK_VERSION} {cut} {dtype} {autocast_dtype} {how} {config}"
    digest = hashlib.sha256(text.encode())
    for module in [*parts_below(decoder), *layer_list(decoder)[1][:cut]]:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(data.numpy()))
    return digest.hexdigest()[:24]


def segment_keys(ids_T: torch.Tensor, segments: Segments) -> list[bytes]:
    """What each segment's rows are found by: a hash of its tokens and of its ancestors'.

    So a sequence is found again in any order, in any batch, and in another run's data.
    """
    ids = ids_T.cpu().numpy()
    keys: list[bytes] = []
    for number, (start, stop) in enumerate(pairwise(segments.starts)):
        parent = segments.parents[number] if segments.parents else -1
        before = keys[parent] if parent >= 0 else b""
        keys.append(hashlib.blake2b(before + ids[start:stop].tobytes(), digest_size=16).digest())
    return keys


def _rows_of(segments: Segments, numbers: Sequence[int]) -> tuple[torch.Tensor, Segments]:
    """The rows of some segments, and their table."""
    starts = segments.starts
    rows = [torch.arange(starts[number], starts[number + 1]) for number in numbers]
    return torch.cat(rows), Segments(tuple(segments.lengths[number] for number in numbers))


def _decoder_with(decoder: Any, layers: Sequence[torch.nn.Module], first: int) -> Any:
    """A decoder of the same class and with the same modules, but for its layers."""
    config = copy.deepcopy(decoder.config)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(layers)
    if kinds:
        config.layer_types = [*kinds, kinds[-1]][first : first + len(layers)]
    with torch.device("meta"):
        part = type(decoder)(config)
    name, _ = layer_list(decoder)
    for child, module in decoder.named_children():
        setattr(part, child, torch.nn.ModuleList(layers) if child == name else module)
    for key, values in [
        *decoder.named_buffers(recurse=False),
        *decoder.named_parameters(recurse=False),
    ]:
        setattr(part, key, values)
    return part


def _autocast(decoder: Any, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if dtype is None:
        return nullcontext()
    return torch.autocast(decoder.get_input_embeddings().weight.device.type, dtype=dtype)
