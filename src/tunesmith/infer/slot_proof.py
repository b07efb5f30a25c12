"""Proves, before anything is answered, that slots give a model's own next tokens.

Most decoders mix tokens through transformers' attention registry alone. For one that does it
elsewhere (recurrent states, a cache shared between layers), that has attention sinks or learned
prompts, the proof fails and transformers' own `generate` answers.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.infer.batch import slot_attention
from tunesmith.infer.slots import Slots, read_prompts, read_tokens
from tunesmith.ops.memory_errors import is_out_of_memory

LENGTHS = (21, 13)
"""Of the prompts; each is read without its last token, which is then read alone."""

SHARED_TOKENS = 9

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative; in fp64, too, transformers norms in fp32."""
HALF_TOLERANCE = 0.06
"""In half precision every product rounds, at other places for other shapes."""


@torch.inference_mode()
def slot_error(model: Any) -> str | None:
    """Why slots do not fit a model, None if they do: two prompts, by slots and by itself."""
    rows = model.get_input_embeddings().num_embeddings
    prompts = [[(n * 37 + 11) % min(rows, 1000) for n in range(length)] for length in LENGTHS]
    prompts[1][SHARED_TOKENS:] = [(token + 1) % rows for token in prompts[1][SHARED_TOKENS:]]
    try:
        with slot_attention(model):
            slots = Slots(len(prompts) + 1, 64)
            read_prompts(model, slots, [ids[:-1] for ids in prompts], 0)
            places = [length - 1 for length in LENGTHS]
            found = read_tokens(model, slots, [ids[-1] for ids in prompts], places).float()
        ids = [torch.tensor([each], device=model.device) for each in prompts]
        expected = torch.cat([model(each, use_cache=False).logits[:, -1].float() for each in ids])
    except (
        NotImplementedError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
    ) as e:
        if is_out_of_memory(e):
            raise
        return f"its layers cannot run on slots ({type(e).__name__}: {str(e)[:100]})"
    if found.shape != expected.shape:
        return "its answers begin with learned prompts"
    error = float((found - expected).norm() / expected.norm())
    if not error <= TOLERANCE.get(model.dtype, HALF_TOLERANCE):
        return f"slots give other next tokens (by {error:.1g})"
    return None
