"""What is known of a run before its weights are loaded: `train` goes on from it, `plan` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tunesmith.config.auto import Facts, Resolved, number, resolve
from tunesmith.config.budget import Needs, Plan
from tunesmith.config.heads import ClassifyConfig, RewardConfig
from tunesmith.config.load import LoadedRecipe
from tunesmith.config.method import draws_numbers
from tunesmith.config.policy import SamplingConfig
from tunesmith.config.recipe import FullConfig, Recipe, SourceConfig
from tunesmith.data.build import open_store
from tunesmith.data.check.start import findings_at_start
from tunesmith.data.labels import choose_labels
from tunesmith.data.loader import Loader
from tunesmith.data.plan import Split, make_split
from tunesmith.data.sources import Source, Sources, find_recipe_sources
from tunesmith.data.store import StoreInputs, TokenStore
from tunesmith.data.templates import Renderer, build_renderer
from tunesmith.engine.trackers.opening import check_trackers
from tunesmith.errors import ModelError, RecipeError
from tunesmith.evaluate.forgetting import general_answers
from tunesmith.infer.likelihood import GivenAnswer
from tunesmith.io.cache import cache_folder
from tunesmith.model.device import (
    Device,
    find_compiler,
    find_device,
    prepare_machine,
    used_memory_bytes,
)
from tunesmith.model.heads import labels_of, make_head, planned_head
from tunesmith.model.load import (
    ModelSource,
    check_weights_exist,
    find_model,
    fingerprint,
    load_config,
    load_tokenizer,
)
from tunesmith.model.load_adapter import adapter_fingerprints
from tunesmith.model.memory import (
    Sizes,
    StepBytes,
    estimate_needs,
    measure_config,
    refine_needs,
)
from tunesmith.model.quantize import check_method
from tunesmith.model.sampling import needs_with_sampling
from tunesmith.model.start import with_adapter
from tunesmith.model.teacher import Teacher, check_vocabulary, find_teacher, needs_with
from tunesmith.model.vocabulary import with_new_tokens
from tunesmith.objectives import OBJECTIVES
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.rollout.checks import check_context, check_sampling
from tunesmith.rollout.judge import Judge, open_judge
from tunesmith.types import Reporter, Tokenizer


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
    facts: Facts
    device: Device
    loader: Loader
    fingerprints: dict[str, str]
    """Hashes of model and data, by names that a person knows."""
    judge: Judge | None
    """Of sampled answers, where the objective learns from such."""
    end_ids: tuple[int, ...]
    """Tokens that the chat template ends an answer with."""
    general: list[GivenAnswer]
    """Answers to general questions, which show what the model forgets."""
    num_steps: int
    predicted_bytes: int
    """The peak of memory while training: of the largest of some steps looked at.

    `plan` holds what the largest step possible would take."""
    teacher: Teacher | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, those to validate on included."""
        stores = (self.split.train_store, self.split.validation_store)
        return sum(int(store.lengths().sum()) for store in dict.fromkeys(stores))

    @property
    def plan(self) -> Plan:
        """How a step fits into memory."""
        return self.resolved.plan


def prepare(loaded: LoadedRecipe, reporter: Reporter, resolved: Recipe | None = None) -> Job:
    """Config -> data: checks model and data, tokenizes, splits, and fills in every `auto`.

    Args:
        loaded: the recipe.
        reporter: shows long work.
        resolved: the values of an earlier start, to go on with exactly these.
    """
    data = loaded.recipe.data
    check_method(loaded.recipe)
    _check_objective(loaded.recipe)
    check_sampling(loaded.recipe)
    check_trackers(loaded.recipe.log.trackers)
    base = find_model(loaded.recipe.model, reporter, loaded.folder)
    check_weights_exist(base)
    recipe, source = with_adapter(loaded.recipe, base, reporter, loaded.folder)
    tokenizer, goal = load_tokenizer(source), (resolved or recipe).objective
    recipe = with_new_tokens(recipe, tokenizer, source.new_tokens)
    teacher = find_teacher(recipe.objective, reporter, loaded.folder)
    renderer, template = build_renderer(tokenizer, data, loaded.folder)
    known, marks = tokenizer.get_vocab(), renderer.traits.end_marks
    end_ids = tuple(known[mark] for mark in marks if mark in known)
    judge = open_judge(goal, tokenizer, end_ids, loaded.locate, reporter)
    config = load_config(source)
    device, sizes = find_device(), measure_config(config, recipe.method, planned_head(goal))
    prepare_machine(device)
    sources = find_recipe_sources(recipe, loaded.locate, reporter)
    store = _open(sources.stored, renderer, recipe, reporter)
    findings = findings_at_start(sources, renderer, reporter) if resolved is None else []
    held_out = sources.validation
    validation_store = _open(held_out, renderer, recipe, reporter) if held_out else None
    stores = (store, validation_store)
    for each in filter(None, stores):
        _check_ids(each, sizes, source)
        check_vocabulary(teacher, tokenizer, each.largest_id)
    are_prompts = isinstance(goal, SamplingConfig)
    needs = _needs(resolved or recipe, sizes, device, teacher, max(_longest(store, are_prompts)))
    facts = _facts(stores, sources, sizes, needs, device, are_prompts=are_prompts)
    labels = choose_labels(goal, labels_of(config), stores)
    source = replace(source, head=make_head(goal, labels, tokenizer, marks))
    seconds = _seconds_per_token(recipe, sizes, device)
    facts = replace(facts, seconds_per_token=seconds, labels=labels)
    # An earlier start has no `auto` left: then this only plans its memory again, to predict it.
    values = resolve(resolved or recipe, facts)
    check_context(values.recipe, facts)
    configs = [each.config for each in sources.stored]
    loader, split = _split(values.recipe, configs, stores, device)
    fingerprints = {"base model": fingerprint(source, config), **_fingerprints(stores, split)}
    fingerprints |= adapter_fingerprints(source.adapter) | (teacher.fingerprints if teacher else {})
    num_steps = loader.steps_per_epoch * number(values.recipe.train.epochs)
    num_steps = min(num_steps, values.recipe.train.max_steps or num_steps)
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
        facts=facts,
        device=device,
        loader=loader,
        fingerprints=fingerprints,
        judge=judge,
        end_ids=end_ids,
        general=_general(loaded, renderer),
        num_steps=num_steps,
        predicted_bytes=_predict(loader, num_steps, needs, values.plan),
        teacher=teacher,
    )


def _needs(
    recipe: Recipe, sizes: Sizes, device: Device, teacher: Teacher | None, longest_tokens: int
) -> Needs:
    """A first estimate of what training takes, with all that is beside the model."""
    kind, asked = device.kind, recipe.model.dtype
    is_bf16 = device.has_fast_bf16 if asked == "auto" else asked == "bfloat16"
    used = 0 if kind == "cuda" else used_memory_bytes(device)
    needs = estimate_needs(sizes, recipe, is_bf16=is_bf16, device_kind=kind, used_bytes=used)
    needs = needs_with(teacher, needs, is_bf16=is_bf16, device_kind=kind)
    how = (recipe.objective, needs, sizes, longest_tokens)
    return needs_with_sampling(*how, is_bf16=is_bf16, device_kind=kind)


def _fingerprints(stores: tuple[TokenStore, TokenStore | None], split: Split) -> dict[str, str]:
    """Hashes of the data, by names that a person knows."""
    found = dict(stores[0].fingerprints)
    if stores[1] is not None:
        of_validation = stores[1].fingerprints.items()
        found |= {f"validation: {name}": value for name, value in of_validation}
    # A registry may change what sources give without a change in the recipe.
    shares = (f"{share.draws} of {share.size}" for share in split.shares)
    return found | {"samples of each source": " + ".join(shares)}


def _general(loaded: LoadedRecipe, renderer: Renderer) -> list[GivenAnswer]:
    """What the meter of forgetting reads; nothing of a model that gives scores."""
    file = loaded.recipe.evaluate.general
    if file is None or isinstance(loaded.recipe.objective, RewardConfig | ClassifyConfig):
        return []
    return general_answers(renderer, None if file == "auto" else loaded.locate(file))


LOOKED_AT_STEPS = 16
"""So many steps, spread over an epoch, show how large micro-batches come to be."""


def _predict(loader: Loader, num_steps: int, needs: Needs, plan: Plan) -> int:
    steps = min(num_steps, loader.steps_per_epoch)
    chosen = {steps * part // LOOKED_AT_STEPS for part in range(LOOKED_AT_STEPS)} if steps else {0}
    batches = [micro for step in chosen for micro in loader.batch(step).micro_batches]
    largest = max((batch.num_stored_tokens for batch in batches), default=0)
    if needs.apart_bytes:  # what is sampled is as long as it may be
        largest = loader.micro_batch_tokens
    return needs.peak_bytes(largest, plan.levels)


def _check_objective(recipe: Recipe) -> None:
    """Refuses settings of the data that objectives on whole answers cannot use."""
    family = OBJECTIVES[recipe.objective.name]
    has_answers = not family.group_size and "Labeled" not in family.kinds
    if recipe.data.prompt_loss_weight and not has_answers:
        raise RecipeError(
            "recipe.prompt-weight",
            "data.prompt_loss_weight",
            found=f"{recipe.data.prompt_loss_weight} with objective {recipe.objective.name}",
            expected="0: prompts are no part of the answers that are compared",
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
    *,
    are_prompts: bool,
) -> Facts:
    rows = np.bincount(stores[0].sample_sources, minlength=len(sources.train))
    rows = rows[: len(sources.train)].tolist()  # without replay
    draws = [
        source.config.count or source.config.weight * size
        for source, size in zip(sources.train, rows, strict=True)
    ]
    longest = [_longest(store, are_prompts) for store in stores if store is not None]
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
        memory_bytes=device.memory_bytes,
        needs=needs,
        longest_samples=_longest_samples(stores),
        tokens_per_row=float(stores[0].lengths().sum()) / max(len(stores[0].sample_sources), 1),
        compiler=find_compiler(device),
    )


REACHED_SHARE = {"cpu": 0.3, "cuda": 0.4, "mps": 0.3}
"""Of a device's rate in large products, what training reaches: for a first guess of its time."""


def _seconds_per_token(recipe: Recipe, sizes: Sizes, device: Device) -> float:
    """A guess of a training step's time that is right within a factor of two or three.

    Forward and backward take 6 operations a parameter and token, 4 if the weights are frozen.
    """
    per_token = (6 if isinstance(recipe.method, FullConfig) else 4) * sizes.num_parameters
    return per_token / (REACHED_SHARE[device.kind] * device.measure_flops())


TIGHT_SHARE = 0.5
"""A predicted peak above this share of the memory is worth two small steps to know it better."""


def fit_memory(job: Job, measure: Callable[[int], StepBytes]) -> Job:
    """Plans memory again from steps on the loaded model, if that may change something.

    On a CPU with plenty of memory the estimate is good enough and two more steps would only delay
    the start; on a GPU they take milliseconds and memory is what limits it. What an earlier start
    wrote down stays: exact resume needs the same micro-batches.

    Args:
        job: with the estimate.
        measure: runs a forward and backward of so many tokens, nothing recomputed, and one
            supervised row.
    """
    is_open = any(key in job.resolved.reasons for key in PLANNED_KEYS)
    is_tight = job.plan.predicted_bytes > TIGHT_SHARE * job.facts.memory_bytes
    if not is_open or not (is_tight or job.device.kind == "cuda"):
        return job
    sizes = (64, 192) if job.device.kind == "cpu" else (1024, 3072)
    try:
        needs = refine_needs(job.facts.needs, measure, sizes)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return job  # two steps with nothing recomputed are too much: the estimate must do
    return _replan(job, replace(job.facts, needs=needs))


def _replan(job: Job, facts: Facts) -> Job:
    """The job with those planned values that were `auto` chosen anew."""
    recipe = job.resolved.recipe
    chosen = {k.removeprefix("train."): "auto" for k in PLANNED_KEYS if k in job.resolved.reasons}
    open_recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=chosen)})
    found = resolve(open_recipe, facts)
    reasons = {**job.resolved.reasons, **found.reasons}
    tokens = number(found.recipe.train.micro_batch_tokens)
    loader = replace(job.loader, micro_batch_tokens=tokens)
    return replace(
        job,
        resolved=Resolved(found.recipe, reasons, found.plan),
        facts=facts,
        loader=loader,
        predicted_bytes=_predict(loader, job.num_steps, facts.needs, found.plan),
    )


PLANNED_KEYS = ("train.micro_batch_tokens", "train.checkpointing", "train.checkpointed_layers")


def _longest_samples(stores: tuple[TokenStore, TokenStore | None]) -> tuple[int, ...]:
    """Tokens of the 256 longest samples, the longest one first.

    None are told if samples may come in several pieces, which a step then has at once.
    """
    known = [store for store in stores if store is not None]
    lengths = np.concatenate([store.longest_of_samples() for store in known])
    num_sequences = sum(len(store.lengths()) for store in known)
    if num_sequences > len(lengths) or any(store.is_text.any() for store in known):
        return ()
    return tuple(np.sort(lengths)[:-257:-1].tolist())


def _longest(store: TokenStore, are_prompts: bool) -> tuple[int, int]:
    """Tokens of the longest sample that is no raw text, and of the longest one that is."""
    lengths = store.prompts_of_samples() if are_prompts else store.longest_of_samples()
    is_text = store.is_text
    return int(lengths[~is_text].max(initial=0)), int(lengths[is_text].max(initial=0))


PAD_ROWS = 64
"""oneDNN makes some 55 kernels for every new number of rows, 0.1 s and 30 MB of them: multiples of
this cost 1 % more rows at 1,300 and come again and again."""


def _split(
    recipe: Recipe,
    sources: list[SourceConfig],
    stores: tuple[TokenStore, TokenStore | None],
    device: Device,
) -> tuple[Loader, Split]:
    train, max_length = recipe.train, number(recipe.data.max_length)
    family = OBJECTIVES[recipe.objective.name]
    size = family.group_size
    split = make_split(
        recipe.data,
        sources,
        stores,
        max_length=max_length,
        seed=train.seed,
        group_size=size,
        are_prompts=isinstance(recipe.objective, SamplingConfig),
    )
    loader = Loader(
        store=stores[0],
        samples=split.train,
        global_batch=number(train.global_batch),
        micro_batch_tokens=number(train.micro_batch_tokens),
        max_length=max_length,
        seed=train.seed,
        shares=split.shares,
        mix=recipe.data.mix,
        overlong="drop" if size else recipe.data.overlong,
        group_size=size,
        has_mismatched=family.needs_mismatched,
        labels=tuple(getattr(recipe.objective, "labels", ())),
        repeats=getattr(recipe.objective, "steps_per_sampling", 1),
        pad_to=PAD_ROWS if device.kind == "cpu" else 1,
        # Dropout and noise draw numbers per row: a shared prefix would draw once for all.
        share_prefixes=not draws_numbers(recipe.method) and train.neftune_alpha is None,
    )
    return loader, split


def validation_loader(job: Job, loader: Loader) -> Loader | None:
    """The loader of what is held out; None if nothing is."""
    split = job.split
    if not len(split.validation):
        return None
    return replace(
        loader,
        store=split.validation_store,
        samples=split.validation,
        shares=(),
        mix="shuffle",
    )


def _open(
    sources: tuple[Source, ...], renderer: Renderer, recipe: Recipe, reporter: Reporter
) -> TokenStore:
    inputs = StoreInputs(
        sources,
        renderer,
        OBJECTIVES[recipe.objective.name].kinds,
        recipe.data.prompt_loss_weight,
        recipe.data.bad_rows == "drop",
        folder=cache_folder("stores"),
    )
    return open_store(inputs, reporter)
