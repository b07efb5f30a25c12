"""Both sides of the preference benchmark: tunesmith, and TRL's DPOTrainer on the same pairs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers import train_trl
from peers.train_tunesmith import Enough, number
from peers.train_work import Shared, StepClock, Work, clock_callback, read_json, write_json

if TYPE_CHECKING:
    from tunesmith.config.load import LoadedRecipe
    from tunesmith.engine.loop import Run
    from tunesmith.job import Job
    from tunesmith.types import Event

BETA = 0.1


@dataclass(frozen=True)
class DpoSettings:
    """How DPOTrainer does it; none changes what is computed."""

    is_default: bool = False
    """As DPOTrainer comes, with a model's path: nothing below is used."""
    pairs_per_forward: int | None = None
    """None is the whole global batch."""
    weights: str = "bfloat16"
    has_autocast: bool = True
    precomputes: bool = False

    @property
    def label(self) -> str:
        """The settings in one line."""
        if self.is_default:
            return "DPOConfig's defaults (gradient checkpointing, padded, bf16 autocast)"
        pairs = "all" if self.pairs_per_forward is None else str(self.pairs_per_forward)
        autocast = "bf16 autocast" if self.has_autocast else "no autocast"
        reference = "precomputed reference" if self.precomputes else "reference in each step"
        return f"{pairs} pairs/forward, {self.weights} weights, {autocast}, {reference}"


def measure_tunesmith(folder: Path) -> dict[str, Any]:
    """Prepares, writes down the shared pairs, and trains; `side.json` says which reference."""
    import torch

    from tunesmith.job import prepare
    from tunesmith.types import SilentReporter

    work, spec = Work(**read_json(folder / "work.json")), read_json(folder / "side.json")
    torch.set_num_threads(work.threads)
    shutil.rmtree(folder / "run", ignore_errors=True)  # of an earlier round
    job = prepare(recipe_of(work, folder, spec["settings"]), SilentReporter())
    clock, watch = StepClock(spec["steps"]), PassWatch()
    loss_again, stored = train(job, work, folder, clock, watch)
    recipe = job.resolved.recipe
    label = f"{recipe.model.dtype}, micro-batches of {recipe.train.micro_batch_tokens} tokens"
    found = clock.measured(label, ("torch", "transformers", "peft"), loss_again)
    return {**asdict(found), "pass_seconds": watch.seconds, "stored_tokens": stored}


class PassWatch:
    """A silent reporter that times the pass of `reference: cached`."""

    seconds = 0.0

    def track(self, label: str, items: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        started = time.perf_counter()
        yield from items
        if label.startswith("Log-probabilities"):
            self.seconds += time.perf_counter() - started

    def __getattr__(self, name: str) -> Any:
        from tunesmith.types import SilentReporter

        return getattr(SilentReporter(), name)


def train(job: Job, work: Work, folder: Path, clock: StepClock, reporter: Any) -> tuple[float, int]:
    """The run by the parts of `tunesmith.train.train`; a batch's making counts to its step.

    Returns:
        The loss of the first global batch after all steps, and the tokens that it computes.
    """
    from tunesmith.engine.loop import fit
    from tunesmith.engine.rundir import RunDirectory
    from tunesmith.engine.session import open_session
    from tunesmith.engine.signals import StopSignal
    from tunesmith.engine.state import TrainState
    from tunesmith.engine.step import evaluate_loss
    from tunesmith.train import build

    def listen(event: Event) -> None:
        if event.kind == "step":
            clock.stop(wait=False)
            clock.note(number(event.data["loss"]), number(event.data["grad_norm"]))
            if clock.is_done:
                raise Enough
            clock.start()

    run_dir = RunDirectory(folder / "run")
    run_dir.path.mkdir(parents=True, exist_ok=True)
    guard = job.resolved.recipe.guard
    with StopSignal() as stop, open_session(run_dir, stop, guard, [listen]) as session:
        run, job, _ = build(job, session, reporter)
        if not (folder / "shared.json").exists():
            share(folder, work, job, run)
        first = run.loader.batch(0).micro_batches
        clock.start()
        with suppress(Enough):
            fit(run, TrainState(job.fingerprints))
        loss = evaluate_loss(run, first)
    if loss is None:
        raise RuntimeError("stopped by a signal")
    return loss[0], sum(each.num_stored_tokens for each in first)


def recipe_of(work: Work, folder: Path, reference: Any) -> LoadedRecipe:
    """The recipe; the schedule is constant because the peer's warm-up starts at 0, ours at 1/n."""
    from tunesmith.config.load import LoadedRecipe, recipe_from

    recipe = recipe_from(
        {
            "model": work.model,
            "data": {"train": [work.data], "validation": 0, "max_length": work.max_length},
            "method": {"name": "lora", "rank": work.rank, "alpha": 2 * work.rank},
            "objective": {"name": "dpo", "beta": BETA, "reference": reference},
            "train": {
                "epochs": work.steps,
                "max_steps": work.steps,
                "global_batch": work.global_batch,
                "learning_rate": work.learning_rate,
                "schedule": "constant",
                "warmup": 0,
                "seed": work.seed,
            },
            "checkpoint": {"every_steps": work.steps + 1},
            "output": str(folder / "run"),
        }
    )
    return LoadedRecipe(recipe, "preference", folder)


def share(folder: Path, work: Work, job: Job, run: Run) -> None:
    """Writes down pairs, numbers and the untrained adapter for the peer."""
    from tunesmith.model.adapters import save_weights

    recipe, adapter = job.resolved.recipe, folder / "adapter"
    save_weights(run.model, adapter)
    shared = Shared(
        model_path=job.source.path,
        dtype=recipe.model.dtype,
        lora={"r": work.rank, "lora_alpha": 2 * work.rank},
        adapter=str(adapter),
        clip_norm=recipe.train.clip_norm or 0.0,
        batches=[pairs_of_step(run.loader, step) for step in range(work.steps)],
    )
    write_json(folder / "shared.json", asdict(shared))


def pairs_of_step(loader: Any, step: int) -> list[dict[str, Any]]:
    """The pairs of one global batch, longest first: the least padding where a peer splits it."""
    pairs = [
        pair_of(*(loader.store.sequence(index) for index in loader.store.sequences_of(sample)))
        for sample in loader.batch(step).sample_ids
    ]
    return sorted(pairs, key=lambda pair: -sum(map(len, pair.values())))


def pair_of(chosen: Any, rejected: Any) -> dict[str, list[int]]:
    """Token ids of a pair as the peer takes them; what stands behind an answer is left out.

    Raises:
        ValueError: the sides have other prompts, or several answers.
    """
    (start, count, _), (other_start, other_count, _) = chosen.runs[-1], rejected.runs[-1]
    sides = [[int(token) for token in each.ids] for each in (chosen, rejected)]
    is_one = len(chosen.runs) == len(rejected.runs) == 1
    if not is_one or start != other_start or sides[0][:start] != sides[1][:start]:
        raise ValueError("a pair whose sides have other prompts, or several answers")
    return {
        "prompt_ids": sides[0][:start],
        "chosen_ids": sides[0][start : start + count],
        "rejected_ids": sides[1][start : start + other_count],
    }


# TRL


def measure_trl(folder: Path) -> dict[str, Any]:
    """Trains with DPOTrainer."""
    import torch

    work, shared = Work(**read_json(folder / "work.json")), Shared.read(folder)
    spec = read_json(folder / "side.json")
    settings, clock = DpoSettings(**spec["settings"]), StepClock(spec["steps"])
    torch.set_num_threads(work.threads)
    # One step more has the first batch again, unless the run is too short to say anything.
    again = int(clock.num_steps == work.steps)
    trainer = build_trainer(folder, work, shared, settings, clock.num_steps + again)
    trainer.add_callback(clock_callback(clock))
    trainer.train()
    found = clock.measured(settings.label, train_trl.PACKAGES, clock.losses[-1] if again else 0.0)
    return {**asdict(found), "pass_seconds": trainer.pass_seconds, "stored_tokens": 0}


def build_trainer(
    folder: Path, work: Work, shared: Shared, settings: DpoSettings, steps: int
) -> Any:
    """DPOTrainer with the shared pairs, numbers and first adapter."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    class Peer(DPOTrainer):
        pass_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # token ids already

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            self.pass_seconds += time.perf_counter() - started
            return found

    model: Any = shared.model_path
    if not settings.is_default:
        model = AutoModelForCausalLM.from_pretrained(
            shared.model_path, dtype=settings.weights, attn_implementation="sdpa"
        )
    rows = shared.rows(min(steps, work.steps))[: steps * work.global_batch]
    trainer = Peer(
        model=model,
        args=arguments(folder, work, shared, settings, steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(shared.model_path),
        peft_config=train_trl.lora_config(shared),
    )
    train_trl.load_adapter(trainer.model, str(shared.adapter))
    return trainer


def arguments(folder: Path, work: Work, shared: Shared, settings: DpoSettings, steps: int) -> Any:
    """The trainer's arguments: what has to be equal, and then how it is done."""
    from trl import DPOConfig

    default_size = DPOConfig.__dataclass_fields__["per_device_train_batch_size"].default
    size = settings.pairs_per_forward or work.global_batch
    if settings.is_default:
        size = min(default_size, work.global_batch)
    equal_work = {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": work.global_batch // size,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": shared.clip_norm,
        "beta": BETA,
        "seed": work.seed,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if settings.is_default:
        return DPOConfig(**equal_work)
    return DPOConfig(
        **equal_work,
        optim="adamw_torch_fused",
        bf16=settings.has_autocast,
        precompute_ref_log_probs=settings.precomputes,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
