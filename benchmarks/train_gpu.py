"""Training on a GPU: tunesmith, plain transformers with PEFT, and TRL with Liger, side by side.

    python benchmarks/train_gpu.py --trl peer/bin/python

Models have the true shapes of Qwen2.5-0.5B, Llama-3.2-3B and Llama-3.1-8B, made in code, and random
weights (peers/train_gpu_model.py): nothing is downloaded. Methods are LoRA of rank 16 on all linear
layers, QLoRA (nf4) and, for 0.5B and 3B, full tuning. Every row has --row-tokens tokens, so a pack
of that size holds one row and no side has padding; half of a row is supervised. All sides train on
the same rows with the same first adapter, in bfloat16 (full tuning with fp32 weights and bf16
autocast), one after the other, each in a process of its own.

Printed: tokens per second, MFU against the fastest matrix product found in the same run (formula:
peers/train_flops.py), peak memory of tensors, the loss, and the milliseconds of forward, backward
and optimizer from steps of their own. `--profile FOLDER` writes a trace of two steps of tunesmith
and a table of its slowest operations. TRL lives in an environment of its own (`pip install
torch==2.13.0 trl peft datasets liger-kernel`); without --trl it is left out. QLoRA needs
bitsandbytes on every side.

The exit status is 1 if a gradient is 0, a loss does not fall, or the losses of two sides differ by
more than 2 % over the last half of the steps; a side that fails (out of memory, a missing package)
is named and left out. `--device cpu --tiny` runs everything on a CPU with a tiny shape, as a test;
without CUDA and without it, the script says so and ends with 0.

Not covered: several GPUs, rows of different lengths (train_cpu.py), and the parts of TRL's steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from peers import train_flops, train_gpu_model, train_gpu_sides
from peers.train_flops import Shape
from peers.train_gpu_sides import PARTS, GpuWork
from peers.train_work import Measured, Shared, Work, read_json, write_json, write_result

WARMUP_STEPS = 3

LOSS_TOLERANCE = 0.02

LEARNING_RATES = {"lora": 1e-4, "qlora": 1e-4, "full": 1e-5}

SIDES = {"tunesmith": "tunesmith", "transformers + PEFT": "plain", "TRL + Liger": "trl"}


@dataclass(frozen=True)
class Combination:
    """One table."""

    shape: str
    method: str


def main() -> int:
    """Runs all combinations and prints a table of each, and a JSON line of everything."""
    options = parse_options()
    if options.child:
        return run_child(options)
    if options.device == "cuda" and not has_cuda():
        print("skipped: no CUDA device (--device cpu --tiny tries the script without one)")
        return 0
    report: dict[str, Any] = {"combinations": []}
    with tempfile.TemporaryDirectory(prefix="train_gpu.", dir=options.scratch) as name:
        folder = Path(name)
        for shape in options.shape:
            run_process(sys.executable, "model", folder, options, ["--shape", shape])
            report.setdefault("peak", find_peak(folder, options))
            for combination in combinations(shape, options.method):
                report["combinations"].append(compare(folder, combination, options, report))
    print(json.dumps(report))
    return 1 if any(each["problems"] for each in report["combinations"]) else 0


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = list(train_gpu_model.SHAPES)
    parser.add_argument("--shape", nargs="+", choices=[*shapes, "tiny"], default=shapes)
    parser.add_argument(
        "--method", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES)
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and short rows")
    parser.add_argument("--trl", help="python of an environment that has trl and liger-kernel")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2, help="rows per forward and per step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="of the peers")
    parser.add_argument("--profile", type=Path, help="folder for tunesmith's traces")
    parser.add_argument("--scratch", type=Path, help="where the models' folders are made")
    parser.add_argument(
        "--child", choices=["model", "peak", *SIDES.values()], help=argparse.SUPPRESS
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.row_tokens, options.steps = ["tiny"], 64, WARMUP_STEPS + 2
    if options.steps < WARMUP_STEPS + 2:
        parser.error(f"at least {WARMUP_STEPS + 2} steps: {WARMUP_STEPS} of them are warm-up")
    return options


def has_cuda() -> bool:
    """Whether torch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def sizes_of(shape: str) -> dict[str, Any]:
    """The shape's configuration."""
    return train_gpu_model.TINY if shape == "tiny" else train_gpu_model.SHAPES[shape]


def combinations(shape: str, methods: list[str]) -> list[Combination]:
    """What fits on one GPU: 8B is not tuned in full."""
    return [Combination(shape, each) for each in methods if (shape, each) != ("8b", "full")]


def compare(
    folder: Path, combination: Combination, options: argparse.Namespace, report: dict[str, Any]
) -> dict[str, Any]:
    """Measures all sides of one combination and prints it."""
    work, gpu = works(folder, combination, options)
    write_json(folder / "work.json", asdict(work))
    write_json(folder / "gpu.json", asdict(gpu))
    rate = max(peak["flops_per_second"] for peak in report["peak"])
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for name, child in SIDES.items():
        python = options.trl if child == "trl" else sys.executable
        if not python or (failed and "tunesmith" in failed):
            continue
        try:
            result = run_process(python, child, folder, options)
        except RuntimeError as error:
            failed[name] = str(error)
            continue
        parts = read_json(folder / "parts.json")
        found[name] = figures(Measured(**result), Shared.read(folder), combination, rate, parts)
    problems = difficulties(found)
    print_table(combination, found, failed, problems)
    return {**asdict(combination), "sides": found, "failed": failed, "problems": problems}


def works(
    folder: Path, combination: Combination, options: argparse.Namespace
) -> tuple[Work, GpuWork]:
    """What all sides do."""
    work = Work(
        data=str(folder / "rows.jsonl"),
        model=str(folder / "model"),
        method="full" if combination.method == "full" else "lora",
        rank=options.rank,
        steps=options.steps,
        global_batch=options.rows,
        max_length=options.row_tokens,
        learning_rate=LEARNING_RATES[combination.method],
        seed=options.seed,
        threads=len(os.sched_getaffinity(0)),
    )
    profile = options.profile
    if profile:
        profile = str(profile.resolve() / f"{combination.shape}-{combination.method}")
    return work, GpuWork(options.device, combination.method, options.checkpointing, profile)


def run_process(
    python: str,
    child: str,
    folder: Path,
    options: argparse.Namespace,
    extra: list[str] | None = None,
) -> dict[str, Any]:
    """A child, alone; its output is shown only if it fails.

    Raises:
        RuntimeError: it failed; the text ends with the end of its output.
    """
    print(f"running {child} ...", file=sys.stderr, flush=True)
    command = [python, str(Path(__file__).resolve()), "--child", child, "--folder", str(folder)]
    for key in ("device", "row_tokens", "rows", "steps", "seed"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["TUNESMITH_CACHE"] = str(folder / "cache")
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command += extra or []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{child} ended with {done.returncode}:\n{done.stderr[-3000:].strip()}")
    return read_json(folder / "result.json")


def run_child(options: argparse.Namespace) -> int:
    """The body of a child."""
    folder: Path = options.folder
    if options.child == "model":
        # One epoch of rows, so that no step sees a row again.
        count = options.rows * (options.steps + 1)
        train_gpu_model.write_rows(folder / "rows.jsonl", count, options.row_tokens, options.seed)
        sizes = sizes_of(options.shape[0])
        train_gpu_model.make_model(folder / "model", sizes, options.device, options.seed)
        write_json(folder / "result.json", {})
    elif options.child == "peak":
        write_json(folder / "result.json", {"peaks": peaks(folder, options)})
    else:
        write_result(folder, train_gpu_sides.SIDES[options.child](folder))
    return 0


# Peak


def find_peak(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The GPU's fastest matrix products, measured in the same run."""
    found = run_process(sys.executable, "peak", folder, options)["peaks"]
    for peak in found:
        rate = peak["flops_per_second"] / 1e12
        print(f"peak {peak['dtype']}: {rate:,.1f} TFLOP/s ({peak['product']})", flush=True)
    return found


def peaks(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The body of that child; on a GPU large squares are needed to fill it."""
    shape = Shape.of(read_json(folder / "model/config.json"))
    sizes = train_flops.product_sizes(shape, (options.row_tokens * options.rows,))
    if options.device == "cuda":
        sizes += [(side, side, side) for side in (8192, 16384)]
    else:
        sizes = [size for size in sizes if max(size) <= 1024]
    found = train_flops.measure_peak("bfloat16", sizes, device=options.device)
    return [asdict(found)]


# Figures


def figures(
    side: Measured,
    shared: Shared,
    combination: Combination,
    peak: float,
    parts: dict[str, float],
) -> dict[str, Any]:
    """Everything about one side, without the warm-up."""
    shape = Shape.of(sizes_of(combination.shape))
    batches = shared.batches[WARMUP_STEPS : len(side.seconds)]
    lengths = [[len(row["input_ids"]) for row in batch] for batch in batches]
    timed = side.seconds[WARMUP_STEPS:]
    tokens, seconds = sum(map(sum, lengths)), sum(timed)
    flops = sum(shape.step_flops(combination.method, each) for each in lengths)
    return {
        **asdict(side),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "step_milliseconds": 1e3 * median(timed),
        "mfu": flops / seconds / peak,
        "peak_gibibytes": side.peak_bytes / 2**30,
        "loss_last_half": fmean(side.losses[len(side.losses) // 2 :]),
        **{f"{part}_milliseconds": 1e3 * seconds for part, seconds in parts.items()},
    }


def difficulties(found: dict[str, dict[str, Any]]) -> list[str]:
    """What shows that the work was not equal, or not work."""
    problems: list[str] = []
    for name, side in found.items():
        if side["loss_again"] >= side["losses"][0]:
            problems.append(f"the loss of {name} does not fall")
        if not all(0 < norm < float("inf") for norm in side["gradient_norms"]):
            problems.append(f"a gradient of {name} is 0 or not finite")
        difference = abs(side["loss_last_half"] / found["tunesmith"]["loss_last_half"] - 1)
        if difference > LOSS_TOLERANCE:
            problems.append(f"the loss of {name} differs by {difference:.2%}")
    return problems


COLUMNS = (
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("MFU", "mfu", ".1%"),
    ("peak GiB", "peak_gibibytes", ".2f"),
    ("ms a step", "step_milliseconds", ".1f"),
    *((f"{part} ms", f"{part}_milliseconds", ".1f") for part in PARTS),
    ("loss, last 1/2", "loss_last_half", ".4f"),
)


def print_table(
    combination: Combination,
    found: dict[str, dict[str, Any]],
    failed: dict[str, str],
    problems: list[str],
) -> None:
    """A Markdown table, and what went wrong."""
    print(f"\n{combination.shape}, {combination.method}")
    print("| side | " + " | ".join(title for title, _, _ in COLUMNS) + " | times |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name, side in found.items():
        cells = [format(side[key], form) if key in side else "" for _, key, form in COLUMNS]
        times = found["tunesmith"]["tokens_per_second"] / side["tokens_per_second"]
        print(f"| {name} | " + " | ".join(cells) + f" | {times:.2f} |")
    for name, side in found.items():
        versions = ", ".join(
            f"{package} {version}" for package, version in side["versions"].items()
        )
        print(f"{name}: {side['label']} ({versions})")
    for name, text in failed.items():
        print(f"{name} failed: {text}")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
