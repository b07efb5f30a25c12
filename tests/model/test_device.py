"""Threads, allocator and memory of the machine, read from folders that look like Linux's."""

import ctypes
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tunesmith.model import device as module
from tunesmith.model.device import (
    Device,
    HeapTrimmer,
    PeakMemory,
    choose_threads,
    count_cores,
    find_compiler,
    find_device,
    peak_memory_bytes,
    prepare_machine,
    read_cpu_quota,
    set_allocator,
    system_memory,
    used_memory_bytes,
)

CPU = Device("cpu", "CPU", 1 << 34, has_fast_bf16=True)
is_linux = sys.platform.startswith("linux")


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n", encoding="ascii")
    return folder


def topology(folder: Path, places: list[tuple[int, int]]) -> Path:
    files: dict[str, str] = {}
    for cpu, (package, core) in enumerate(places):
        files[f"cpu{cpu}/topology/physical_package_id"] = str(package)
        files[f"cpu{cpu}/topology/core_id"] = str(core)
    return write(folder, files)


@pytest.mark.parametrize(
    ("places", "cpus", "cores"),
    [
        ([(0, 0), (0, 1), (0, 0), (0, 1)], {0, 1, 2, 3}, 2),  # two threads a core
        ([(0, 0), (0, 1), (0, 0), (0, 1)], {0, 2}, 1),
        ([(0, 0), (1, 0)], {0, 1}, 2),  # two sockets
        ([], {0, 1, 2}, 3),  # nothing is told
        ([], set[int](), 1),
    ],
)
def test_cores(tmp_path: Path, places: list[tuple[int, int]], cpus: set[int], cores: int) -> None:
    assert count_cores(cpus, topology(tmp_path, places)) == cores


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "1 0"}, None),
        ({}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert read_cpu_quota(write(tmp_path, files)) == quota


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_threads({"OMP_NUM_THREADS": "3"}) == 3
    assert choose_threads({"OMP_NUM_THREADS": "5,2"}) == 5
    monkeypatch.setattr(module, "count_cores", lambda *_: 8)
    for quota, threads in ((None, 8), (2.5, 3), (0.5, 1), (64.0, 8)):
        monkeypatch.setattr(module, "read_cpu_quota", lambda _, quota=quota: quota)
        assert choose_threads({}) == threads
        assert choose_threads({"OMP_NUM_THREADS": "many"}) == threads


def test_a_container_has_less_memory(tmp_path: Path) -> None:
    physical = system_memory(tmp_path)
    assert system_memory(write(tmp_path, {"memory.max": "max"})) == physical
    assert system_memory(write(tmp_path, {"memory.max": "1048576"})) == 1048576
    files = {"memory/memory.limit_in_bytes": "524288"}
    assert system_memory(write(tmp_path, files)) == 524288


def test_the_users_allocator_settings_stay() -> None:
    assert "MALLOC_ARENA_MAX" in set_allocator({"MALLOC_ARENA_MAX": "2"})
    assert "LD_PRELOAD" in set_allocator({"LD_PRELOAD": "libjemalloc.so"})


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError(name)

    monkeypatch.setattr("os.confstr", unknown)
    assert set_allocator({}) == "untouched: not glibc"
    monkeypatch.setattr("sys.platform", "darwin")
    assert set_allocator({}) == "untouched: not glibc"


@pytest.mark.skipif(not is_linux, reason="of Linux")
def test_prepare_machine() -> None:
    # In a process of its own: the settings stay until it ends.
    code = (
        "import torch\nfrom tunesmith.model.device import find_device, prepare_machine\n"
        "settings = prepare_machine(find_device())\n"
        "assert prepare_machine(find_device()) is settings\n"
        "assert torch.get_num_threads() == settings.threads == 2, settings\n"
        "assert torch.get_num_interop_threads() == settings.interop_threads == 1\n"
        "print(settings.allocator)\n"
        "tiny = torch.full((64,), 1e-39)\n"
        "assert not settings.flushes_denormals or float((tiny * 1.0).sum()) == 0.0\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "M_" in done.stdout or "untouched" in done.stdout


def test_the_device_is_described() -> None:
    device = find_device()
    assert device.memory_bytes > 1 << 28
    assert device.name
    assert device.measure_flops() > 1e8
    assert find_compiler(Device("mps", "", 0, has_fast_bf16=False)) is None


def test_the_peak_of_a_phase() -> None:
    with suppress(AttributeError):  # else what earlier tests left free would serve
        ctypes.CDLL(None).malloc_trim(0)
    peak = PeakMemory(CPU)
    started = used_memory_bytes(CPU)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.bytes >= started + (60 << 20)
    del block
    if not peak.begin_phase():
        pytest.skip("this system cannot forget a peak")
    whole = peak.bytes
    assert peak.phase_bytes < whole
    second = torch.ones(32 << 20, dtype=torch.uint8)
    assert peak.phase_bytes >= used_memory_bytes(CPU) - (1 << 20)
    assert peak.bytes >= whole
    assert peak_memory_bytes(CPU) == peak.phase_bytes
    assert second.sum() > 0


def test_the_heap_is_trimmed_above_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([92, 94, 95, 97, 92, 96])
    monkeypatch.setattr(module, "used_memory_bytes", lambda _: next(used))
    monkeypatch.setattr(module, "_has_glibc", lambda: True)
    trims: list[int] = []
    library = SimpleNamespace(malloc_trim=trims.append)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: library)
    trimmer = HeapTrimmer(CPU, 100)
    expected = [False, True, False, True, False, True]  # never twice in a row
    assert [trimmer.after_step() for _ in expected] == expected
    assert trims == [0, 0, 0]


def test_other_heaps_are_not_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not HeapTrimmer(Device("cuda", "", 0, has_fast_bf16=True), 0).after_step()
    monkeypatch.setattr(module, "_has_glibc", lambda: False)
    assert not HeapTrimmer(CPU, 0).after_step()


def test_a_peak_that_cannot_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_forget_peak", lambda _: False)
    peak = PeakMemory(CPU)
    assert peak.begin_phase() is False
    assert peak.bytes == peak.phase_bytes


def test_prepare_machine_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: bool(calls.append(1)) or True)
    monkeypatch.setattr(module, "set_allocator", lambda _: "none")
    fake = Device("cuda", "a fake one", 0, has_fast_bf16=True)
    assert prepare_machine(fake).allocator == "untouched"
    assert prepare_machine(fake) is prepare_machine(fake)
    assert len(calls) == 1
