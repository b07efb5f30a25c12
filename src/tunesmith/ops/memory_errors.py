"""How the end of memory is told, on any device."""

from __future__ import annotations

import re

import torch

# The CPU allocator and libraries beside torch raise plain RuntimeErrors.
_SAID = re.compile(r"can(?:'t|not) allocate memory|out of memory|DefaultCPUAllocator", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: Python's, CUDA's, or the CPU allocator's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
