"""How fast data becomes tokens: tunesmith, LLaMA-Factory and TRL on the same rows, side by side.

    python benchmarks/data.py --rows 100000 --tokenizer qwen3/ \
        --llamafactory lf/bin/python --trl trl/bin/python

The rows are made from LLaMA-Factory's demo data (benchmarks/data_rows.py): conversations of one to
five turns, no two messages alike. Each tool reads the file and does all that comes before training:
rendering, tokens, loss mask, its own cache on disk. tunesmith builds a token store from an empty
cache. The tools take turns, `--rounds` times; the best round of each counts, for whatever else runs
on the machine only slows. Memory is the proportional set size of all processes of a tool, every
0.1 s, less what its imports took.

The work is the same: all rows are kept, and the supervised tokens must be equal in number but for
the line break behind an answer, which the peers learn, too. By Qwen3's own template tunesmith's
sequences have more tokens in all, because it changes earlier turns when later ones follow, and each
answer stands behind the prompt that inference builds; `--template` takes another one for tunesmith,
such as TRL's for training, by which a conversation is one sequence as it is for the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass
class Figures:
    """One run of one tool."""

    rows_per_second: float
    seconds: float
    cpu_seconds: float
    supervised_tokens: int
    tokens: int
    peak_mebibytes: int
    grown_mebibytes: int
    versions: dict[str, str]


def main() -> None:
    """Runs all tools in turns and prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, default=FOLDER / "../../shared/tokenizers/qwen3")
    parser.add_argument("--demo", type=Path, default=FOLDER / "../../shared/data/llamafactory-demo")
    parser.add_argument("--llamafactory", help="python of an environment that has llamafactory")
    parser.add_argument("--trl", help="python of an environment that has trl")
    parser.add_argument("--processes", type=int, default=2, help="of the peers")
    parser.add_argument(
        "--template", help="Jinja file for tunesmith; by default the tokenizer's own"
    )
    parser.add_argument("--own", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.own:
        own(options.own, options.tokenizer, options.template)
        return
    with tempfile.TemporaryDirectory(prefix="data_rows.") as name:
        compare(options, Path(name))


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Makes the rows and lets the tools take turns."""
    messages, sharegpt = folder / "messages.jsonl", folder / "sharegpt.jsonl"
    rows = ["--rows", str(options.rows), "--messages", messages, "--sharegpt", sharegpt]
    subprocess.run(
        [sys.executable, FOLDER / "data_rows.py", *rows, "--demo", options.demo], check=True
    )
    peer = ["--tokenizer", options.tokenizer, "--processes", str(options.processes)]
    commands: dict[str, list[Any]] = {
        "tunesmith": [sys.executable, __file__, "--own", messages, *peer[:2]],
    }
    if options.llamafactory:
        script = FOLDER / "peers/llamafactory_data.py"
        commands["LLaMA-Factory"] = [options.llamafactory, script, "--data", sharegpt, *peer]
    if options.trl:
        commands["TRL"] = [options.trl, FOLDER / "peers/trl_data.py", "--data", messages, *peer]
    if options.template:
        commands["tunesmith"] += ["--template", options.template]
    found: dict[str, list[Figures]] = {tool: [] for tool in commands}
    for number in range(options.rounds):
        for tool, command in commands.items():
            figures = measure([str(part) for part in command], options.rows)
            found[tool].append(figures)
            print(f"round {number + 1}: {tool} {figures.rows_per_second:,.0f} rows/s", flush=True)
    with messages.open(encoding="utf-8") as file:
        report(found, sum(line.count('"role": "assistant"') for line in file))


def report(found: dict[str, list[Figures]], num_answers: int) -> None:
    """Checks that the work was equal and prints the best round of each."""
    supervised = {tool: runs[0].supervised_tokens for tool, runs in found.items()}
    # The peers also learn the line break behind each answer's end token.
    extra = {tool: tokens - supervised["tunesmith"] for tool, tokens in supervised.items()}
    assert all(more in (0, num_answers) for more in extra.values()), f"not equal work: {supervised}"
    best = {tool: max(runs, key=lambda run: run.rows_per_second) for tool, runs in found.items()}
    own_speed = best["tunesmith"].rows_per_second
    print("| tool | rows/s | times | CPU s | peak MiB | grown by MiB | all rounds |")
    print("|---|---|---|---|---|---|---|")
    for tool, figures in best.items():
        rounds = ", ".join(f"{run.rows_per_second:,.0f}" for run in found[tool])
        print(
            f"| {tool} | {figures.rows_per_second:,.0f} "
            f"| {own_speed / figures.rows_per_second:.2f} | {figures.cpu_seconds:.0f} "
            f"| {figures.peak_mebibytes:,} | {figures.grown_mebibytes:,} | {rounds} |"
        )
    print(json.dumps({tool: figures.__dict__ for tool, figures in best.items()}))


def own(data: Path, tokenizer_folder: Path, template: str | None) -> None:
    """tunesmith's run, in a process of its own, from an empty cache."""
    from transformers import AutoTokenizer

    import tunesmith
    from tunesmith.config.recipe import DataConfig
    from tunesmith.data.build import open_store
    from tunesmith.data.sources import find_sources
    from tunesmith.data.store import StoreInputs
    from tunesmith.data.templates import build_renderer
    from tunesmith.types import SilentReporter

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    with tempfile.TemporaryDirectory(prefix="store.") as cache:
        started, clock, cpu = time.time(), time.perf_counter(), os.times()
        config = DataConfig.model_validate(
            {"train": [{"path": str(data)}], "template": template or "auto"}
        )
        renderer, _ = build_renderer(tokenizer, config)
        sources = find_sources(config, Path, SilentReporter())
        store = open_store(
            StoreInputs(sources.train, renderer, folder=Path(cache)), SilentReporter()
        )
        seconds, after = time.perf_counter() - clock, os.times()
        result = {
            "rows": store.num_samples,
            "rows_kept": store.num_samples,
            "tokens": int(store.lengths().sum()),
            "supervised_tokens": int(store.supervised_of_samples().sum()),
            "seconds": seconds,
            "cpu_seconds": after.user + after.system - cpu.user - cpu.system,
            "started": started,
            "versions": {"tunesmith": tunesmith.__version__},
        }
    print(json.dumps(result), flush=True)


def measure(command: list[str], rows: int) -> Figures:
    """Runs a tool and watches the memory of its processes."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    samples: list[tuple[float, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            samples.append((time.time(), tree_bytes(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    result = json.loads(out.strip().splitlines()[-1])
    assert result["rows_kept"] == rows, f"{result['rows_kept']} of {rows} rows are left"
    start, stop = result["started"], result["started"] + result["seconds"]
    before = [size for at, size in samples if at < start][-1]
    peak = max(size for at, size in samples if start <= at <= stop)
    return Figures(
        rows_per_second=rows / result["seconds"],
        seconds=result["seconds"],
        cpu_seconds=result["cpu_seconds"],
        supervised_tokens=result["supervised_tokens"],
        tokens=result["tokens"],
        peak_mebibytes=peak >> 20,
        grown_mebibytes=(peak - before) >> 20,
        versions=result["versions"],
    )


def tree_bytes(pid: int) -> int:
    """Proportional set size of a process and all below it."""
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        try:
            lines = Path(f"/proc/{current}/smaps_rollup").read_text().splitlines()
            tasks = Path(f"/proc/{current}/task").iterdir()
            children = [c for t in tasks for c in (t / "children").read_text().split()]
        except OSError:
            continue  # it is gone
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        waiting += map(int, children)
    return total


if __name__ == "__main__":
    main()
