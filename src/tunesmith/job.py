"""What is known of a run before its weights are loaded: `train` goes on from it, `plan` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tunesmith.config.auto import AUTO_KEYS, Facts, Resolved, number, resolve
from tunesmith.config.load import LoadedRecipe, flatten
from tunesmith.config.recipe import Recipe, SourceConfig
from tunesmith.data.loader import Loader
from tunesmith.data.plan import Split, make_split
from tunesmith.data.store import StoreInputs, TokenStore, open_store
from tunesmith.data.templates import Renderer, install_template
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
    template = install_template(tokenizer, data.template, loaded.folder)
    config = load_config(source)
    device, sizes = find_device(), measure_config(config, recipe.method)
    renderer = Renderer(tokenizer, dict(data.template_arguments))
    store = _open(data.train, renderer, loaded, reporter)
    held_out = data.validation if isinstance(data.validation, list) else []
    validation_store = _open(held_out, renderer, loaded, reporter) if held_out else None
    for each in filter(None, (store, validation_store)):
        _check_ids(each, sizes, source)
    asked = recipe.model.dtype
    is_bf16 = device.has_fast_bf16 if asked == "auto" else asked == "bfloat16"
    needs = estimate_needs(sizes, recipe, is_bf16=is_bf16)
    values = Resolved(resolved, {}) if resolved is not None else None
    values = values or resolve(recipe, _facts(store, sizes, needs, device))
    loader, split = _split(values.recipe, store, validation_store)
    max_steps = values.recipe.train.max_steps
    keys = [fingerprint(source, config), store.content_key]
    keys += [validation_store.content_key] if validation_store else []
    num_steps = loader.steps_per_epoch * number(values.recipe.train.epochs)
    return Job(
        source=source,
        tokenizer=tokenizer,
        template=template,
        notes=Counter(store.notes) + Counter(validation_store.notes if validation_store else {}),
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


def _facts(store: TokenStore, sizes: Sizes, needs: Needs, device: Device) -> Facts:
    # 40 % of the memory is left to the system, the head's logits, and error of the estimate.
    free_bytes = int(0.6 * device.memory_bytes) - needs.weight_bytes - needs.optimizer_bytes
    return Facts(
        num_rows=store.num_samples,
        longest_tokens=int(store.longest_of_samples().max()),
        context_tokens=sizes.context_tokens,
        hidden_size=sizes.hidden_size,
        device_kind=device.kind,
        has_fast_bf16=device.has_fast_bf16,
        free_bytes=free_bytes,
        activation_bytes_per_token=needs.activation_bytes_per_token,
    )


def _split(
    recipe: Recipe, store: TokenStore, validation_store: TokenStore | None
) -> tuple[Loader, Split]:
    train, max_length = recipe.train, number(recipe.data.max_length)
    split = make_split(recipe.data, store, validation_store, max_length=max_length, seed=train.seed)
    loader = Loader(
        store=store,
        samples=split.train,
        global_batch=number(train.global_batch),
        micro_batch_tokens=number(train.micro_batch_tokens),
        max_length=max_length,
        seed=train.seed,
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
    if asked.evaluate.early_stopping is not None and not len(split.validation):
        notes.append("evaluate.early_stopping has no effect: no rows are held out to validate on")
    for count, what in (
        (split.num_truncated, f"longer than {job.loader.max_length} tokens, their end is cut off"),
        (split.num_dropped, f"longer than {job.loader.max_length} tokens, left out"),
        (split.num_unsupervised, "without anything to learn, left out"),
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


def _open(
    sources: list[SourceConfig], renderer: Renderer, loaded: LoadedRecipe, reporter: Reporter
) -> TokenStore:
    places = [(source, loaded.locate(source.path)) for source in sources]
    return open_store(StoreInputs(places, renderer, cache_folder("stores")), reporter)
