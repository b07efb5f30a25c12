"""The loss of every sample in every epoch, a by-product of training: it shows which stay hard.

A row whose loss stays high while the others fall is often one with a wrong label (the idea of
dataset cartography, arXiv 2009.10795). One line a step stands in `samples/losses.jsonl`.

Shape letters: N supervised rows of a micro-batch, G samples of a global batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from tunesmith.types import PackedBatch

FILE = "losses.jsonl"


class SampleSums:
    """Adds up what each sample of a global batch loses, over its micro-batches, on the device."""

    def __init__(self, sample_ids: Sequence[int], device: torch.device) -> None:
        self.ids_G = torch.tensor(distinct(sample_ids), device=device)
        self.sum_2G: torch.Tensor | None = None

    def add(self, batch: PackedBatch, loss_N: torch.Tensor | None) -> None:
        """Takes the losses of a micro-batch's rows; `batch` is on the device."""
        if loss_N is None:
            return
        weight_N = batch.weight_N.to(loss_N.dtype)
        place_N = torch.searchsorted(self.ids_G, batch.sample_N.to(self.ids_G))
        found_2N = torch.stack((weight_N * loss_N, weight_N))
        if self.sum_2G is None:
            self.sum_2G = found_2N.new_zeros(2, len(self.ids_G))
        self.sum_2G.index_add_(1, place_N, found_2N)

    def means(self) -> torch.Tensor:
        """Loss per weight of each sample, in the order of `distinct`; empty if nothing is known."""
        if self.sum_2G is None:
            return torch.zeros(0, device=self.ids_G.device)
        return (self.sum_2G[0] / self.sum_2G[1]).float()


def distinct(sample_ids: Sequence[int]) -> list[int]:
    """Each sample of a global batch once, in order."""
    return sorted(set(sample_ids))


@dataclass
class SampleLosses:
    """The file of a run; what cannot be written there is said once, and stops nothing.

    Args:
        folder: `samples/` of the run.
    """

    folder: Path
    is_off: bool = False
    _file: TextIO | None = field(default=None, repr=False)

    def record(
        self, step: int, epoch: int, sample_ids: Sequence[int], losses: Sequence[float]
    ) -> str | None:
        """Writes down what the samples of a step lost; a message if that fails."""
        if self.is_off or not losses:
            return None
        row = {
            "step": step,
            "epoch": epoch,
            "samples": distinct(sample_ids),
            # A sample without any weight has none.
            "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in losses],
        }
        try:
            if self._file is None:
                self._file = _opened(self.folder / FILE)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            self.close()
            self.is_off = True
            return f"losses of samples are not written down any more: {error}"
        return None

    def close(self) -> None:
        """Ends the file."""
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been told
                self._file.close()
            self._file = None


def _opened(path: Path) -> TextIO:
    path.parent.mkdir(exist_ok=True)
    is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    file = path.open("a", encoding="utf-8")
    if is_torn:  # killed in the middle of a line: the next one starts on its own
        file.write("\n")
    return file


def read_sample_losses(
    folder: Path, is_known: Callable[[int], bool] = lambda _: True
) -> dict[int, dict[int, float]]:
    """Of each sample its loss by epoch; of a step that ran twice the last one counts."""
    found: dict[int, dict[int, float]] = {}
    for row in _rows(folder / FILE):
        for sample, loss in zip(row["samples"], row["losses"], strict=True):
            if loss is not None and is_known(sample):
                found.setdefault(sample, {})[row["epoch"]] = loss
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):  # torn by a kill
                yield json.loads(line)
