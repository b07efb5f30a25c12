"""From the start of the process to the first optimizer step of `tunesmith train`.

    python benchmarks/startup.py

Runs the real command in a process of its own and looks only from outside, at what a run writes:

    start      the process, Python, the command, and what the training imports before it begins
               (until the run directory is made)
    data       recipe, tokenizer, token store (until events.jsonl is made)
    model      weights, adapters, probes of memory, optimizer (until the `start` event)
    first step (until the `step` event)

Imports happen in all of them, because a module is imported where it is needed first. So a second
run with Python's `-X importtime` adds up what all imports up to the first step took by themselves;
it is a little slower than the first, and only that sum is taken from it.

Cold means that the token store has to be built; warm, that it is there. The built-in model has been
converted before in both, and the files are in the system's cache. Of --repeats runs the fastest
counts. Bar: warm at most 12 s, of which imports at most 6 s.

Not covered: the download of a model, a disk that has not been read before, and the validation
before the first step (rows held out: none).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

WARM_BAR_SECONDS = 12.0

IMPORT_BAR_SECONDS = 6.0

PHASES = ("start", "data", "model", "first step")

IMPORT_LINE = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*(\S+)")
"""Of `-X importtime`: microseconds of the module alone, of it and all below, and its name."""

RECIPE = """\
model: {model}
data: {{train: ["{data}"], validation: 0}}
train: {{max_steps: 1, global_batch: 8}}
output: {output}
"""


def main() -> int:
    """Measures and prints; the exit status is 1 above the bar."""
    options = parse_options()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="startup.") as name:
        folder = Path(name)
        once(folder, options)  # converts the model
        for store in ("cold", "warm"):
            runs: list[dict[str, float]] = []
            for _ in range(options.repeats):
                if store == "cold":
                    shutil.rmtree(folder / "cache/stores")
                runs.append(once(folder, options))
            found[store] = min(runs, key=total)
        imports = import_seconds(folder, options)
    print_table(found, imports)
    seconds = {"imports": sum(imports.values()), **{k: total(v) for k, v in found.items()}}
    print(json.dumps({"phases": found, "imports": dict(imports.most_common(20)), **seconds}))
    is_fast = seconds["warm"] <= WARM_BAR_SECONDS and seconds["imports"] <= IMPORT_BAR_SECONDS
    return 0 if is_fast else 1


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = FOLDER / "../../shared/data/grammargpt/instruction.json"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS; by default as it is")
    return parser.parse_args()


def once(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each phase of one run."""
    started = time.time()
    run, _, prepared = train(folder, options, [])
    marks = [
        started,
        (run / ".lock").stat().st_mtime,
        prepared,
        event_time(run, "start"),
        event_time(run, "step"),
    ]
    return phases(marks)


def phases(marks: list[float]) -> dict[str, float]:
    """What passes between one mark and the next."""
    spans = [after - before for before, after in pairwise(marks)]
    return dict(zip(PHASES, spans, strict=True))


def total(spans: dict[str, float]) -> float:
    """Seconds of all phases."""
    return sum(spans.values())


def train(folder: Path, options: argparse.Namespace, flags: list[str]) -> tuple[Path, int, float]:
    """Runs the command to its end in a fresh run directory.

    Returns:
        (run directory, bytes on standard error up to the first step, when the data was ready).
    """
    run, recipe = folder / "run", folder / "recipe.yaml"
    shutil.rmtree(run, ignore_errors=True)
    values = {"model": options.model, "data": options.data.resolve(), "output": run}
    recipe.write_text(RECIPE.format(**values), encoding="utf-8")
    environment = {**os.environ, "TUNESMITH_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPROFILEIMPORTTIME", None)
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    command = [sys.executable, *flags, "-m", "tunesmith", "train", str(recipe)]
    with (folder / "errors").open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
    prepared = 0.0
    while process.poll() is None and not has_stepped(run):
        if not prepared and (run / "events.jsonl").exists():
            prepared = time.time()
        time.sleep(0.01)
    written = (folder / "errors").stat().st_size
    if process.wait():
        raise SystemExit((folder / "errors").read_text(encoding="utf-8")[-3000:])
    return run, written, prepared


def has_stepped(run: Path) -> bool:
    """Whether the first step is over."""
    events = run / "events.jsonl"
    return events.exists() and '"event": "step"' in events.read_text(encoding="utf-8")


def event_time(run: Path, kind: str) -> float:
    """When the first event of that kind was written."""
    with (run / "events.jsonl").open(encoding="utf-8") as file:
        events: list[dict[str, Any]] = [json.loads(line) for line in file]
    return next(event["time"] for event in events if event["event"] == kind)


def import_seconds(folder: Path, options: argparse.Namespace) -> Counter[str]:
    """What the modules of each package took to import up to the first step, in a warm run."""
    _, written, _ = train(folder, options, ["-X", "importtime"])
    lines = (folder / "errors").read_bytes()[:written].decode(errors="replace").splitlines()
    return sum_imports(lines)


def sum_imports(lines: Iterable[str]) -> Counter[str]:
    """Seconds by package, from the lines of `-X importtime`."""
    seconds: Counter[str] = Counter()
    for line in lines:
        if match := IMPORT_LINE.match(line):
            seconds[match[2].partition(".")[0]] += int(match[1]) / 1e6  # pyright: ignore[reportArgumentType]
    return seconds


def print_table(found: dict[str, dict[str, float]], imports: Counter[str]) -> None:
    """Markdown tables of the phases and of the slowest imports."""
    print("| store | " + " | ".join(PHASES) + " | all |")
    print("|---" * (len(PHASES) + 2) + "|")
    for store, spans in found.items():
        cells = [*(spans[phase] for phase in PHASES), total(spans)]
        print(f"| {store} | " + " | ".join(f"{cell:.2f} s" for cell in cells) + " |")
    slowest = ", ".join(f"{name} {seconds:.2f}" for name, seconds in imports.most_common(8))
    print(f"imports in all phases: {sum(imports.values()):.2f} s ({slowest})")
    print(f"bar: warm {WARM_BAR_SECONDS:.0f} s, of which imports {IMPORT_BAR_SECONDS:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
