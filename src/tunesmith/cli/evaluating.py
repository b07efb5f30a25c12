"""From the command line to an evaluation: which rows, which models, and all that is found."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.cli.answering import Opened, open_renderer, open_server, open_target
from tunesmith.cli.check import load_data
from tunesmith.config.load import LoadedRecipe
from tunesmith.config.recipe import LogConfig, Recipe
from tunesmith.data.sources import Source, find_recipe_sources, find_sources
from tunesmith.data.templates import Renderer
from tunesmith.errors import EvaluationError, RunError
from tunesmith.evaluate.benchmarks import BenchmarkOptions, run_benchmarks
from tunesmith.evaluate.forgetting import general_answers
from tunesmith.evaluate.intervals import mean_of
from tunesmith.evaluate.label_loss import label_answers, read_labels
from tunesmith.evaluate.predict import predict_file
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.scores import Score
from tunesmith.infer.answerer import find_answerer, run_recipe
from tunesmith.infer.answers import Answering, Engine
from tunesmith.infer.chat_model import ChatModel
from tunesmith.infer.likelihood import GivenAnswer, Likeliest, Likelihood
from tunesmith.job import prepare, validation_loader
from tunesmith.types import Reporter

GAUGE_ROWS = 200
"""Rows whose likeliest tokens are kept of the first model, to see how far the second one is from
it: 64 tokens at every place, half a kilobyte."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line asks for; see `cli.prove.evaluate`."""

    against: str = "base"
    metrics: str = "auto"
    benchmarks: tuple[str, ...] = ()
    tasks_folder: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    engine: str = "transformers"
    max_new_tokens: int = 512
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    rows: int | None = None
    out: str | None = None
    is_json: bool = False
    allows_code: bool = False

    @property
    def answering(self) -> Answering:
        """How rows are answered."""
        stop = tuple(text for text in self.stop if text)
        return Answering(self.max_new_tokens, self.temperature, stop=stop)

    @property
    def is_server(self) -> bool:
        """Whether models are names at a server."""
        return self.engine.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Rows:
    """The rows to be answered.

    Args:
        label: what they are called.
        sources: where they are.
        loaded: the recipe around them.
        places: file and line of those that count; None for all.
        notes: what the reader must know of them.
    """

    label: str
    sources: Sequence[Source]
    loaded: LoadedRecipe
    places: frozenset[tuple[str, int]] | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Model:
    """A model whose weights are loaded when they are first needed.

    Args:
        opened: its rows and what opens it.
        answering: how it answers.
    """

    opened: Opened
    answering: Answering
    _engine: Engine | None = field(default=None, repr=False)

    def engine(self) -> Engine:
        """What answers, loaded."""
        self._engine = self._engine or self.opened.open_engine(self.answering)
        return self._engine

    @property
    def weights(self) -> Any:
        """The model itself; None behind a server or in another process."""
        return getattr(self.engine(), "model", None)


@dataclass(frozen=True)
class Found:
    """What was found of one model.

    Args:
        target: it.
        predictions: its answers.
        labels: what it makes of the data's own answers, by id.
        general: of the answers to general questions, by number.
        benchmarks: scores.
        vocabulary: of its tokenizer; what is read of two models compares only if it is one.
    """

    target: str
    predictions: Sequence[Prediction] = ()
    labels: Mapping[str, Likelihood] = field(default_factory=dict[str, Likelihood])
    general: Mapping[str, Likelihood] = field(default_factory=dict[str, Likelihood])
    benchmarks: Sequence[Score] = ()
    vocabulary: Mapping[str, int] = field(default_factory=dict[str, int])


def recipe_of(target: str) -> Recipe | None:
    """The recipe of a run; None of anything else."""
    path = Path(target).expanduser()
    return run_recipe(path) if (path / "recipe.resolved.yaml").exists() else None


def base_of_run(target: str, recipe: Recipe | None) -> str:
    """What a run began with.

    Raises:
        RunError: it is no run (`run.none`).
    """
    if recipe is None:
        raise RunError(
            "run.none",
            target,
            found="--against base with what is no run",
            expected="a run directory, which says what it began with",
            try_="--against none, or --against MODEL",
        )
    return recipe.model.adapter or recipe.model.id


def find_rows(target: str, data: Sequence[str], reporter: Reporter) -> Rows:
    """The rows named, or those that a run has held out.

    Raises:
        RunError: no data is named and the run has held nothing out (`run.no-validation`).
    """
    recipe = recipe_of(target)
    if data:
        loaded = _as_trained(load_data(data), recipe)
        sources = find_sources(loaded.recipe.data, loaded.locate, reporter).train
        return Rows(Path(sources[0].config.path).stem, sources, loaded, notes=_said_of(recipe))
    if recipe is not None:  # what a tracker needs is no matter here
        recipe = recipe.model_copy(update={"log": LogConfig()})
    loaded = LoadedRecipe(recipe, target, Path.cwd()) if recipe else None
    job = prepare(loaded, reporter) if loaded else None
    if loaded is None or job is None or not len(job.split.validation):
        raise RunError(
            "run.no-validation",
            target,
            found="no data named, and no rows that a run has held out",
            expected="rows to measure on",
            try_=f"tunesmith evaluate {target} DATA",
        )
    sources = find_recipe_sources(loaded.recipe, loaded.locate, reporter)
    held_out = validation_loader(job, job.loader)
    origins = held_out.origins(job.split.validation.tolist()) if held_out else []
    places = {
        (f"{each.path}:{each.sheet}" if each.sheet else each.path, each.line) for each in origins
    }
    read = sources.validation or sources.stored
    notes = [*_said_of(recipe), *_changed_since(target, job.fingerprints)]
    return Rows("validation", read, loaded, frozenset(places), tuple(notes))


def _as_trained(loaded: LoadedRecipe, trained: Recipe | None) -> LoadedRecipe:
    """Data named on the command line, asked as the run was: both models, by its template."""
    if trained is None:
        return loaded
    given, own = loaded.recipe.data, trained.data
    update = {
        "template": given.template if given.template != "auto" else own.template,
        "thinking": given.thinking if given.thinking != "auto" else own.thinking,
        "template_arguments": {**own.template_arguments, **given.template_arguments},
    }
    model = loaded.recipe.model
    if model.dtype == "auto":
        model = model.model_copy(update={"dtype": trained.model.dtype})
    data = given.model_copy(update=update)
    recipe = loaded.recipe.model_copy(update={"data": data, "model": model})
    return replace(loaded, recipe=recipe)


def _said_of(recipe: Recipe | None) -> tuple[str, ...]:
    if recipe is None or recipe.model.quantize == "none":
        return ()
    return (
        f"the run was trained on its base in {recipe.model.quantize}, the base is measured in its "
        "own precision: the difference is that of both",
    )


def _changed_since(target: str, fingerprints: Mapping[str, str]) -> list[str]:
    """A word on data that is not what the run was trained on: its split is another one, too."""
    states = sorted((Path(target).expanduser() / "checkpoints").glob("step-*/state.json"))
    if not states:
        return []
    known = json.loads(states[-1].read_text(encoding="utf-8")).get("fingerprints", {})
    changed = [name for name, value in fingerprints.items() if known.get(name, value) != value]
    if not changed:
        return []
    return [
        f"{', '.join(changed)} changed since the training: rows held out now may have been "
        "trained on"
    ]


def open_model(target: str, rows: Rows, options: EvaluateOptions, reporter: Reporter) -> Model:
    """A model with the questions of these rows."""
    if options.is_server:
        how = (options.engine, target, rows.sources, rows.loaded, reporter)
        opened = open_server(*how)
    else:
        how = (target, rows.sources, rows.loaded, reporter)
        opened = open_target(*how, engine=options.engine)
    questions = opened.questions
    if rows.places is not None:
        questions = [each for each in questions if (each.path, each.line) in rows.places]
    return Model(replace(opened, questions=questions[: options.rows]), options.answering)


def answer_rows(model: Model, file: Path, reporter: Reporter) -> list[Prediction]:
    """The answers, on from those that the file has if they were made alike."""

    def predicted(*, restart: bool) -> list[Prediction]:
        return predict_file(
            file,
            model.opened.questions,
            model.engine,
            model.answering,
            settings=model.opened.settings,
            reporter=reporter,
            restart=restart,
        ).predictions

    try:
        return predicted(restart=False)
    except RunError as error:
        if error.code != "run.other-predictions":
            raise
        reporter.note(f"{file.name} was made otherwise ({error.found}): it is made anew")
        return predicted(restart=True)


def measure_model(
    target: str,
    rows: Rows | None,
    options: EvaluateOptions,
    file: Path,
    reporter: Reporter,
    before: Found | None = None,
) -> Found:
    """All that needs the model itself: answers, likelihoods, benchmarks.

    Args:
        target: the model.
        rows: to be answered; None for benchmarks alone.
        options: of the command.
        file: of the predictions.
        reporter: shows bars.
        before: the model that it is read beside; None if it is the first.
    """
    found = Found(target)
    model: Model | None = None
    if rows is not None:
        model = open_model(target, rows, options, reporter)
        found = replace(found, predictions=answer_rows(model, file, reporter))
    if options.is_server or options.engine != "transformers":
        return found
    answerer = find_answerer(target, reporter)
    tokenizer = answerer.tokenizer()
    found = replace(found, vocabulary=tokenizer.get_vocab())
    if rows is not None and model is not None:
        renderer, _ = open_renderer(answerer, tokenizer, rows.loaded)
        found = _with_readings(found, model, (rows, renderer), reporter, before)
    if options.benchmarks:
        chat = ChatModel(_weights(model, target, reporter), tokenizer, target)
        how = BenchmarkOptions(limit=options.rows, allows_code=options.allows_code)
        names, folder = options.benchmarks, options.tasks_folder
        scores = run_benchmarks(chat, names, folder, reporter, how)
        found = replace(found, benchmarks=scores)
    model = None
    gc.collect()  # the next model needs the room
    return found


def _weights(model: Model | None, target: str, reporter: Reporter) -> Any:
    from tunesmith.infer.chat_model import open_chat_model

    return model.weights if model is not None else open_chat_model(target, reporter).model


def _with_readings(
    found: Found,
    model: Model,
    rows: tuple[Rows, Renderer],
    reporter: Reporter,
    before: Found | None,
) -> Found:
    """What the model makes of the data's own answers, and of general ones."""
    data, renderer = rows
    questions = model.opened.questions
    labels = label_answers(data.sources, questions, renderer)
    for question, prediction in zip(questions, (before or found).predictions, strict=False):
        # A row without a label is read on the first model's answer.
        if question.id not in labels and prediction.id == question.id:
            given = _as_answer(question.ids, prediction.prediction, renderer)
            labels |= {question.id: given} if given is not None else {}
    general = {str(number): each for number, each in enumerate(general_answers(renderer))}
    is_same = before is not None and before.vocabulary == found.vocabulary

    readings: list[dict[str, Likelihood]] = []
    for answers, earlier, label in (
        (labels, before.labels if before else {}, "Reading labels"),
        (general, before.general if before else {}, "Reading general answers"),
    ):
        beside = _likeliest(answers, earlier) if is_same else {}
        gauge = dict(islice(answers.items(), GAUGE_ROWS)) if before is None else {}
        gauge |= {name: answers[name] for name in beside}
        rest = {name: each for name, each in answers.items() if name not in gauge}
        read = partial(read_labels, model.weights, reporter=reporter, label=label)
        if gauge:
            read_gauge = read(gauge, remembers=before is None, beside=beside or None)
            readings.append(read_gauge | (read(rest) if rest else {}))
        else:
            readings.append(read(rest) if rest else {})
    return replace(found, labels=readings[0], general=readings[1])


def _likeliest(
    answers: Mapping[str, GivenAnswer], earlier: Mapping[str, Likelihood]
) -> dict[str, Likeliest]:
    """What the first model found likeliest, of answers that are as long in both."""
    found: dict[str, Likeliest] = {}
    for name, answer in answers.items():
        kept = earlier[name].likeliest if name in earlier else None
        if kept is not None and len(kept.ids_LK) == len(answer.ids) - answer.first:
            found[name] = kept
    return found


def _as_answer(ids: tuple[int, ...], text: str, renderer: Renderer) -> GivenAnswer | None:
    answer = renderer.tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)
    return GivenAnswer((*ids, *answer[0].ids), len(ids)) if answer[0].ids and ids else None


def general_scores(found: Found) -> list[Score]:
    """Loss on general questions, and the divergence there from the model before."""
    if not found.general:
        return []
    losses = [-float(each.logp_L.double().mean()) for each in found.general.values()]
    signature = f"own|{len(losses)} shipped questions|natural logarithm"
    scores = [mean_of("general_loss", losses, signature=signature, better="lower").score()]
    divergences = [each.kl_L for each in found.general.values() if each.kl_L is not None]
    if divergences:
        means = [float(each.double().mean()) for each in divergences]
        signature = f"KL(before||after), a lower bound|{len(means)} shipped questions"
        scores.append(mean_of("general_kl", means, signature=signature, better="lower").score())
    return [replace(score, rows=()) for score in scores]


def check_judge(options: EvaluateOptions) -> None:
    """Refuses a judge that cannot be asked.

    Raises:
        EvaluationError: a judge without a name (`evaluate.judge-model`).
    """
    if options.judge is not None and not options.judge_model:
        raise EvaluationError(
            "evaluate.judge-model",
            "--judge",
            found="no --judge-model",
            expected="the name of a model that the server has",
        )
