"""What a run leaves beside its checkpoints: answers before and after, hard rows, model, plots."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from tunesmith.config.heads import ClassifyConfig, RewardConfig
from tunesmith.config.method import AdapterConfig
from tunesmith.config.objective import PretrainConfig
from tunesmith.data.loader import Loader
from tunesmith.engine.events import read_events
from tunesmith.engine.sample_losses import read_sample_losses
from tunesmith.engine.session import summarize
from tunesmith.engine.state import TrainState
from tunesmith.engine.step import Meter, Run
from tunesmith.errors import DiskError
from tunesmith.evaluate.forgetting import ForgettingMeter
from tunesmith.evaluate.plots import plot_loss
from tunesmith.evaluate.report import write_report
from tunesmith.export.result import write_result
from tunesmith.infer.chat_model import stop_ids
from tunesmith.infer.sample import Drawing, sample_answers
from tunesmith.io.atomic import write_atomic
from tunesmith.io.redact import redact_tree
from tunesmith.job import Job
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.rollout.prompts import Prompt, prompts_of
from tunesmith.types import Json

SAMPLE_TOKENS = 128
"""Longest of the answers that a run shows: enough to see what has changed."""

HARD_ROWS = 40
"""So many rows of training with the highest losses are listed."""

FORGETTING = "forgetting.safetensors"


@contextmanager
def with_report(folder: Path) -> Generator[None]:
    """Writes the report of a run at its end, whatever ends it.

    Where it cannot be written the run has ended all the same; `tunesmith report` makes it anew.
    """
    try:
        yield
    finally:
        with suppress(DiskError):
            write_report(folder)


def open_meter(run: Run, job: Job) -> Meter | None:
    """What shows how much of general questions a run forgets; None if the recipe wants none."""
    if not job.general:
        return None
    file = _folder(run) / FORGETTING
    return ForgettingMeter(run.model, job.general, file, run.plain_autocast, run.is_stopped)


def answer_samples(run: Run, job: Job, state: TrainState) -> None:
    """Answers a few held-out rows, before the first step or after the last one.

    They stand in `samples/answers.jsonl`; without enough memory they are left out, with a word.
    """
    prompts = _prompts_to_show(run, job)
    if not prompts:
        return
    ends = tuple({*stop_ids(run.model, job.tokenizer), *job.end_ids})
    drawing = Drawing(ends, SAMPLE_TOKENS, temperature=0.0)
    unused = torch.zeros(len(prompts), 1, SAMPLE_TOKENS)
    try:
        with run.plain_autocast():
            ids = [prompt.ids for prompt in prompts]
            answers = sample_answers(run.model, ids, unused, drawing, run.is_stopped)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = "no memory for answers to held-out rows: they are left out"
        run.events.emit("warning", state.step, {"message": message})
        return
    rows: list[dict[str, Json]] = []
    for prompt, drawn in zip(prompts, answers or (), strict=False):
        text = job.tokenizer.decode(list(drawn[0].ids), skip_special_tokens=True)
        row = _shown(run.validation or run.loader, prompt)
        row |= {"step": state.step, "answer": str(text), "is_complete": drawn[0].is_complete}
        rows.append(row)
    _keep_answers(_folder(run) / "samples" / "answers.jsonl", rows)


def _prompts_to_show(run: Run, job: Job) -> list[Prompt]:
    """The first held-out rows whose answers fit; none where the model answers nothing."""
    recipe, count = run.recipe, run.recipe.evaluate.samples
    gives_none = isinstance(recipe.objective, PretrainConfig | RewardConfig | ClassifyConfig)
    # PEFT's forward with a cache puts virtual tokens before every token again (0.21).
    is_virtual = isinstance(recipe.method, AdapterConfig) and recipe.method.is_prompt
    if run.validation is None or not count or gives_none or is_virtual:
        return []
    prompts = prompts_of(run.validation, job.split.validation[:count].tolist(), job.tokenizer)
    room = job.facts.context_tokens - SAMPLE_TOKENS
    return [prompt for prompt in prompts if 0 < len(prompt.ids) <= room]


def _keep_answers(file: Path, rows: list[dict[str, Json]]) -> None:
    """Puts answers after those of step 0; a start that was broken off left others."""
    is_first = bool(rows) and rows[0]["step"] == 0
    if file.exists() and not is_first:
        kept = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        rows = [*(row for row in kept if row["step"] == 0), *rows]
    file.parent.mkdir(exist_ok=True)
    lines = (json.dumps(redact_tree(row), ensure_ascii=False) for row in rows)
    write_atomic(file, "".join(f"{line}\n" for line in lines))


def finish(run: Run, job: Job, state: TrainState, memory: dict[str, int]) -> dict[str, Json]:
    """Export: the best weights into `model/`, answers, hard rows, the plot; gives the summary."""
    if state.best_step is not None and state.best_step != state.step:
        run.checkpoints.load_best(
            state.best_step, lambda text: run.events.emit("warning", state.step, {"message": text})
        )
    answer_samples(run, job, state)
    summary = summarize(run, state, memory)
    folder, base = _folder(run), job.source.label
    label = Path(run.recipe.output).name
    write_result(run.model, job.tokenizer, folder / "model", label=label, base=base, facts=summary)
    _list_hard_rows(run, job, folder / "samples")
    plot_loss(list(read_events(folder / "events.jsonl")), folder / "loss.png", label)
    return summary


def _list_hard_rows(run: Run, job: Job, folder: Path) -> None:
    """The rows whose losses were highest in the last epoch: often those with wrong labels."""
    # An earlier start may have had other data (--allow-changes).
    losses = read_sample_losses(folder, lambda sample: sample < run.loader.store.num_samples)
    if not losses:
        return
    if max(map(max, losses.values())) < 1:
        return  # seen once: what is high is only new
    last = {sample: of_epoch[max(of_epoch)] for sample, of_epoch in losses.items()}
    hardest = sorted(last, key=lambda sample: -last[sample])[:HARD_ROWS]
    rows: list[Json] = []
    for prompt in prompts_of(run.loader, hardest, job.tokenizer):
        of_epoch = losses[prompt.sample]
        epochs: list[Json] = [of_epoch.get(epoch) for epoch in range(max(of_epoch) + 1)]
        rows.append({**_shown(run.loader, prompt), "epochs": epochs})
    tree = redact_tree({"rows": rows, "samples": len(losses)})
    write_atomic(folder / "losses.json", json.dumps(tree, ensure_ascii=False, indent=1))


def _shown(loader: Loader, prompt: Prompt) -> dict[str, Json]:
    """A row for people."""
    return {
        "origin": str(loader.origins([prompt.sample])[0]),
        "prompt": prompt.text,
        "label": prompt.reference,
        "prompt_tokens": len(prompt.ids),
    }


def _folder(run: Run) -> Path:
    return run.checkpoints.folder.parent
