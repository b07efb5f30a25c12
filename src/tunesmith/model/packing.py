"""Proves, before training, that a model keeps the samples of a pack apart.

Attention goes through `ops.attention.attend`, which does. But architectures exist that mix tokens
elsewhere (convolutions, recurrent states) or ignore the attention registry and would then see other
samples, or even later tokens: their loss looks wonderful and the model is ruined.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.errors import ModelError
from tunesmith.model.agreement import relative_error
from tunesmith.types import Segments

LENGTHS = (9, 6)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 0.03
"""Relative error allowed in bfloat16, whose kernels round differently by shape (0.5 % seen)."""


def check_packing(model: Any, label: str) -> None:
    """Compares two sequences packed with the same two alone, and looks for sight of the future.

    Args:
        model: loaded with packed attention, no adapters yet.
        label: what the user calls it.

    Raises:
        ModelError: the results differ (`model.no-packing`).
    """
    rows = model.get_input_embeddings().num_embeddings
    ids_T = (torch.arange(sum(LENGTHS), device=model.device) * 37 + 11) % min(rows, 1000)
    first_ids, second_ids = ids_T.split(LENGTHS)
    changed_ids = first_ids.clone()
    changed_ids[-1] = (changed_ids[-1] + 1) % min(rows, 1000)
    try:
        packed = _hidden(model, ids_T, LENGTHS)
        alone = torch.cat([_hidden(model, x, (len(x),)) for x in (first_ids, second_ids)])
        changed = _hidden(model, changed_ids, (len(changed_ids),))
    except (NotImplementedError, KeyError, RuntimeError, TypeError) as error:
        raise _refusal(label, f"layers that cannot run on packs ({error})") from error
    limit = TOLERANCE.get(packed.dtype, HALF_TOLERANCE)
    before_last = slice(0, LENGTHS[0] - 1)
    if relative_error(changed[before_last], alone[before_last]) > limit:
        raise _refusal(label, "layers that see later tokens")
    if relative_error(packed, alone) > limit:
        raise _refusal(label, "layers that see other samples of a pack")


def _hidden(model: Any, ids_T: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    position_T = torch.cat([torch.arange(n, device=ids_T.device) for n in lengths])
    with torch.no_grad():
        out = model.get_decoder()(
            input_ids=ids_T[None],
            position_ids=position_T[None],
            use_cache=False,
            segments=Segments(lengths),
        )
    return out.last_hidden_state[0]


def _refusal(label: str, found: str) -> ModelError:
    return ModelError(
        "model.no-packing",
        label,
        found=found,
        expected="a decoder whose layers mix tokens through transformers' attention registry only "
        "(Llama, Qwen, Mistral, Gemma and their kin)",
    )
