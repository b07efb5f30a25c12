"""Tokens per second on the CPU: tunesmith against TRL's SFTTrainer at its best settings.

Both train the same model with the same LoRA on the same token ids in the same order, one after the
other, each in a process of its own. Only real tokens count, never padding; the first steps are
warm-up and are dropped; loading and tokenizing are not timed. The work is checked to be equal: the
loss of the first batch falls in both, and the mean losses over the last half of the steps agree
within 2 %.

    python benchmarks/train_cpu.py --data rows.json --peer-python peer/bin/python

The peer lives in a throw-away environment of its own. Take the same torch as tunesmith's (its
version goes in place of 2.13.0), and on Linux the build for CPUs from torch's own package index:

    python3 -m venv peer
    peer/bin/pip install torch==2.13.0
    peer/bin/pip install trl peft datasets

Without --peer-python tunesmith is measured alone. With --tune every setting in CANDIDATES is tried
on the first few steps, each figure is printed, and the fastest goes into the comparison; without it
the peer runs with BEST, the winner of such a try.

Measure on an idle machine: two threads that wait for each other on a shared one lose ten times the
time that was taken from them. Where that cannot be had, --threads 1 with the tokens per CPU second
is a fair figure, and --repeats takes turns and keeps the fastest time of each step.

Not covered: memory, accelerators, rows that become several training sequences, and token weights
other than 0 and 1 (labels cannot express them).

The exit status is 1 if the losses do not agree or do not fall.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

WARMUP_STEPS = 2
"""Dropped on both sides: they allocate, and oneDNN picks its kernels in them."""

LOSS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Work:
    """What both sides do; a JSON file carries it to the children."""

    data: str
    model: str
    steps: int
    global_batch: int
    max_length: int
    learning_rate: float
    seed: int
    threads: int


@dataclass(frozen=True)
class PeerSettings:
    """How the peer does it; none changes what is computed.

    `head` is fused (SFTTrainer's own: tiles of the vocabulary, every position) or logits (its
    `compute_loss` overridden by the plain Trainer's, as its deprecation notes advise).
    """

    rows_per_forward: int | None = None  # None is the whole global batch
    is_padding_free: bool = True
    attention: str = "sdpa"
    weights: str = "bfloat16"
    has_autocast: bool = True
    head: str = "logits"

    @property
    def label(self) -> str:
        """The settings in one line."""
        rows = "all" if self.rows_per_forward is None else str(self.rows_per_forward)
        batch = "padding-free" if self.is_padding_free else "padded"
        autocast = "bf16 autocast" if self.has_autocast else "no autocast"
        return (
            f"{rows} rows/forward, {batch}, {self.attention}, {self.weights} weights, "
            f"{autocast}, {self.head} head"
        )


BEST = PeerSettings()

CANDIDATES = (
    BEST,
    replace(BEST, rows_per_forward=4),
    replace(BEST, rows_per_forward=2),
    replace(BEST, weights="float32"),
    replace(BEST, has_autocast=False),
    replace(BEST, weights="float32", has_autocast=False),
    replace(BEST, head="fused"),
    replace(BEST, attention="eager"),
    replace(BEST, is_padding_free=False),
    replace(BEST, is_padding_free=False, rows_per_forward=4),
    replace(BEST, is_padding_free=False, rows_per_forward=2),
    replace(BEST, is_padding_free=False, rows_per_forward=1),
    replace(BEST, is_padding_free=False, head="fused"),
)


Row = dict[str, list[int]]
"""One training sequence as a peer takes it: input_ids, and labels with -100 for no loss."""


@dataclass(frozen=True)
class Shared:
    """What tunesmith tells the peer: the rows of each global batch, and the recipe's numbers."""

    model_path: str
    revision: str | None
    dtype: str
    lora: dict[str, Any]
    clip_norm: float | None
    batches: list[list[Row]]


@dataclass(frozen=True)
class Measured:
    """One side's figures, step by step."""

    label: str
    versions: dict[str, str]
    losses: list[float]
    seconds: list[float]
    cpu_seconds: list[float]
    """Of the process: far below wall time x threads, others were busy too."""
    loss_again: float
    """Of the first global batch after all steps: comparing it with itself is free of noise."""


# Parent


def main() -> int:
    """Runs both sides and prints the comparison."""
    options = parse_options()
    if options.child:
        return run_child(options.child, options.folder)
    options.data = str(Path(options.data).resolve())
    work = Work(**{field.name: getattr(options, field.name) for field in fields(Work)})
    with tempfile.TemporaryDirectory(prefix="train_cpu.") as name:
        folder = Path(name)
        write_json(folder / "work.json", asdict(work))
        return compare(folder, work, options)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="rows in any format that tunesmith reads")
    parser.add_argument("--peer-python", help="python of an environment that has trl")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--global-batch", type=int, default=8, help="rows per optimizer step")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens; the rest is cut off")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, in turn")
    parser.add_argument("--tune", action="store_true", help="try all of the peer's settings first")
    parser.add_argument("--tune-steps", type=int, default=5, help="steps of each try")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child and not options.data:
        parser.error("--data is required")
    if not options.child and min(options.steps, options.tune_steps) < WARMUP_STEPS + 2:
        parser.error(f"at least {WARMUP_STEPS + 2} steps: {WARMUP_STEPS} of them are warm-up")
    return options


def compare(folder: Path, work: Work, options: argparse.Namespace) -> int:
    """Measures, prints, and returns the exit status."""
    load = os.getloadavg()[0]
    # This also leaves the rows for the peer in the folder.
    ours = [run_process(sys.executable, "tunesmith", folder, work.threads)]
    shared = read_shared(folder)
    theirs: list[Measured] = []
    tried: dict[str, float | None] = {}
    if options.peer_python:
        peer_work = asdict(work)
        settings = with_dtype(BEST, shared.dtype)
        if options.tune:
            settings, tried = tune(folder, peer_work, options, shared)
        theirs.append(run_peer(folder, peer_work, options.peer_python, settings))
        for _ in range(options.repeats - 1):
            ours.append(run_process(sys.executable, "tunesmith", folder, work.threads))
            theirs.append(run_peer(folder, peer_work, options.peer_python, settings))
    sides = {"tunesmith": fastest(ours)} | ({"TRL": fastest(theirs)} if theirs else {})
    report: dict[str, Any] = {"work": asdict(work), "load_before": load, "tried": tried}
    report |= {name: figures(side, shared) for name, side in sides.items()}
    problems = print_comparison(sides, shared, report)
    print(json.dumps(report))
    for problem in problems:
        print(f"NOT EQUAL WORK: {problem}", file=sys.stderr)
    return 1 if problems else 0


def run_peer(folder: Path, work: dict[str, Any], python: str, settings: PeerSettings) -> Measured:
    """Measures the peer on the rows that tunesmith left."""
    write_json(folder / "peer.json", {"work": work, "settings": asdict(settings)})
    return run_process(python, "peer", folder, work["threads"])


def run_process(python: str, child: str, folder: Path, threads: int) -> Measured:
    """One child, alone; its output is shown only if it fails."""
    print(f"running {child} ...", file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [python, str(Path(__file__).resolve()), "--child", child, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{child} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return Measured(**read_json(folder / f"{child}.result.json"))


def tune(
    folder: Path, work: dict[str, Any], options: argparse.Namespace, shared: Shared
) -> tuple[PeerSettings, dict[str, float | None]]:
    """Tries every candidate on a few steps; returns the fastest and all figures."""
    short = {**work, "steps": min(work["steps"], options.tune_steps)}
    speeds: dict[PeerSettings, float | None] = {}
    print(f"{'tokens/s':>9}{'/CPU s':>9}  TRL's settings, {short['steps']} steps each", flush=True)
    fitting = [
        each for each in CANDIDATES if work["global_batch"] % (each.rows_per_forward or 1) == 0
    ]
    for candidate in dict.fromkeys(with_dtype(each, shared.dtype) for each in fitting):
        try:
            measured = run_peer(folder, short, options.peer_python, candidate)
        except RuntimeError as error:  # a version without it: the others still count
            print(f"{'failed':>18}  {candidate.label}: {str(error).splitlines()[-1]}", flush=True)
            speeds[candidate] = None
            continue
        found = figures(measured, shared)
        speeds[candidate] = found["tokens_per_second"]
        print(
            f"{found['tokens_per_second']:9.1f}{found['tokens_per_cpu_second']:9.1f}  "
            f"{candidate.label}",
            flush=True,
        )
    winner = max(speeds, key=lambda candidate: speeds[candidate] or 0.0)
    return winner, {candidate.label: speed for candidate, speed in speeds.items()}


def with_dtype(settings: PeerSettings, dtype: str) -> PeerSettings:
    """The settings on a machine without fast bfloat16: all float32, as tunesmith does there."""
    if dtype == "bfloat16":
        return settings
    return replace(settings, weights="float32", has_autocast=False)


# Figures


def fastest(runs: Sequence[Measured]) -> Measured:
    """The runs of one side as one, with each step's fastest time."""
    seconds = [min(times) for times in zip(*(run.seconds for run in runs), strict=True)]
    cpu_seconds = [min(times) for times in zip(*(run.cpu_seconds for run in runs), strict=True)]
    return replace(runs[0], seconds=seconds, cpu_seconds=cpu_seconds)


def figures(side: Measured, shared: Shared) -> dict[str, Any]:
    """Everything about one side; only real tokens, and no warm-up in the rates."""
    batches = shared.batches[WARMUP_STEPS : len(side.seconds)]
    tokens = sum(len(row["input_ids"]) for batch in batches for row in batch)
    supervised = sum(label != -100 for batch in batches for row in batch for label in row["labels"])
    seconds = sum(side.seconds[WARMUP_STEPS:])
    return {
        **asdict(side),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "seconds_total": seconds,
        "tokens_per_second": tokens / seconds,
        "supervised_per_second": supervised / seconds,
        "tokens_per_cpu_second": tokens / sum(side.cpu_seconds[WARMUP_STEPS:]),
        "loss_last_half": fmean(side.losses[len(side.losses) // 2 :]),
    }


def print_comparison(
    sides: dict[str, Measured], shared: Shared, report: dict[str, Any]
) -> list[str]:
    """The table; returns what shows that the work was not equal, and adds to the report."""
    columns = (
        ("tokens/s", "tokens_per_second", ".1f"),
        ("supervised/s", "supervised_per_second", ".1f"),
        ("tokens", "tokens", ","),
        ("supervised", "supervised_tokens", ","),
        ("seconds", "seconds_total", ".2f"),
        ("tokens/CPU s", "tokens_per_cpu_second", ".1f"),
        ("loss, last 1/2", "loss_last_half", ".4f"),
    )
    print(" " * 10 + "".join(f"{title:>16}" for title, _, _ in columns))
    for name in sides:
        cells = (format(report[name][key], form) for _, key, form in columns)
        print(f"{name:10}" + "".join(f"{cell:>16}" for cell in cells))
    for name, side in sides.items():
        versions = ", ".join(f"{package} {version}" for package, version in side.versions.items())
        print(f"{name}: {side.label} ({versions})")
        print(f"  loss of the first batch: {side.losses[0]:.4f}, after: {side.loss_again:.4f}")
    problems = [
        f"the loss of {name} does not fall"
        for name, side in sides.items()
        if side.loss_again >= side.losses[0]
    ]
    if "TRL" not in sides:
        print("tunesmith alone: no --peer-python was given")
        return problems
    return problems + print_agreement(sides, report)


def print_agreement(sides: dict[str, Measured], report: dict[str, Any]) -> list[str]:
    """Ratio and agreement of the losses; returns the disagreement if there is one."""
    ours, theirs = report["tunesmith"], report["TRL"]
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    difference = abs(ours["loss_last_half"] / theirs["loss_last_half"] - 1)
    pairs = zip(sides["tunesmith"].losses, sides["TRL"].losses, strict=True)
    largest = max(abs(a / b - 1) for a, b in pairs)
    report |= {"ratio": ratio, "loss_difference": difference, "largest_step_difference": largest}
    per_cpu = ours["tokens_per_cpu_second"] / theirs["tokens_per_cpu_second"]
    report["ratio_per_cpu_second"] = per_cpu
    print(f"tunesmith / TRL: {ratio:.2f} x (by CPU time {per_cpu:.2f} x)")
    print(
        f"losses over the last half differ by {difference:.3%} (at most {LOSS_TOLERANCE:.0%}); "
        f"the largest difference of a step is {largest:.3%}"
    )
    if difference <= LOSS_TOLERANCE:
        return []
    return [f"losses over the last half differ by {difference:.2%}"]


# Children


def run_child(child: str, folder: Path) -> int:
    """The body of a child process."""
    import torch

    measured = CHILDREN[child](folder)
    versions = {"torch": torch.__version__, **measured.versions}
    write_json(folder / f"{child}.result.json", asdict(replace(measured, versions=versions)))
    return 0


def measure_tunesmith(folder: Path) -> Measured:
    """Trains with tunesmith's own loop, batches included in the time."""
    import torch
    import transformers

    from tunesmith.engine.events import EventLog
    from tunesmith.engine.loop import train_step
    from tunesmith.engine.rundir import RunDirectory
    from tunesmith.engine.signals import StopSignal
    from tunesmith.job import prepare
    from tunesmith.train import build
    from tunesmith.types import SilentReporter

    work = Work(**read_json(folder / "work.json"))
    torch.set_num_threads(work.threads)
    job = prepare(load_work(work, folder), SilentReporter())
    share(folder, work, job)
    losses: list[float] = []
    clock = StepClock()
    with EventLog(folder / "events.jsonl") as events, StopSignal() as stop:
        run = build(job, RunDirectory(folder), events, stop, SilentReporter())
        for step in (*range(work.steps), 0):
            clock.start()
            loss, _ = train_step(run, run.loader.batch(step), step)
            clock.stop()
            losses.append(loss)
    recipe = job.resolved.recipe
    label = (
        f"{recipe.model.dtype}, micro-batches of {recipe.train.micro_batch_tokens} tokens, "
        f"{work.threads} threads"
    )
    versions = {"transformers": transformers.__version__}
    return clock.measured(label, versions, losses)


def load_work(work: Work, folder: Path) -> Any:
    """The recipe; all that could differ between the sides is set, the rest is tunesmith's own."""
    from tunesmith.config.load import LoadedRecipe, recipe_from

    recipe = recipe_from(
        {
            "model": work.model,
            "data": {"train": [work.data], "validation": 0, "max_length": work.max_length},
            "train": {
                # Enough epochs for any number of rows; max_steps ends the run.
                "epochs": work.steps,
                "max_steps": work.steps,
                "global_batch": work.global_batch,
                "learning_rate": work.learning_rate,
                # Constant: the peer's warm-up starts at 0 and ours at 1/n.
                "schedule": "constant",
                "warmup": 0,
                "seed": work.seed,
            },
            "output": str(folder / "run"),
        }
    )
    return LoadedRecipe(recipe, "train_cpu", folder)


def share(folder: Path, work: Work, job: Any) -> None:
    """Writes down rows and numbers for the peer."""
    recipe = job.resolved.recipe
    lora = recipe.method
    shared = Shared(
        model_path=job.source.path,
        revision=job.source.revision,
        dtype=recipe.model.dtype,
        lora={"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": lora.target},
        clip_norm=recipe.train.clip_norm,
        batches=[rows_of_step(job.loader, step) for step in range(work.steps)],
    )
    write_json(folder / "shared.json", asdict(shared))


def rows_of_step(loader: Any, step: int) -> list[Row]:
    """The rows of one global batch, longest first: the least padding where a peer splits it."""
    rows: list[Row] = []
    for sample in loader.batch(step).sample_ids:
        for index in loader.store.sequences_of(sample):
            sequence = loader.store.sequence(index, (0, loader.max_length))
            ids = [int(token) for token in sequence.ids]
            labels = [-100] * len(ids)
            for first, count, weight in sequence.runs:
                if weight != 1.0:
                    raise ValueError(f"labels cannot express a weight of {weight}")
                labels[first : first + count] = ids[first : first + count]
            rows.append({"input_ids": ids, "labels": labels})
    if len(rows) != loader.global_batch:
        raise ValueError(
            f"step {step} has {len(rows)} rows instead of {loader.global_batch}: "
            "the data has too few rows, or rows that become several sequences"
        )
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


def measure_peer(folder: Path) -> Measured:
    """Trains with SFTTrainer on the rows that tunesmith wrote down."""
    import peft
    import torch
    import transformers
    import trl

    spec = read_json(folder / "peer.json")
    work, settings = Work(**spec["work"]), PeerSettings(**spec["settings"])
    torch.set_num_threads(work.threads)
    clock, losses = StepClock(), []
    trainer = build_peer(folder, work, settings, losses)
    trainer.add_callback(clock_callback(clock))
    trainer.train()
    size = settings.rows_per_forward or work.global_batch
    per_step = work.global_batch // size
    sums = [sum(losses[at : at + per_step]) for at in range(0, len(losses), per_step)]
    modules = {"transformers": transformers, "peft": peft, "trl": trl}
    versions = {name: module.__version__ for name, module in modules.items()}
    label = f"{settings.label}, {work.threads} threads"
    return clock.measured(label, versions, sums)


def build_peer(folder: Path, work: Work, settings: PeerSettings, losses: list[float]) -> Any:
    """SFTTrainer with the shared numbers; `losses` gets one for every forward."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
    from trl import SFTTrainer

    class Peer(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            if settings.head == "fused":
                return super().compute_loss(model, inputs, **kwargs)
            inputs["use_cache"] = False
            return Trainer.compute_loss(self, model, inputs, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            # Already divided by the supervised tokens of the whole global batch.
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    shared = read_shared(folder)
    place = {"pretrained_model_name_or_path": shared.model_path}
    place |= {"revision": shared.revision} if shared.revision else {}
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=settings.weights, attn_implementation=settings.attention
    )
    batches = [*shared.batches[: work.steps], shared.batches[0]]
    return Peer(
        model=model,
        args=peer_arguments(folder, work, settings, shared),
        train_dataset=Dataset.from_list([row for batch in batches for row in batch]),
        processing_class=AutoTokenizer.from_pretrained(**place),
        peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **shared.lora),
    )


def peer_arguments(folder: Path, work: Work, settings: PeerSettings, shared: Shared) -> Any:
    """The peer's arguments: tunesmith's numbers, and everything off that costs time."""
    from trl import SFTConfig

    size = settings.rows_per_forward or work.global_batch
    return SFTConfig(
        output_dir=str(folder / "peer"),
        max_steps=work.steps + 1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=work.global_batch // size,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=shared.clip_norm or 0.0,
        optim="adamw_torch_fused",
        seed=work.seed,
        use_cpu=True,
        bf16=settings.has_autocast,
        padding_free=settings.is_padding_free,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )


def clock_callback(clock: StepClock) -> Any:
    """Times optimizer steps; what is before one (collating its rows) is not counted."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.stop()

    return Callback()


class StepClock:
    """Wall and CPU time of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._started = (0.0, 0.0)

    def start(self) -> None:
        self._started = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        wall, cpu = self._started
        self.steps.append((time.perf_counter() - wall, time.process_time() - cpu))

    def measured(self, label: str, versions: dict[str, str], losses: list[float]) -> Measured:
        """All figures; the last step was the first batch once more, and is not timed."""
        seconds, cpu_seconds = (list(times) for times in zip(*self.steps[:-1], strict=True))
        return Measured(label, versions, losses[:-1], seconds, cpu_seconds, losses[-1])


# Files


def read_shared(folder: Path) -> Shared:
    """What `share` wrote."""
    return Shared(**read_json(folder / "shared.json"))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


CHILDREN = {"tunesmith": measure_tunesmith, "peer": measure_peer}

if __name__ == "__main__":
    sys.exit(main())
