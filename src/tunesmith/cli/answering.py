"""From what the command line names to rows and what answers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tunesmith.config.load import LoadedRecipe
from tunesmith.config.recipe import DataConfig
from tunesmith.data.sources import Source
from tunesmith.data.templates import Renderer, build_renderer
from tunesmith.errors import DataError, Problem, RecipeError
from tunesmith.evaluate.prompts import Question, read_questions
from tunesmith.infer.answerer import Answerer, find_answerer, load_answerer, load_merged
from tunesmith.infer.answers import Answering, Engine
from tunesmith.infer.chat_model import stop_ids
from tunesmith.infer.endpoint import Endpoint, EndpointEngine, api_key
from tunesmith.infer.vllm_answers import find_vllm, open_vllm_answers
from tunesmith.model.device import find_device
from tunesmith.types import Json, Reporter, Tokenizer


@dataclass(frozen=True)
class Opened:
    """Rows, and what answers them; weights are loaded by `open_engine` alone.

    Args:
        label: what answers, in words.
        questions: the rows.
        settings: what of it decides the answers.
        open_engine: loads the model.
    """

    label: str
    questions: list[Question]
    settings: Mapping[str, Json]
    open_engine: Callable[[Answering], Engine]


def open_target(
    target: str,
    sources: Sequence[Source],
    loaded: LoadedRecipe,
    reporter: Reporter,
    *,
    step: int | None = None,
    engine: str = "transformers",
    system: str | None = None,
    rows: int | None = None,
) -> Opened:
    """A run, a checkpoint of it, an adapter or a model, with the rows as it is asked them.

    Args:
        target: names it.
        sources: the data.
        loaded: the recipe around the data; what it says of templates and `model.dtype` counts.
        reporter: shows bars.
        step: a checkpoint of the run.
        engine: transformers or vllm.
        system: a system message for rows without one.
        rows: the first ones alone.

    Raises:
        RecipeError: there is no such engine (`recipe.engine`).
        DataError: rows cannot be asked, or are longer than the model's context.
    """
    if engine not in ("transformers", "vllm"):
        raise RecipeError(
            "recipe.engine",
            f"--engine {engine}",
            found="an engine that does not exist",
            expected="transformers, vllm, or the http(s) address of a server",
        )
    if engine == "vllm":
        find_vllm()
    answerer = find_answerer(target, reporter, step=step, dtype=loaded.recipe.model.dtype)
    tokenizer = answerer.tokenizer()
    renderer, _ = open_renderer(answerer, tokenizer, loaded)
    questions = read_questions(
        sources, loaded.recipe.data, renderer, reporter, system=system, rows=rows
    )
    _check_lengths(questions, answerer.context_tokens())
    settings: dict[str, Json] = {
        "model": answerer.fingerprint(),
        "step": step,
        "engine": engine,
        "dtype": answerer.dtype,
        "quantize": answerer.quantize,
        "template_arguments": dict(renderer.options.arguments),
    }

    def open_engine(answering: Answering) -> Engine:
        if engine == "vllm":
            return _start_vllm(answerer, tokenizer, questions, answering)
        found = load_answerer(answerer, tokenizer, reporter)
        reporter.note(", ".join(f"{name} {value}" for name, value in found.how.items()))
        return found.engine

    return Opened(answerer.label, questions, settings, open_engine)


def open_server(
    url: str,
    model: str,
    sources: Sequence[Source],
    loaded: LoadedRecipe,
    reporter: Reporter,
    *,
    system: str | None = None,
    rows: int | None = None,
) -> Opened:
    """A server's model, with the rows as messages."""
    questions = read_questions(
        sources, loaded.recipe.data, None, reporter, system=system, rows=rows
    )
    endpoint = Endpoint(url, model, api_key(url))
    settings: dict[str, Json] = {"model": model, "engine": url.rstrip("/")}
    return Opened(f"{model} at {url}", questions, settings, lambda _: EndpointEngine(endpoint))


def open_renderer(
    answerer: Answerer, tokenizer: Tokenizer, loaded: LoadedRecipe
) -> tuple[Renderer, str]:
    """Renders prompts as the run's training did; what the command says besides comes first."""
    given, recipe = loaded.recipe.data, answerer.recipe
    if recipe is not None:
        trained = recipe.data
        own = "auto" if answerer.has_template else trained.template
        update = {
            "template": given.template if given.template != "auto" else own,
            "thinking": given.thinking if given.thinking != "auto" else trained.thinking,
            "template_arguments": {**trained.template_arguments, **given.template_arguments},
        }
        given = given.model_copy(update=update)
    return build_renderer(tokenizer, _asking(given), loaded.folder)


def _asking(data: DataConfig) -> DataConfig:
    """Without what is for training alone."""
    return data.model_copy(update={"train_on": "all", "fill_in_middle": 0.0})


def _check_lengths(questions: Sequence[Question], context: int | None) -> None:
    """Refuses prompts that leave no room for an answer.

    Raises:
        DataError: `data.overlong`.
    """
    most = context or max(len(each.ids) for each in questions) + 1
    problems = [
        Problem(
            f"{each.path}:{each.line}",
            "data.overlong",
            f"a prompt of {len(each.ids):,} tokens",
            f"at most {most - 1:,}, for the model sees {most:,} with the answer",
        )
        for each in questions
        if len(each.ids) >= most
    ]
    if problems:
        raise DataError(problems, try_="shorten these rows, or take them out")


def _start_vllm(
    answerer: Answerer, tokenizer: Tokenizer, questions: Sequence[Question], answering: Answering
) -> Engine:
    """The engine vLLM, with the model's weights written to a folder for it to read.

    Raises:
        RecipeError: its adapter cannot be merged (`recipe.engine`).
    """
    model, adapter = load_merged(answerer, tokenizer, find_device())
    if adapter not in ("none", "merged"):
        raise RecipeError(
            "recipe.engine",
            "--engine vllm",
            found=f"an adapter that stays {adapter}",
            expected="weights that it can be merged into",
            try_="leave --engine out",
        )
    longest = max(len(each.ids) for each in questions)
    with TemporaryDirectory(prefix="tunesmith-vllm-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
        return open_vllm_answers(
            find_vllm(),
            Path(folder),
            tokenizer,
            tuple(stop_ids(model, tokenizer)),
            dtype=str(model.dtype).removeprefix("torch."),
            most_tokens=longest + answering.max_new_tokens,
        )
