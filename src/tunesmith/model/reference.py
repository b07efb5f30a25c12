"""The model as it was before training, for objectives that compare with it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


def begins_as_nothing(model: Any, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> bool:
    """Whether a model has adapters that, before the first step, change nothing at all."""
    # Some initializations move a part of the base into the adapter, and some kinds have no B.
    b_matrices = [parameter for name, parameter in parameters if ".lora_B." in name]
    are_zero = bool(b_matrices) and not any(bool(p.any()) for p in b_matrices)
    return are_zero and hasattr(model, "disable_adapter")


def open_reference(
    model: Any, parameters: Sequence[tuple[str, torch.nn.Parameter]]
) -> tuple[Callable[[], AbstractContextManager[object]], str]:
    """What turns a model into what it was before training, and a line that says how.

    Adapters that begin as nothing are switched off, which takes no memory. Of other weights that
    are trained a copy is kept and put in their place; a run that goes on must open this before
    weights are restored.

    Args:
        model: before its first step.
        parameters: what is trained.
    """
    if begins_as_nothing(model, parameters):
        return model.disable_adapter, "the reference is the model with its adapters switched off"
    copies = [(parameter, parameter.detach().clone()) for _, parameter in parameters]
    num_bytes = sum(copy.nbytes for _, copy in copies)

    @contextmanager
    def as_before() -> Generator[None]:
        trained = [parameter.data for parameter, _ in copies]
        for parameter, copy in copies:
            parameter.data = copy
        # Autocast keeps its casts by parameter, whatever values that has by now.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            for (parameter, _), values in zip(copies, trained, strict=True):
                parameter.data = values
            torch.clear_autocast_cache()

    return (
        as_before,
        f"the reference is a copy of the trained weights, {num_bytes / 2**20:,.0f} MiB",
    )
