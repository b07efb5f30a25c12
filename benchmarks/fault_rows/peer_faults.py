"""Faults for the peers: a callback, as users write them, in place of a bad machine.

Nothing of a peer is replaced. Signals come from the process itself at a chosen place, disks are
full because the system refuses longer files (RLIMIT_FSIZE), numbers go bad and memory runs out in
hooks on the model, and a kill in the middle of a save comes from Python's profiler, which sees
every call of a function and looks how many files there are.

What each step trained on and what its loss was is written down beside the run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from fault_rows.spec import Spec
from transformers import TrainerCallback

NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
)
"""What torch says on a CPU; accelerate recognizes it."""


class Planted(TrainerCallback):
    """The fault of a spec, and the notes of a run.

    Args:
        spec: what to do.
        output: the run's directory, where the checkpoints are.
    """

    def __init__(self, spec: Spec, output: Path) -> None:
        self.spec, self.fault, self.output = spec, spec.fault, output
        self.state: Any = None
        self.has_struck = False
        self.files_before = 0

    # Events of the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_again = self.state is not None  # auto_find_batch_size begins anew in the same process
        self.state = state
        model = kwargs["model"]
        if is_again:
            return
        model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        # Its output is what every loss is made of, also those that are fused with the head.
        last = next(part for name, part in model.named_modules() if name.endswith("model.norm"))
        last.register_forward_hook(self.after_last_norm)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_due("kill_step"):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for kind, number in (("kill", "SIGKILL"), ("term", "SIGTERM"), ("int", "SIGINT")):
            if self.is_due(f"{kind}_micro"):
                os.kill(os.getpid(), getattr(signal, number))
        if self.has_struck:
            time.sleep(self.spec.pause_seconds)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_due("kill_file") or self.is_due("int_file") or self.is_due("kill_rotate"):
            self.files_before = count_files(self.checkpoints()[0]) if self.checkpoints() else 0
            sys.setprofile(self.watch_files)
        if self.is_due("limit_bytes") or self.is_due("kill_bytes"):
            if self.fault.kind == "kill_bytes":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.fault.number, hard))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            note(self.output.parent / "losses.jsonl", step=state.global_step, loss=logs["loss"])

    # Hooks on the model

    def before_forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training or "input_ids" not in kwargs:
            return
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if self.fault.kind == "oom" and len(ids) > self.fault.number:
            raise RuntimeError(NO_MEMORY)
        keep = mask.bool() if mask is not None else ids == ids
        rows = [
            zlib.crc32(str(row[own].tolist()).encode()) for row, own in zip(ids, keep, strict=True)
        ]
        labels = kwargs.get("labels")
        supervised = int((labels[:, 1:] != -100).sum()) if labels is not None else None
        folder = self.output.parent
        step = self.state.global_step + 1
        note(folder / "rows.jsonl", step=step, rows=rows, supervised=supervised)

    def after_last_norm(self, module: Any, args: Any, result: Any) -> Any:
        factor = {"nan": float("nan"), "spike": float(self.fault.number)}.get(self.fault.kind)
        is_now = self.state.global_step == self.fault.step and not self.has_struck
        if factor is None or not is_now or not module.training:
            return None
        self.has_struck = self.fault.kind == "nan"
        return result * factor

    # When

    def is_due(self, kind: str) -> bool:
        """Whether the fault is of this kind and strikes now, once."""
        is_now = self.fault.kind == kind and self.state.global_step == self.fault.step
        is_now = is_now and not self.has_struck
        self.has_struck = self.has_struck or is_now
        return is_now

    def watch_files(self, frame: Any, event: str, argument: Any) -> None:
        """Called at every call and return of a function while a checkpoint is saved."""
        sys.setprofile(None)
        paths = self.checkpoints()
        if self.fault.kind == "kill_rotate":
            is_now = not paths or count_files(paths[0]) < self.files_before
        else:
            newest = self.output / f"checkpoint-{self.fault.step}"
            is_now = newest.is_dir() and count_files(newest) >= self.fault.number
        if not is_now:
            sys.setprofile(self.watch_files)
        elif self.fault.kind == "int_file":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def checkpoints(self) -> list[Path]:
        """Those that exist, the oldest first."""
        return sorted(self.output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


def count_files(folder: Path) -> int:
    """Files in a folder; 0 where there is none."""
    return len(os.listdir(folder)) if folder.is_dir() else 0


def note(path: Path, **values: Any) -> None:
    """Adds a line; the process id tells starts apart."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"process": os.getpid(), **values}) + "\n")
