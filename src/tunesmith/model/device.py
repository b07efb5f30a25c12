"""What this machine offers: device, memory, and whether bfloat16 is fast on it; its settings."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """The device a run computes on."""

    kind: str
    name: str
    memory_bytes: int
    has_fast_bf16: bool

    @property
    def torch_device(self) -> torch.device:
        """The torch device."""
        return torch.device(self.kind)

    def measure_flops(self) -> float:
        """Floating-point operations a second in large matrix products, timed for a moment.

        What training reaches is less by memory traffic and small operations.
        """
        dtype = torch.bfloat16 if self.has_fast_bf16 else torch.float32
        size = 1024 if self.kind == "cpu" else 8192
        matrix = torch.ones(size, size, dtype=dtype, device=self.torch_device)
        times: list[float] = []
        for _ in range(5):
            started = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # waits for the device
            times.append(time.perf_counter() - started)
        return 2 * size**3 / min(times)


def find_device() -> Device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(
            "cuda",
            properties.name,
            properties.total_memory,
            # Emulated bfloat16 (before Ampere) is slow, and flash attention has no kernels for it.
            has_fast_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        )
    if torch.backends.mps.is_available():
        return Device("mps", "Apple GPU", system_memory(), has_fast_bf16=False)
    # bfloat16 without these instructions is 10x slower than float32 (AVX2: 9.8 against 94 GFLOP/s).
    # torch tells of them in torch.cpu.get_capabilities from 2.13 on only under these names.
    cpu: Any = torch.cpu
    has_bf16 = bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    name = f"CPU, {choose_threads(os.environ)} threads"
    return Device("cpu", name, system_memory(), has_fast_bf16=has_bf16)


def find_compiler(device: Device) -> str | None:
    """What torch would compile kernels with, None if there is nothing."""
    if device.kind == "cuda":
        return "triton" if importlib.util.find_spec("triton") is not None else None
    if device.kind != "cpu":
        return None
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return next((name for name in names if name and shutil.which(name)), None)


# Settings of the process


ALLOCATOR = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}
"""glibc's settings for mallopt(3), with their numbers in malloc.h and our values."""

PRIMITIVES = 256
"""Kernels that oneDNN keeps. It makes some 55 for every new number of tokens, 30 MB of them, and by
default keeps 1,024."""


@dataclass(frozen=True, slots=True)
class MachineSettings:
    """What `prepare_machine` set, for the log."""

    threads: int
    interop_threads: int
    flushes_denormals: bool
    allocator: str


@cache
def prepare_machine(device: Device) -> MachineSettings:
    """Sets threads, denormal numbers and the allocator for training, once in a process.

    Threads are the physical cores that this process may use: two threads of one core share its
    matrix units. `OMP_NUM_THREADS` wins over that. Denormal numbers are flushed to zero: gradients
    full of them made products twice as slow. To be called before anything is computed.
    """
    # Read when oneDNN is used for the first time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))
    threads = choose_threads(os.environ)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1 and device.kind == "cpu":
        with suppress(RuntimeError):  # too late: something has run in parallel already
            torch.set_num_interop_threads(1)
    return MachineSettings(
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        flushes_denormals=torch.set_flush_denormal(True),
        allocator=set_allocator(os.environ) if device.kind == "cpu" else "untouched",
    )


def choose_threads(environment: Mapping[str, str]) -> int:
    """Threads to compute with: `OMP_NUM_THREADS`, else the cores this process may use."""
    asked = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    cores = count_cores(_allowed_cpus(), Path("/sys/devices/system/cpu"))
    quota = read_cpu_quota(Path("/sys/fs/cgroup"))
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def count_cores(cpus: set[int], topology: Path) -> int:
    """Physical cores behind logical CPUs; what the system does not tell counts as a core each."""
    cores: set[object] = set()
    for cpu in cpus:
        folder = topology / f"cpu{cpu}" / "topology"
        names = (folder / "physical_package_id", folder / "core_id")
        texts = [_read(name) for name in names]
        cores.add(cpu if None in texts else tuple(texts))
    return max(1, len(cores))


def read_cpu_quota(cgroup: Path) -> float | None:
    """CPUs' worth of time that a container's cgroup (version 2 or 1) grants, None for all."""
    text = _read(cgroup / "cpu.max")
    if text is None:
        quota, period = (_read(cgroup / "cpu" / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
        text = f"{quota} {period}"
    quota, _, period = text.partition(" ")
    if not (quota.isdecimal() and period.isdecimal()) or int(period) == 0:
        return None
    return int(quota) / int(period)


def set_allocator(environment: Mapping[str, str]) -> str:
    """Makes glibc keep freed tensors for the next ones; says what was set.

    A tensor from a fresh mapping costs 2 us for each page of 4 KiB when it is first written: with
    all of them mapped (thresholds of 128 KiB or 1 MiB) a step took 40 % more processor time, and by
    default those above 32 MiB are, which the logits often are. A heap that keeps everything is the
    fastest but slowly fills with holes; `HeapTrimmer` gives those back.

    Other C libraries and a user's own settings are left alone.
    """
    given = [name for name in environment if name.startswith("MALLOC_")]
    given += [name for name in environment if name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    if given:
        return f"untouched: {', '.join(sorted(given))} is set"
    if not _has_glibc():
        return "untouched: not glibc"
    mallopt = ctypes.CDLL(None).mallopt
    done = [name for name, (code, value) in ALLOCATOR.items() if mallopt(code, value) == 1]
    return ", ".join(f"{name}={ALLOCATOR[name][1]}" for name in done)


NEAR = 0.93
"""Of the predicted peak: a step may take a tenth more than the one before it from the same heap."""


class HeapTrimmer:
    """Gives free memory back to the system when a process holds more than it should need.

    Packs of different lengths leave holes in the heap, so that the process grows by some 20 MB a
    step where the tensors of a step do not. Giving all free pages back (malloc_trim) costs their
    first writes in the next step, 8 % of its processor time: so it is done only near a limit, and
    not after two steps in a row.

    Args:
        device: the CPU; others are left alone.
        limit_bytes: what the process should need, the predicted peak.
    """

    def __init__(self, device: Device, limit_bytes: int) -> None:
        self._device = device
        self._limit = NEAR * limit_bytes
        self._is_able = device.kind == "cpu" and _has_glibc()
        self._has_just_trimmed = False

    def after_step(self) -> bool:
        """Trims if it is time to; whether it did."""
        is_full = self._is_able and used_memory_bytes(self._device) > self._limit
        self._has_just_trimmed = is_full and not self._has_just_trimmed
        if self._has_just_trimmed:
            ctypes.CDLL(None).malloc_trim(0)
        return self._has_just_trimmed


def _has_glibc() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except ValueError:  # musl does not know the name
        return False


def _allowed_cpus() -> set[int]:
    if sys.platform.startswith("linux"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


# Memory


class PeakMemory:
    """The most memory a process uses on a device, in all and in the phase begun last.

    On CUDA it is what torch has allocated, elsewhere the whole process with its libraries.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before = 0

    def begin_phase(self) -> bool:
        """Starts a new phase without what the last one left in the heap.

        Returns:
            False if the system cannot forget the peak so far.
        """
        before = peak_memory_bytes(self._device)
        if self._device.kind == "cpu" and _has_glibc():
            ctypes.CDLL(None).malloc_trim(0)
        if not _forget_peak(self._device):
            return False
        self._before = max(self._before, before)
        return True

    @property
    def phase_bytes(self) -> int:
        """The peak since the last phase began."""
        return peak_memory_bytes(self._device)

    @property
    def bytes(self) -> int:
        """The peak of all phases."""
        return max(self._before, self.phase_bytes)

    def facts(self, predicted_bytes: int) -> dict[str, int]:
        """For the summary: the peak of all, of the last phase, and what was predicted for it."""
        return {
            "peak_memory_bytes": self.bytes,
            "peak_of_steps_bytes": self.phase_bytes,
            "predicted_peak_of_steps_bytes": predicted_bytes,
        }


def peak_memory_bytes(device: Device) -> int:
    """The most memory this process has used on the device so far."""
    if device.kind == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform.startswith("linux"):
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory_bytes(device: Device) -> int:
    """The memory this process uses on the device now."""
    if device.kind == "cuda":
        return torch.cuda.memory_allocated()
    if sys.platform.startswith("linux"):
        return _status_bytes("VmRSS")
    return peak_memory_bytes(device)


def system_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of this machine in bytes, or what a container's cgroup grants of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = ("memory.max", "memory/memory.limit_in_bytes")
    limits = [text for text in (_read(cgroup / name) for name in names) if text]
    return min([physical, *(int(text) for text in limits if text.isdecimal())])


def _forget_peak(device: Device) -> bool:
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    except OSError:  # another system, or a container that forbids it
        return False
    return True


def _status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in text.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return None
