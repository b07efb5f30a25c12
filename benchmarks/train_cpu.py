"""Training on the CPU: tunesmith, LLaMA-Factory and TRL on the same rows, side by side.

    python benchmarks/train_cpu.py --make-peers peers/

That makes the peers' environments and compares on all data (a: GrammarGPT's instruction.json, b:
alpaca_en_demo.json, c: drone_training.jsonl) with LoRA of rank 8 on all linear layers and with full
tuning. Environments that exist are named by --trl and --llamafactory; a peer without one is left
out. `--data a --method lora` takes one part, `--steps 4 --no-tune` is a quick try.

The sides are tunesmith as `tunesmith train` runs; LLaMA-Factory as its examples set it up (batch 1,
accumulation 8, gradient checkpointing, bf16); LLaMA-Factory at its best (no checkpointing, larger
batches or packs, bf16 or fp32); TRL's SFTTrainer as it comes; and TRL at its best. "At its best" is
the fastest of a list of settings (`candidates` in peers/), each tried on a few steps; --no-tune
takes the first of the list.

The work is equal, and checked: the same token ids in the same order on the same weights and, for
LoRA, the same first adapter; supervised tokens equal; the gradient's norm above 0 in every step;
the loss of the first batch falls; and the mean losses over the last half of the steps agree within
2 %. The exit status is 1 if not. Each side runs in a process of its own, alone, with the same
number of threads. Loading and tokenizing are not timed, nor are the first steps. For tunesmith the
time to make a batch counts, for the peers it does not.

Only real tokens count, never padding; shared prefixes count as if they were computed. MFU is the
share of the fastest matrix product found in the same run, bf16 or fp32, by the formula in
peers/train_flops.py, for all sides alike. Memory is the largest resident size during the steps, and
what of it is above the level before the first step, where weights and data are loaded.

Measure on an idle machine: two threads that wait for each other on a shared one lose ten times the
time that was taken from them. --repeats takes turns and keeps the fastest time of each step.

Not covered: accelerators (train_gpu.py), the start of a run (startup.py), rows that become several
training sequences, token weights other than 0 and 1, and validation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from peers import train_environments, train_flops, train_llamafactory, train_trl, train_tunesmith
from peers.train_flops import Peak, Shape
from peers.train_work import (
    IGNORED_LABEL,
    Measured,
    Shared,
    Work,
    read_json,
    write_json,
    write_result,
)

FOLDER = Path(__file__).parent

WARMUP_STEPS = 2
"""Dropped on all sides: they allocate, and oneDNN picks its kernels in them."""

LOSS_TOLERANCE = 0.02

DATA = {
    "a": ("grammargpt/instruction.json", 132),
    "b": ("llamafactory-demo/alpaca_en_demo.json", 124),
    "c": ("openai-cookbook/drone_training.jsonl", 12),
}
"""Files, and the steps of 8 rows in one epoch: the last, smaller step of an epoch is not wanted."""

LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}

CHILDREN = {
    "tunesmith": train_tunesmith.measure,
    "trl": train_trl.measure,
    "llamafactory": train_llamafactory.measure,
}


@dataclass(frozen=True)
class Side:
    """One row of the table: who trains, and how."""

    name: str
    child: str
    python: str
    settings: Any = None
    """None for tunesmith, which has none."""


def main() -> int:
    """Runs all comparisons; prints a table of each, and a JSON line of everything."""
    options = parse_options()
    if options.child == "peak":
        return run_peak(options.folder)
    if options.child:
        write_result(options.folder, CHILDREN[options.child](options.folder))
        return 0
    if options.make_peers:
        folder = options.make_peers.resolve()
        options.trl = options.trl or str(train_environments.make_trl(folder / "trl"))
        made = train_environments.make_llamafactory
        options.llamafactory = options.llamafactory or str(made(folder / "llamafactory"))
    report: dict[str, Any] = {"load_before": os.getloadavg()[0], "comparisons": []}
    for data in options.data:
        for method in options.method:
            with tempfile.TemporaryDirectory(prefix="train_cpu.") as name:
                found = compare(Path(name), work_of(options, data, method), options, report)
            report["comparisons"].append(found)
    print(json.dumps(report))
    problems = [problem for each in report["comparisons"] for problem in each["problems"]]
    return 1 if problems else 0


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=list(DATA), help="a, b, c, or a path")
    parser.add_argument("--data-folder", type=Path, default=FOLDER / "../../shared/data")
    parser.add_argument(
        "--method", nargs="+", choices=list(LEARNING_RATES), default=["lora", "full"]
    )
    parser.add_argument("--trl", help="python of an environment that has trl")
    parser.add_argument("--llamafactory", help="python of an environment that has llamafactory")
    parser.add_argument("--make-peers", type=Path, help="folder for both environments")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; alpha is twice as much")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--global-batch", type=int, default=8, help="rows per optimizer step")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens; the rest is cut off")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, in turn")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tune-steps", type=int, default=4, help="steps of each try")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.steps, options.tune_steps) < WARMUP_STEPS + 2:
        parser.error(f"at least {WARMUP_STEPS + 2} steps: {WARMUP_STEPS} of them are warm-up")
    return options


def work_of(options: argparse.Namespace, data: str, method: str) -> Work:
    """What all sides do."""
    path, steps = Path(data), options.steps
    if data in DATA:
        path = options.data_folder / DATA[data][0]
        steps = min(steps, DATA[data][1] * 8 // options.global_batch)
    return Work(
        data=str(path.resolve()),
        model=options.model,
        method=method,
        rank=options.rank,
        steps=steps,
        global_batch=options.global_batch,
        max_length=options.max_length,
        learning_rate=options.learning_rate or LEARNING_RATES[method],
        seed=options.seed,
        threads=options.threads,
    )


def compare(
    folder: Path, work: Work, options: argparse.Namespace, report: dict[str, Any]
) -> dict[str, Any]:
    """Measures all sides of one comparison and prints it."""
    print(f"\n{Path(work.data).name}, {work.method}, {work.steps} steps", flush=True)
    write_json(folder / "work.json", asdict(work))
    own = Side("tunesmith", "tunesmith", sys.executable)
    # The first run also leaves the rows for the peers in the folder.
    runs: dict[Side, list[Measured]] = {own: [run_side(own, folder, work, work.steps)]}
    shared = Shared.read(folder)
    shape = Shape.of(read_json(Path(shared.model_path) / "config.json"))
    if "peak" not in report:
        report["peak"] = find_peak(folder, work, shared)
    tried: dict[str, float | str] = {}
    sides = peers(folder, work, options, shared, tried)
    failed: dict[str, str] = {}
    for turn in range(options.repeats):
        for side in [own] * (turn > 0) + [each for each in sides if each.name not in failed]:
            try:
                measured = run_side(side, folder, work, work.steps)
            except RuntimeError as error:  # the other sides still count
                failed[side.name] = str(error)
                print(f"{side.name} failed: {error}", file=sys.stderr, flush=True)
            else:
                runs.setdefault(side, []).append(measured)
    rate = max(peak["flops_per_second"] for peak in report["peak"])
    found = {
        side.name: figures(fastest(measured), work, shared, shape, rate)
        for side, measured in runs.items()
    }
    found = {name: with_ratio(each, found["tunesmith"]) for name, each in found.items()}
    problems = [*difficulties(found), *(f"{name} failed" for name in failed)]
    print_table(found)
    for problem in problems:
        print(f"PROBLEM: {problem}", flush=True)
    parts = {"sides": found, "tried": tried, "failed": failed, "problems": problems}
    return {"work": asdict(work), **parts}


def peers(
    folder: Path,
    work: Work,
    options: argparse.Namespace,
    shared: Shared,
    tried: dict[str, float | str],
) -> list[Side]:
    """The peers' sides, with their best settings looked for."""
    sides: list[Side] = []
    if options.llamafactory:
        python, module = options.llamafactory, train_llamafactory
        sides.append(Side("LLaMA-Factory, examples", "llamafactory", python, module.SEEDS))
        settings = module.candidates(shared.dtype, work.global_batch)
        best = [Side("LLaMA-Factory, best", "llamafactory", python, each) for each in settings]
        sides.append(tune(best, folder, work, options, tried))
    if options.trl:
        python, module = options.trl, train_trl
        sides.append(Side("TRL, default", "trl", python, module.DEFAULT))
        settings = module.candidates(work.method, shared.dtype, work.global_batch)
        best = [Side("TRL, best", "trl", python, each) for each in settings]
        sides.append(tune(best, folder, work, options, tried))
    return sides


def tune(
    tries: list[Side],
    folder: Path,
    work: Work,
    options: argparse.Namespace,
    tried: dict[str, float | str],
) -> Side:
    """The fastest of some settings; writes down what each of them gave."""
    if not options.tune:
        return tries[0]
    shared, steps = Shared.read(folder), min(work.steps, options.tune_steps)
    tokens = sum(
        len(row["input_ids"]) for batch in shared.batches[WARMUP_STEPS:steps] for row in batch
    )
    speeds: dict[Side, float] = {}
    for side in tries:
        name = f"{side.name}: {side.settings.label}"
        try:
            measured = run_side(side, folder, work, steps)
        except RuntimeError as error:  # a version without it: the others still count
            tried[name] = str(error).splitlines()[-1]
        else:
            tried[name] = speeds[side] = tokens / sum(measured.seconds[WARMUP_STEPS:])
        print(f"  tried {name}: {tried[name]}", file=sys.stderr, flush=True)
    return max(speeds, key=lambda side: speeds[side]) if speeds else tries[0]


def run_side(side: Side, folder: Path, work: Work, steps: int) -> Measured:
    """One side in a process of its own.

    Raises:
        RuntimeError: it failed; the text ends with the end of its output.
    """
    if side.settings is not None:
        write_json(folder / "peer.json", {"settings": asdict(side.settings), "steps": steps})
    result = run_process(side.python, side.child, folder, work.threads)
    return Measured(**result)


def run_process(python: str, child: str, folder: Path, threads: int) -> dict[str, Any]:
    """A child, alone; its output is shown only if it fails."""
    print(f"running {child} ...", file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [python, str(Path(__file__).resolve()), "--child", child, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{child} ended with {done.returncode}:\n{done.stderr[-3000:].strip()}")
    return read_json(folder / "result.json")


# Peak


def find_peak(folder: Path, work: Work, shared: Shared) -> list[dict[str, Any]]:
    """The machine's fastest matrix products, measured in the same run."""
    spec = {"model": shared.model_path, "threads": work.threads}
    write_json(folder / "peak.json", spec)
    peaks = run_process(sys.executable, "peak", folder, work.threads)["peaks"]
    for peak in peaks:
        rate = peak["flops_per_second"] / 1e9
        print(f"peak {peak['dtype']}: {rate:,.0f} GFLOP/s ({peak['product']})", flush=True)
    return peaks


def run_peak(folder: Path) -> int:
    """The body of that child."""
    import torch

    spec = read_json(folder / "peak.json")
    torch.set_num_threads(spec["threads"])
    shape = Shape.of(read_json(Path(spec["model"]) / "config.json"))
    sizes = train_flops.product_sizes(shape, (512, 2048))
    peaks: list[Peak] = [train_flops.measure_peak(each, sizes) for each in ("bfloat16", "float32")]
    write_json(folder / "result.json", {"peaks": [asdict(peak) for peak in peaks]})
    return 0


# Figures


def fastest(runs: Sequence[Measured]) -> Measured:
    """The runs of one side as one, with each step's fastest time and the largest memory."""
    return replace(
        runs[0],
        seconds=[min(times) for times in zip(*(run.seconds for run in runs), strict=True)],
        cpu_seconds=[min(times) for times in zip(*(run.cpu_seconds for run in runs), strict=True)],
        peak_bytes=max(run.peak_bytes for run in runs),
    )


def figures(
    side: Measured, work: Work, shared: Shared, shape: Shape, peak: float
) -> dict[str, Any]:
    """Everything about one side; only real tokens, and no warm-up in the rates."""
    batches = shared.batches[WARMUP_STEPS : len(side.seconds)]
    lengths = [[len(row["input_ids"]) for row in batch] for batch in batches]
    supervised = sum(
        label != IGNORED_LABEL for batch in batches for row in batch for label in row["labels"]
    )
    timed = side.seconds[WARMUP_STEPS:]
    tokens, seconds = sum(map(sum, lengths)), sum(timed)
    flops = sum(shape.step_flops(work.method, each) for each in lengths)
    return {
        **asdict(side),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "seconds_total": seconds,
        "seconds_median": median(timed),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_median": median(
            sum(each) / time for each, time in zip(lengths, timed, strict=True)
        ),
        "supervised_per_second": supervised / seconds,
        "tokens_per_cpu_second": tokens / sum(side.cpu_seconds[WARMUP_STEPS:]),
        "peak_mebibytes": side.peak_bytes >> 20,
        "above_level_mebibytes": (side.peak_bytes - side.level_bytes) >> 20,
        "mfu": flops / seconds / peak,
        "loss_last_half": fmean(side.losses[len(side.losses) // 2 :]),
    }


def with_ratio(side: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A side's figures, and how tunesmith compares with them."""
    pairs = list(zip(side["losses"], own["losses"], strict=True))
    return {
        **side,
        "times": own["tokens_per_second"] / side["tokens_per_second"],
        "times_per_cpu_second": own["tokens_per_cpu_second"] / side["tokens_per_cpu_second"],
        "loss_difference": abs(side["loss_last_half"] / own["loss_last_half"] - 1),
        "largest_step_difference": max(abs(theirs / ours - 1) for theirs, ours in pairs),
    }


def difficulties(found: dict[str, dict[str, Any]]) -> list[str]:
    """What shows that the work was not equal, or not work."""
    problems: list[str] = []
    for name, side in found.items():
        if side["loss_again"] >= side["losses"][0]:
            problems.append(f"the loss of {name} does not fall")
        if not all(0 < norm < float("inf") for norm in side["gradient_norms"]):
            problems.append(f"a gradient of {name} is 0 or not finite")
        if side["supervised_extra"]:
            problems.append(f"{name} learns {side['supervised_extra']} tokens more")
        if side["loss_difference"] > LOSS_TOLERANCE:
            problems.append(f"the loss of {name} differs by {side['loss_difference']:.2%}")
    return problems


COLUMNS = (
    ("tokens/s", "tokens_per_second", ".1f"),
    ("median", "tokens_per_second_median", ".1f"),
    ("supervised/s", "supervised_per_second", ".1f"),
    ("tokens/CPU s", "tokens_per_cpu_second", ".1f"),
    ("times", "times", ".2f"),
    ("MFU", "mfu", ".1%"),
    ("peak MiB", "peak_mebibytes", ","),
    ("above level", "above_level_mebibytes", ","),
    ("loss, last 1/2", "loss_last_half", ".4f"),
    ("differs", "loss_difference", ".2%"),
)


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """A Markdown table and a line about each side's settings."""
    print("| side | " + " | ".join(title for title, _, _ in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, side in found.items():
        cells = (format(side[key], form) for _, key, form in COLUMNS)
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, side in found.items():
        versions = ", ".join(
            f"{package} {version}" for package, version in side["versions"].items()
        )
        print(f"{name}: {side['label']} ({versions})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
