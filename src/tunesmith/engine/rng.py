"""Random numbers of a step as a pure function of the seed: none to save, none to restore."""

from __future__ import annotations

import hashlib

import torch


def seed_run(seed: int) -> None:
    """Seeds the drawing of new weights (adapters)."""
    torch.manual_seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Seeds everything random inside one optimizer step (dropout)."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
