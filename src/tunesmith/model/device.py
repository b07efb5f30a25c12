"""What this machine offers: device, memory, and whether bfloat16 is fast on it."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
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
        return Device("mps", "Apple GPU", _system_memory(), has_fast_bf16=False)
    # bfloat16 without these instructions is 10x slower than float32 (AVX2: 9.8 against 94 GFLOP/s).
    # torch tells of them in torch.cpu.get_capabilities from 2.13 on only under these names.
    cpu: Any = torch.cpu
    has_bf16 = bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    name = f"CPU, {torch.get_num_threads()} threads"
    return Device("cpu", name, _system_memory(), has_fast_bf16=has_bf16)


def peak_memory_bytes(device: Device) -> int:
    """The most memory this process has used on the device so far."""
    if device.kind == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
