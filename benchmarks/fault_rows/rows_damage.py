"""Rows 16 to 24: checkpoints that are half-written, damaged, or do not fit on the disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from fault_rows.bench import FAIL, HALF, LATER, PASS, Bench, Verdict, reason, shorten, together
from fault_rows.spec import Fault

SAVED_AT = 12
"""The save that is disturbed: the third one."""

FULL = ("No space left", "File too large", "disk", "space")


def killed_in_a_save(bench: Bench) -> Verdict:
    """Row 16."""
    oracle = bench.oracle()
    found: dict[str, Verdict] = {}
    for place, fault in _places_in_a_save(bench, oracle).items():
        folder = bench.fresh()
        outcome = bench.run(folder, bench.spec(fault=fault))
        if outcome.code is None or outcome.code >= 0:
            return Verdict(LATER, f"the kill {place} did not strike: {outcome.end}")
        found[place] = bench.judge_resume(folder, oracle, bench.resume(folder))
    return _of_places(found)


def _places_in_a_save(bench: Bench, oracle: Path) -> dict[str, Fault]:
    """Where it is killed: between files, and inside of one."""
    if bench.is_own:
        points = bench.hits(oracle)
        saves = [at for at, point in enumerate(points) if point.startswith("save.")]
        chosen = {saves[len(saves) * part // 8] for part in range(1, 8)} | {saves[-1]}
        return {
            f"at {points[at]} {points[: at + 1].count(points[at])}": Fault(
                "planted", text=f"{points[at]}:{points[: at + 1].count(points[at])}:kill"
            )
            for at in sorted(chosen)
        }
    checkpoint = bench.tool.checkpoints(oracle)[-1]
    total = len(list(checkpoint.iterdir()))
    sizes = [(checkpoint / name).stat().st_size for name in _files(bench)]
    counts = sorted({1, 2, total // 3, total // 2, 2 * total // 3, total - 1, total})
    places = {f"with {n} of {total} files": Fault("kill_file", SAVED_AT, n) for n in counts}
    for name, size in zip(_files(bench), sizes, strict=True):
        places[f"inside {name}"] = Fault("kill_bytes", SAVED_AT, size - 100)
    return places


def _files(bench: Bench) -> tuple[str, str]:
    return bench.tool.weights_name, bench.tool.optimizer_name


def _of_places(found: dict[str, Verdict]) -> Verdict:
    bad = {place: verdict for place, verdict in found.items() if verdict.score != PASS}
    if not bad:
        return Verdict(PASS, f"{len(found)} places ({', '.join(found)}): all equal after resume")
    place, verdict = next(iter(bad.items()))
    score = FAIL if len(bad) > len(found) / 2 else HALF
    text = (
        f"{len(bad)} of {len(found)} places cannot go on exactly, first {place}: {verdict.evidence}"
    )
    return Verdict(score, text)


def empty_newer_directory(bench: Bench) -> Verdict:
    """Row 17."""
    folder = bench.broken()
    bench.tool.empty_newer(folder).mkdir()
    return bench.judge_resume(folder, bench.oracle(), bench.resume(folder))


def newest_truncated(bench: Bench) -> Verdict:
    """Row 18."""
    return together([_damaged(bench, name, _truncate, "cut in half") for name in _files(bench)])


def bit_in_weights(bench: Bench) -> Verdict:
    """Row 19."""
    return _damaged(bench, bench.tool.weights_name, _flip, "one bit")


def bit_in_optimizer(bench: Bench) -> Verdict:
    """Row 20."""
    return _damaged(bench, bench.tool.optimizer_name, _flip, "one bit")


def _damaged(bench: Bench, name: str, damage: Callable[[Path], None], what: str) -> Verdict:
    """Damages a file of the newest checkpoint, and goes on."""
    folder = bench.broken()
    damage(bench.tool.checkpoints(folder)[-1] / name)
    outcome = bench.resume(folder)
    label = f"{what} of {name}"
    if not outcome.is_finished:
        # Stopping is right, but the checkpoint before it was whole.
        score = HALF if damage is _flip else FAIL
        return Verdict(score, f"{label}: {outcome.end}, {reason(outcome)}")
    if difference := bench.difference(folder, bench.oracle()):
        return Verdict(FAIL, f"{label}: loaded silently, final weights differ by {difference:.2g}")
    said = [line.strip() for line in bench.new_lines(outcome) if "checkpoint" in line.lower()]
    says = f"says {shorten(said[0])!r}" if said else "says nothing"
    text = f"{label}: falls back and ends equal to the bit; {says}"
    return Verdict(PASS if said else HALF, text)


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _flip(path: Path) -> None:
    """Turns the highest exponent bit but one of a number in the middle of a file's numbers."""
    content = bytearray(path.read_bytes())
    place = _place_of_numbers(content)
    content[place] ^= 1 << 4
    path.write_bytes(bytes(content))


def _place_of_numbers(content: bytearray) -> int:
    """The last byte of a float32 in the middle of the largest stretch of numbers."""
    if content[:2] == b"PK":  # torch's own format: a zip file, its members not compressed
        import io
        import zipfile

        with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
            largest = max(
                (each for each in archive.infolist() if "/data/" in each.filename),
                key=lambda each: each.file_size,
            )
        names, extra = struct.unpack_from("<HH", content, largest.header_offset + 26)
        start, size = largest.header_offset + 30 + names + extra, largest.file_size
    else:
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        spans = [each["data_offsets"] for name, each in header.items() if name != "__metadata__"]
        first, last = max(spans, key=lambda span: span[1] - span[0])
        start, size = 8 + length + first, last - first
    return start + size // 8 * 4 + 3


def all_bad(bench: Bench) -> Verdict:
    """Row 21."""
    folder = bench.broken()
    paths = bench.tool.checkpoints(folder)
    for path in paths:
        for name in _files(bench):
            _truncate(path / name)
    outcome = bench.resume(folder)
    if outcome.is_finished:
        return Verdict(FAIL, "starts from the beginning silently")
    named = [path.name for path in paths if path.name in outcome.log]
    text = f"{outcome.end}, {len(named)} of {len(paths)} checkpoints named: {reason(outcome)}"
    return Verdict(PASS if len(named) == len(paths) else HALF, text)


def disk_full(bench: Bench) -> Verdict:
    """Row 22."""
    checkpoint = bench.tool.checkpoints(bench.oracle())[-1]
    sizes = {name: (checkpoint / name).stat().st_size for name in _files(bench)}
    return together([_disk_full(bench, name, size - 100) for name, size in sizes.items()])


def _disk_full(bench: Bench, name: str, size: int) -> Verdict:
    folder = bench.fresh()
    step = SAVED_AT - 3 if bench.is_own else SAVED_AT
    outcome = bench.run(folder, bench.spec(fault=Fault("limit_bytes", step, size)))
    if outcome.is_finished:
        return Verdict(LATER, f"{name}: the limit did not strike")
    says = any(word in outcome.log for word in FULL)
    resumed = bench.judge_resume(folder, bench.oracle(), bench.resume(folder))
    first = f"{name} does not fit: {outcome.end}, {reason(outcome)}"
    if resumed.score != PASS:
        return Verdict(FAIL, f"{first}; with space again: {resumed.evidence}")
    return Verdict(PASS if says else HALF, f"{first}; with space again: {resumed.evidence}")


def killed_in_rotation(bench: Bench) -> Verdict:
    """Row 24."""
    fault = Fault("kill_rotate", SAVED_AT + 4)
    if bench.is_own:
        fault = Fault("planted", text="save.rotate:2:kill")
    folder = bench.fresh()
    outcome = bench.run(folder, bench.spec(fault=fault))
    if outcome.code is None or outcome.code >= 0:
        return Verdict(LATER, f"the kill did not strike: {outcome.end}")
    return bench.judge_resume(folder, bench.oracle(), bench.resume(folder))
