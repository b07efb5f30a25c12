"""What all sides of the training benchmarks share: the work, the clock, the memory, the result.

Runs on the python of every side, so it imports neither tunesmith nor a peer.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

IGNORED_LABEL = -100

Row = dict[str, Any]
"""One training sequence: input_ids, labels (-100 for no loss), and prompt and response as text."""


@dataclass(frozen=True)
class Work:
    """What all sides do; a JSON file carries it to the children."""

    data: str
    model: str
    method: str
    """lora or full."""
    rank: int
    steps: int
    global_batch: int
    max_length: int
    learning_rate: float
    seed: int
    threads: int


@dataclass(frozen=True)
class Shared:
    """What tunesmith tells the peers: the rows of each global batch, and the recipe's numbers."""

    model_path: str
    dtype: str
    """float32 or bfloat16: what the machine is fast at."""
    lora: dict[str, Any] | None
    adapter: str | None
    """Folder of the adapter before the first step, so that all sides start alike."""
    clip_norm: float
    batches: list[list[Row]]

    @classmethod
    def read(cls, folder: Path) -> Shared:
        """What tunesmith's side left in the folder."""
        return cls(**read_json(folder / "shared.json"))

    def rows(self, steps: int) -> list[Row]:
        """The rows of so many steps, and those of the first step once more."""
        return [row for batch in [*self.batches[:steps], self.batches[0]] for row in batch]


@dataclass(frozen=True)
class Measured:
    """One side's figures, step by step."""

    label: str
    versions: dict[str, str]
    losses: list[float]
    gradient_norms: list[float]
    seconds: list[float]
    cpu_seconds: list[float]
    """Of the process: far below wall time x threads, others were busy too."""
    loss_again: float
    """Of the first global batch after all steps: comparing it with itself is free of noise."""
    level_bytes: int
    """Resident memory right before the first step: libraries, weights, data."""
    peak_bytes: int
    """Largest resident memory during the steps."""
    supervised_extra: int = 0
    """Supervised tokens that this side has beyond the shared rows."""


@dataclass
class StepClock:
    """Wall time, CPU time, loss and gradient norm of each step, and memory over all of them."""

    num_steps: int
    """Steps that count; what comes after them does not."""
    device: str = "cpu"
    """cpu or cuda: whose memory counts, and what has to be done when a step ends."""
    steps: list[tuple[float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    level_bytes: int = 0
    peak_bytes: int = 0
    _started: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        """Begins a step; the first one begins the memory's measurement, too."""
        if not self.steps:
            self.level_bytes = begin_memory(self.device)
        self._started = (time.perf_counter(), time.process_time())

    @property
    def is_done(self) -> bool:
        """Whether all steps that count are over."""
        return len(self.steps) >= self.num_steps

    def stop(self, *, wait: bool = True) -> None:
        """Ends a step; without `wait` its numbers are here already, so the GPU is not asked."""
        if wait and self.device == "cuda":
            synchronize()
        wall, cpu = self._started
        self.steps.append((time.perf_counter() - wall, time.process_time() - cpu))
        if len(self.steps) == self.num_steps:
            self.peak_bytes = peak_memory(self.device)

    def note(self, loss: float, gradient_norm: float) -> None:
        """Writes down what a step gave."""
        self.losses.append(loss)
        self.gradient_norms.append(gradient_norm)

    def measured(
        self, label: str, packages: tuple[str, ...], loss_again: float, supervised_extra: int = 0
    ) -> Measured:
        """All figures of the steps that count."""
        seconds, cpu_seconds = (list(times) for times in zip(*self.steps, strict=True))
        count = self.num_steps
        return Measured(
            label=label,
            versions={package: version(package) for package in packages},
            losses=self.losses[:count],
            gradient_norms=self.gradient_norms[:count],
            seconds=seconds[:count],
            cpu_seconds=cpu_seconds[:count],
            loss_again=loss_again,
            level_bytes=self.level_bytes,
            peak_bytes=self.peak_bytes,
            supervised_extra=supervised_extra,
        )


def clock_callback(clock: StepClock) -> Any:
    """Times the optimizer steps of transformers' trainer, on which both peers stand.

    Fetching and collating a step's rows come before its beginning and are not counted. The trainer
    has to log every step.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.stop()

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs:
                clock.note(float(logs["loss"]), float(logs["grad_norm"]))

    return Callback()


# Memory


def begin_memory(device: str) -> int:
    """Lets the peak count anew; returns the bytes in use now."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # VmHWM counts anew after this (proc(5): clear_refs).
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status_bytes("VmRSS")


def peak_memory(device: str) -> int:
    """Most bytes in use since then: of tensors on CUDA, of the process on the CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def synchronize() -> None:
    """Waits for the GPU."""
    import torch

    torch.cuda.synchronize()


def status_bytes(key: str) -> int:
    """A size in /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# Files


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """An object into a file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def write_result(folder: Path, measured: Measured) -> None:
    """Where the parent looks for it."""
    write_json(folder / "result.json", asdict(measured))
