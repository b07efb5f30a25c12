"""DPO on the CPU: tunesmith and TRL's DPOTrainer on the same pairs, side by side.

    python benchmarks/preference.py --data alpaca_en_demo.json --trl peers/trl/bin/python

TRL's environment is made by `train_cpu.py --make-peers`. The pairs are made of a file of Alpaca
rows: a prompt is an earlier turn, another row cut short, and the row's own question; the chosen
answer is the row's, the rejected one a third row's. Rows are of middle length, so that prompts are
about half of a sequence's tokens. `--pairs` takes a file of pairs instead.

The sides are tunesmith as `tunesmith train` runs, the same with `reference: cached`, DPOTrainer as
it comes, and DPOTrainer at its best: without gradient checkpointing, the fastest of some sizes and
kinds of weights, each tried on a few steps, and that with its reference precomputed. Its
padding-free mode is switched off in TRL 1.16 (it warns and pads).

The work is equal, and checked: the same token ids in the same order, the same weights, first
adapter, learning rate, clipping and beta; LoRA of rank 8 on all linear layers; the first loss is
ln 2 within bfloat16's rounding; the loss of the first batch falls; and the mean losses over the
last half of a side's steps agree within 5 %. The exit status is 1 if not.

Each side runs in a process of its own; the sides take turns, round after round, and the medians of
all steps but each run's first are compared: of wall time, and of the process's CPU time, which says
more on a machine that others use too. Loading is not timed; the passes over the data before
training, of `cached` and of TRL's precomputing, stand in a column of their own. For tunesmith the
time to make a batch counts.

Not covered: accelerators, validation, other losses than DPO's, prompts that several pairs share.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from textwrap import shorten
from typing import Any

from peers.preference_sides import DpoSettings, measure_trl, measure_tunesmith
from peers.train_work import Shared, Work, read_json, write_json

WARMUP_STEPS = 1
"""Dropped of each run: it allocates, and oneDNN picks its kernels in it."""

LOSS_TOLERANCE = 0.05

FIRST_LOSS_TOLERANCE = 0.02
"""A pair's log-probabilities of some hundred nats, rounded to eight bits, times beta."""

CHILDREN = {"tunesmith": measure_tunesmith, "trl": measure_trl}

ANSWER_CHARACTERS = (400, 800)

EARLIER_CHARACTERS = 250
"""Of the answer in the earlier turn."""

BEST = (
    DpoSettings(pairs_per_forward=2),
    DpoSettings(pairs_per_forward=1),
    DpoSettings(),
    DpoSettings(pairs_per_forward=2, has_autocast=False),
    DpoSettings(pairs_per_forward=2, weights="float32"),
)
"""What is tried; the first one is taken untried."""


@dataclass(frozen=True)
class Side:
    """One row of the table: who trains, and how."""

    name: str
    child: str
    python: str
    settings: Any
    max_steps: int | None = None
    """Fewer steps than the others have, for one that is slow."""


def main() -> int:
    """Makes the pairs, runs the rounds, and prints a table and a JSON line of everything."""
    options = parse_options()
    if options.child:
        write_json(options.folder / "result.json", CHILDREN[options.child](options.folder))
        return 0
    with tempfile.TemporaryDirectory(prefix="preference.") as name:
        folder = Path(name)
        work = work_of(options, folder)
        write_json(folder / "work.json", asdict(work))
        found, tried = compare(folder, work, options)
        problems = difficulties(found)
        print_table(found)
        print(about_pairs(Shared.read(folder)))
    for problem in problems:
        print(f"PROBLEM: {problem}")
    report = {"work": asdict(work), "sides": found, "tried": tried, "problems": problems}
    print(json.dumps(report))
    return 1 if problems else 0


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="Alpaca rows to make pairs of")
    parser.add_argument("--pairs", type=Path, help="pairs: prompt, chosen, rejected")
    parser.add_argument("--trl", help="python of an environment that has trl")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; alpha is twice as much")
    parser.add_argument("--steps", type=int, default=6, help="of each run")
    parser.add_argument("--default-steps", type=int, default=3, help="of TRL's slow defaults")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--global-batch", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tune-steps", type=int, default=2, help="steps of each try")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child and (options.data is None) == (options.pairs is None):
        parser.error("one of --data and --pairs")
    return options


def work_of(options: argparse.Namespace, folder: Path) -> Work:
    """What all sides do."""
    path = options.pairs
    if path is None:
        path, count = folder / "pairs.jsonl", options.steps * options.global_batch
        rows = json.loads(options.data.read_text(encoding="utf-8"))
        lines = [json.dumps(pair) + "\n" for pair in make_pairs(rows, count, options.seed)]
        path.write_text("".join(lines), encoding="utf-8")
    return Work(
        data=str(path.resolve()),
        model=options.model,
        method="lora",
        rank=options.rank,
        steps=options.steps,
        global_batch=options.global_batch,
        max_length=2048,
        learning_rate=options.learning_rate,
        seed=options.seed,
        threads=options.threads,
    )


def make_pairs(rows: Sequence[dict[str, str]], count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of Alpaca rows whose answers are of middle length; prompts have an earlier turn.

    Raises:
        ValueError: the rows are too few.
    """
    low, high = ANSWER_CHARACTERS
    fitting = [row for row in rows if low <= len(row["output"]) <= high]
    if len(fitting) < max(3, count):
        raise ValueError(f"{len(fitting)} rows with answers of {low} to {high} characters: too few")
    random.Random(seed).shuffle(fitting)
    pairs: list[dict[str, Any]] = []
    for number, row in enumerate(fitting[:count]):
        earlier, other = fitting[number - 1], fitting[number - 2]
        told = shorten(earlier["output"], EARLIER_CHARACTERS, placeholder=" ...")
        turns = (question(earlier), told, question(row))
        roles = ("user", "assistant", "user")
        prompt = [{"role": r, "content": text} for r, text in zip(roles, turns, strict=True)]
        pairs.append({"prompt": prompt, "chosen": row["output"], "rejected": other["output"]})
    return pairs


def question(row: dict[str, str]) -> str:
    """What an Alpaca row asks."""
    return f"{row['instruction']}\n{row.get('input', '')}".strip()


# Runs


def compare(
    folder: Path, work: Work, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, float | str]]:
    """All sides' figures, and what was tried for TRL's best."""
    own = [
        Side("tunesmith", "tunesmith", sys.executable, True),
        Side("tunesmith, cached", "tunesmith", sys.executable, "cached"),
    ]
    # The first run also leaves the pairs for the peer in the folder.
    runs = {own[0]: [run_side(own[0], folder, work)]}
    tried: dict[str, float | str] = {}
    sides = own[1:]
    if options.trl:
        default = DpoSettings(is_default=True)
        best = tune(options, folder, work, tried)
        sides += [
            Side("TRL, default", "trl", options.trl, default, options.default_steps),
            Side("TRL, best", "trl", options.trl, best),
            Side("TRL, precomputed", "trl", options.trl, replace(best, precomputes=True)),
        ]
    for turn in range(options.rounds):
        for side in [*own[: turn > 0], *sides]:
            runs.setdefault(side, []).append(run_side(side, folder, work))
    sides_found = {side.name: figures(each, work) for side, each in runs.items()}
    return {
        name: with_ratios(each, sides_found["tunesmith"], sides_found["tunesmith, cached"])
        for name, each in sides_found.items()
    }, tried


def tune(
    options: argparse.Namespace, folder: Path, work: Work, tried: dict[str, float | str]
) -> DpoSettings:
    """The settings that take the least CPU time; writes down the seconds of a step of each."""
    if not options.tune:
        return BEST[0]
    seconds: dict[DpoSettings, float] = {}
    for settings in BEST:
        side = Side("TRL, best", "trl", options.trl, settings, options.tune_steps)
        try:
            seconds[settings] = min(run_side(side, folder, work)["cpu_seconds"])
        except RuntimeError as error:  # a version without it: the others still count
            tried[settings.label] = str(error).splitlines()[-1]
        else:
            tried[settings.label] = seconds[settings]
        print(f"  tried {settings.label}: {tried[settings.label]}", file=sys.stderr, flush=True)
    return min(seconds, key=lambda each: seconds[each])


def run_side(side: Side, folder: Path, work: Work) -> dict[str, Any]:
    """One side in a process of its own, its cache in the folder.

    Raises:
        RuntimeError: it failed; the text ends with the end of its output.
    """
    settings = asdict(side.settings) if isinstance(side.settings, DpoSettings) else side.settings
    steps = min(work.steps, side.max_steps or work.steps)
    write_json(folder / "side.json", {"settings": settings, "steps": steps})
    print(f"running {side.name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(work.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": cache,
        }
        if side.settings == "cached":  # a pass that is found on disk would be free
            environment["TUNESMITH_CACHE"] = cache
        command = [side.python, str(Path(__file__).resolve()), "--child", side.child]
        command += ["--folder", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side.name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = read_json(folder / "result.json")
    times = zip(found["seconds"], found["cpu_seconds"], strict=True)
    steps = ", ".join(f"{wall:.1f} ({cpu:.1f} CPU)" for wall, cpu in times)
    print(f"  steps of {steps} s", file=sys.stderr, flush=True)
    return found


# Figures


def figures(runs: Sequence[dict[str, Any]], work: Work) -> dict[str, Any]:
    """The runs of one side as one: the median of their steps, the largest memory."""
    timed, on_cpu = (
        median(seconds for run in runs for seconds in run[key][WARMUP_STEPS:])
        for key in ("seconds", "cpu_seconds")
    )
    return {
        **runs[0],
        "seconds": [run["seconds"] for run in runs],
        "pairs_per_second": work.global_batch / timed,
        "pairs_per_cpu_second": work.global_batch / on_cpu,
        "pass_seconds": median(run["pass_seconds"] for run in runs),
        "peak_mebibytes": max(run["peak_bytes"] for run in runs) >> 20,
    }


def with_ratios(
    side: dict[str, Any], own: dict[str, Any], cached: dict[str, Any]
) -> dict[str, Any]:
    """A side's figures, and how tunesmith compares with them over the steps that both have."""
    steps = len(side["losses"])
    late = slice(steps // 2, steps)  # a shorter run's last half, and the same steps of ours
    ours, theirs = fmean(own["losses"][late]), fmean(side["losses"][late])
    return {
        **side,
        "times": own["pairs_per_second"] / side["pairs_per_second"],
        "times_cached": cached["pairs_per_second"] / side["pairs_per_second"],
        "times_cpu": own["pairs_per_cpu_second"] / side["pairs_per_cpu_second"],
        "loss_first": side["losses"][0],
        "loss_late": theirs,
        "loss_difference": abs(theirs / ours - 1),
    }


def difficulties(found: dict[str, dict[str, Any]]) -> list[str]:
    """What shows that the work was not equal, or not work."""
    problems: list[str] = []
    for name, side in found.items():
        if abs(side["loss_first"] - math.log(2)) > FIRST_LOSS_TOLERANCE:
            problems.append(f"the first loss of {name} is {side['loss_first']:.4f}, not ln 2")
        if side["loss_again"] >= side["loss_first"]:
            problems.append(f"the loss of {name} does not fall")
        if not all(0 < norm < math.inf for norm in side["gradient_norms"]):
            problems.append(f"a gradient of {name} is 0 or not finite")
        if side["loss_difference"] > LOSS_TOLERANCE:
            problems.append(f"the loss of {name} differs by {side['loss_difference']:.2%}")
    return problems


COLUMNS = (
    ("pairs/s", "pairs_per_second", ".2f"),
    ("tunesmith, times", "times", ".2f"),
    ("cached, times", "times_cached", ".2f"),
    ("by CPU time", "times_cpu", ".2f"),
    ("pass before, s", "pass_seconds", ".1f"),
    ("peak MiB", "peak_mebibytes", ","),
    ("first loss", "loss_first", ".4f"),
    ("loss, last 1/2", "loss_late", ".4f"),
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
        versions = ", ".join(f"{package} {text}" for package, text in side["versions"].items())
        print(f"{name}: {side['label']} ({versions})", flush=True)


def about_pairs(shared: Shared) -> str:
    """Sizes of the pairs in one line."""
    pairs = [pair for batch in shared.batches for pair in batch]
    prompts = sum(2 * len(pair["prompt_ids"]) for pair in pairs)
    answers = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    mean = (prompts + answers) / (2 * len(pairs))
    share = prompts / (prompts + answers)
    return f"{len(pairs)} pairs, {mean:.0f} tokens a sequence, {share:.0%} of them its prompt"


if __name__ == "__main__":
    sys.exit(main())
