"""What is known of a run before its weights are loaded: `train` goes on from it, `plan` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np

from tunesmith.config.auto import AUTO_KEYS, Facts, Resolved, number, resolve
from tunesmith.config.load import LoadedRecipe, flatten
from tunesmith.config.recipe import Recipe, SourceConfig
from tunesmith.data.build import open_store
from tunesmith.data.check.checker import look_at_start
from tunesmith.data.check.findings import ADVICE
from tunesmith.data.columns import read_samples
from tunesmith.data.loader import Loader
from tunesmith.data.plan import Split, make_split
from tunesmith.data.sources import Source, Sources, find_sources
from tunesmith.data.store import StoreInputs, TokenStore
from tunesmith.data.templates import Renderer, build_renderer
from tunesmith.errors import ModelError
from tunesmith.io.cache import cache_folder
from tunesmith.model.device import Device, find_device
from tunesmith.model.load import (
    ModelSource,
    check_weights_exist,
    find_model,
    fingerprint,
    load_config,
    load_tokenizer,
)
from tunesmith.model.memory import Needs, Sizes, estimate_needs, measure_config
from tunesmith.types import Json, Reporter, Tokenizer


@dataclass(frozen=True)
class Job:
    """Everything known about a run before its weights are loaded."""

    source: ModelSource
    tokenizer: Tokenizer
    template: str
    notes: dict[str, int]
    findings: list[str]
    labels: list[str]
    resolved: Resolved
    split: Split
    sizes: Sizes
    needs: Needs
    device: Device
    loader: Loader
    data_key: str
    num_steps: int


def prepare(loaded: LoadedRecipe, reporter: Reporter, resolved: Recipe | None = None) -> Job:
    """Config -> data: checks model and data, tokenizes, splits, and fills in every `auto`.

    Args:
        loaded: the recipe.
        reporter: shows long work.
        resolved: the values of an earlier start, to go on with exactly these.
    """
    recipe, data = loaded.recipe, loaded.recipe.data
    source = find_model(recipe.model, reporter, loaded.folder)
    check_weights_exist(source)
    tokenizer = load_tokenizer(source)
    renderer, template = build_renderer(tokenizer, data, loaded.folder)
    config = load_config(source)
    device, sizes = find_device(), measure_config(config, recipe.method)
    sources = find_sources(data, loaded.locate, reporter)
    store = _open(sources.stored, renderer, recipe, reporter)
    findings = _look_at_rows(sources, renderer, reporter) if resolved is None else []
    held_out = sources.validation
    validation_store = _open(held_out, renderer, recipe, reporter) if held_out else None
    for each in filter(None, (store, validation_store)):
        _check_ids(each, sizes, source)
    asked = recipe.model.dtype
    is_bf16 = device.has_fast_bf16 if asked == "auto" else asked == "bfloat16"
    needs = estimate_needs(sizes, recipe, is_bf16=is_bf16)
    values = Resolved(resolved, {}) if resolved is not None else None
    values = values or resolve(
        recipe, _facts((store, validation_store), sources, sizes, needs, device)
    )
    configs = [each.config for each in sources.stored]
    loader, split = _split(values.recipe, configs, store, validation_store)
    max_steps = values.recipe.train.max_steps
    keys = [fingerprint(source, config), store.content_key]
    keys += [validation_store.content_key] if validation_store else []
    # A registry may change what sources give without a change in the recipe.
    keys.append("+".join(f"{share.draws}of{share.size}" for share in split.shares))
    num_steps = loader.steps_per_epoch * number(values.recipe.train.epochs)
    return Job(
        source=source,
        tokenizer=tokenizer,
        template=template,
        notes=Counter(store.notes) + Counter(validation_store.notes if validation_store else {}),
        findings=findings,
        labels=[config.label for config in configs],
        resolved=values,
        split=split,
        sizes=sizes,
        needs=needs,
        device=device,
        loader=loader,
        data_key="-".join(keys),
        num_steps=num_steps if max_steps is None else min(num_steps, max_steps),
    )


def _check_ids(store: TokenStore, sizes: Sizes, source: ModelSource) -> None:
    """Refuses tokens that the model has no embedding for (a tokenizer that was extended alone)."""
    if store.largest_id >= sizes.num_embeddings:
        raise ModelError(
            "model.vocabulary",
            source.label,
            found=f"token id {store.largest_id} for {sizes.num_embeddings} embeddings",
            expected="a tokenizer that fits the model",
        )


def _facts(
    stores: tuple[TokenStore, TokenStore | None],
    sources: Sources,
    sizes: Sizes,
    needs: Needs,
    device: Device,
) -> Facts:
    # 40 % of the memory is left to the system, the head's logits, and error of the estimate.
    free_bytes = int(0.6 * device.memory_bytes) - needs.weight_bytes - needs.optimizer_bytes
    rows = np.bincount(stores[0].sample_sources, minlength=len(sources.train))
    rows = rows[: len(sources.train)].tolist()  # without replay
    draws = [
        source.config.count or source.config.weight * size
        for source, size in zip(sources.train, rows, strict=True)
    ]
    longest = [_longest(store) for store in stores if store is not None]
    return Facts(
        num_rows=sum(rows),
        draws_per_row=sum(draws) / max(sum(rows), 1),
        longest_tokens=max(other for other, _ in longest),
        longest_text_tokens=max(text for _, text in longest),
        has_validation=bool(sources.validation),
        context_tokens=sizes.context_tokens,
        hidden_size=sizes.hidden_size,
        device_kind=device.kind,
        has_fast_bf16=device.has_fast_bf16,
        free_bytes=free_bytes,
        activation_bytes_per_token=needs.activation_bytes_per_token,
    )


def _longest(store: TokenStore) -> tuple[int, int]:
    """Tokens of the longest sample that is no raw text, and of the longest one that is."""
    lengths, is_text = store.longest_of_samples(), store.is_text
    return int(lengths[~is_text].max(initial=0)), int(lengths[is_text].max(initial=0))


def _split(
    recipe: Recipe,
    sources: list[SourceConfig],
    store: TokenStore,
    validation_store: TokenStore | None,
) -> tuple[Loader, Split]:
    train, max_length = recipe.train, number(recipe.data.max_length)
    split = make_split(
        recipe.data, sources, (store, validation_store), max_length=max_length, seed=train.seed
    )
    loader = Loader(
        store=store,
        samples=split.train,
        global_batch=number(train.global_batch),
        micro_batch_tokens=number(train.micro_batch_tokens),
        max_length=max_length,
        seed=train.seed,
        shares=split.shares,
        mix=recipe.data.mix,
        overlong=recipe.data.overlong,
    )
    return loader, split


def overview(job: Job, asked: Recipe) -> dict[str, Json]:
    """What a run will do, for the start event and `tunesmith plan`."""
    split, store = job.split, job.split.train_store
    text = (
        f"{job.source.label}: {len(split.train):,} samples to train on, "
        f"{len(split.validation):,} to validate on, {int(store.lengths().sum()):,} tokens; "
        f"template: {job.template}"
    )
    notes = [f"{count:,} samples: {note}" for note, count in job.notes.items()]
    notes += [*_mixture(job), *job.findings]
    if asked.evaluate.early_stopping is not None and not len(split.validation):
        notes.append("evaluate.early_stopping has no effect: no rows are held out to validate on")
    most, counts = f"longer than {job.loader.max_length} tokens", split.counts
    of_validation = split.validation_counts
    end = "start" if job.loader.overlong == "cut_left" else "end"
    for count, what in (
        (counts.truncated, f"{most}, their {end} is cut off"),
        (counts.split, f"{most}, cut into pieces"),
        (counts.dropped, f"{most}, left out"),
        (counts.unsupervised, "without anything to learn, left out"),
        (counts.leaked, "of training that validation has, too, left out of training"),
        (counts.bad, "with problems, left out (data.bad_rows: drop)"),
        (of_validation.truncated, f"of validation {most}, their {end} is cut off"),
        (of_validation.dropped, f"of validation {most}, left out"),
        (of_validation.unsupervised, "of validation without anything to learn, left out"),
        (of_validation.bad, "of validation with problems, left out (data.bad_rows: drop)"),
    ):
        if count:
            notes.append(f"{count:,} samples {what}")
    wanted, values = flatten(asked.model_dump()), flatten(job.resolved.recipe.model_dump())
    auto: dict[str, Json] = {k: values[k] for k in AUTO_KEYS if wanted.get(k) == "auto"}
    reasons: dict[str, Json] = {k: job.resolved.reasons.get(k, "as before") for k in auto}
    return {
        "num_steps": job.num_steps,
        "model": job.source.label,
        "overview": text,
        "notes": list(notes),
        "auto": auto,
        "reasons": reasons,
    }


def _mixture(job: Job) -> list[str]:
    """What each of several sources gives to an epoch."""
    shares = job.split.shares
    if len(shares) < 2:
        return []
    total = sum(share.draws for share in shares)
    parts = [
        f"{label} {share.draws:,} of {share.size:,} ({100 * share.draws / total:.0f} %)"
        for label, share in zip(job.labels, shares, strict=True)
    ]
    return [f"an epoch has {total:,} samples, {job.loader.mix}: {', '.join(parts)}"]


LOOKED_AT_ROWS = 2000
"""So many rows are looked at when a training starts; `tunesmith check` looks at all."""


def _look_at_rows(sources: Sources, renderer: Renderer, reporter: Reporter) -> list[str]:
    """What a look at the first rows of each source finds, a line for each code."""
    share = -(-LOOKED_AT_ROWS // len(sources.train))
    rows = [
        row
        for source in sources.train
        for row in islice(read_samples(source.config, source.files), share)
    ]
    with reporter.waiting("Looking at the first rows"):
        findings = look_at_start(rows, renderer.specials).findings
    if not findings.counts:
        return []
    return [
        f"worth a look in the first {len(rows):,} rows (`tunesmith check` looks at all):",
        *(
            f"  {count:,} x {code}, first {findings.first[code][0].where}: "
            f"{findings.first[code][0].found}: {ADVICE[code]}"
            for code, count in findings.counts.most_common()
        ),
    ]


LEARNABLE = {"sft": ("Conversation", "Completion", "Text")}
"""The kinds of samples that each objective learns from."""


def _open(
    sources: tuple[Source, ...], renderer: Renderer, recipe: Recipe, reporter: Reporter
) -> TokenStore:
    inputs = StoreInputs(
        sources,
        renderer,
        LEARNABLE[recipe.objective.name],
        recipe.data.prompt_loss_weight,
        recipe.data.bad_rows == "drop",
        folder=cache_folder("stores"),
    )
    return open_store(inputs, reporter)
