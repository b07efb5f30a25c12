"""What an export is verified on: the run's own rows, or own conversations where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.config.recipe import DataConfig, Recipe
from tunesmith.data.columns import read_samples
from tunesmith.data.encode import Pipeline
from tunesmith.data.sources import find_recipe_sources
from tunesmith.data.templates import Renderer, build_renderer
from tunesmith.data.templates.render import REFUSALS
from tunesmith.errors import Problem, TunesmithError
from tunesmith.export.record import DataFile
from tunesmith.export.verify import MAX_SAMPLES, MAX_TOKENS, Prompt, prompt_ids
from tunesmith.export.verify import Sample as Tokens
from tunesmith.io.manifest import file_sha256
from tunesmith.types import Completion, Conversation, Preference, Rated, Reporter, Sample

OWN_CONVERSATIONS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"role": "user", "content": "Name three rivers of Europe."},),
    ({"role": "user", "content": "请用一句话介绍长江。"},),
    (
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "What is 17 + 25?"},
    ),
    (
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello, what can I do for you?"},
        {"role": "user", "content": "Write 'naïve café' in capitals, please."},
    ),
)
"""Two languages, a system message, several turns."""


def run_renderer(tokenizer: Any, recipe: Recipe | None) -> Renderer:
    """What renders conversations as training did; the tokenizer has the run's template already."""
    data = recipe.data if recipe else DataConfig.model_validate({"train": "none"})
    return build_renderer(tokenizer, data.model_copy(update={"template": "auto"}))[0]


def first_rows(recipe: Recipe | None, run: Path, reporter: Reporter) -> list[Sample]:
    """The first rows of the run's validation data, else of its training data; none if it is gone.

    Args:
        recipe: of the run.
        run: its directory, where relative paths are tried before the working directory.
        reporter: told why there are none.
    """
    if recipe is None:
        return []
    try:
        sources = find_recipe_sources(recipe, _locator(run), reporter)
        rows = (
            row
            for source in (*sources.validation, *sources.train)
            for row in read_samples(source.config, source.files)
            if not isinstance(row, Problem)
        )
        return list(islice(rows, MAX_SAMPLES))
    except TunesmithError as error:
        reporter.note(f"the run's data cannot be read any more ({error.code}): own texts are used")
        return []


def data_facts(recipe: Recipe | None, run: Path, reporter: Reporter) -> tuple[DataFile, ...]:
    """The files of the run's training data, for the card; none if they are gone."""
    if recipe is None:
        return ()
    try:
        sources = find_recipe_sources(recipe, _locator(run), reporter)
        return tuple(
            DataFile(
                file.name,
                sum(1 for _ in read_samples(source.config, [file])),
                file_sha256(file),
                source.config.path,
            )
            for source in sources.train
            for file in source.files
        )
    except TunesmithError:
        return ()


def _locator(run: Path) -> Callable[[str], Path]:
    def locate(path: str) -> Path:
        beside = run / Path(path).expanduser()
        return beside if beside.exists() else Path(path).expanduser()

    return locate


def samples_of(rows: Sequence[Sample], renderer: Renderer) -> tuple[Tokens, ...]:
    """The beginnings of rows, or of our own conversations, as the model reads them."""
    found: list[Tokens] = []
    for sample, tokens in Pipeline(renderer).tokens_of(rows) if rows else ():
        if not isinstance(tokens, Problem) and tokens:
            ids = tuple(int(token) for token in tokens[0].ids[:MAX_TOKENS])
            found.append(Tokens(str(sample.origin), ids))
    if found:
        return tuple(found)
    prompts = prompts_of((), renderer)
    if not prompts:  # a template that takes none of them
        (encoding,) = renderer.tokenizer.backend_tokenizer.encode_batch(
            ["The quick brown fox"], add_special_tokens=True
        )
        return (Tokens("own text", tuple(encoding.ids)),)
    return tuple(Tokens(prompt.where, prompt.ids[:MAX_TOKENS]) for prompt in prompts)


def prompts_of(rows: Sequence[Sample], renderer: Renderer) -> tuple[Prompt, ...]:
    """Conversations up to an answer, with their tokens: the rows' and our own.

    Those that the template refuses, such as system messages, are left out; so are tools, which
    not every target has a place for.
    """
    named = [(str(row.origin), _messages(row)) for row in rows]
    own = [(f"own conversation {n}", each) for n, each in enumerate(OWN_CONVERSATIONS, start=1)]
    found: list[Prompt] = []
    for where, messages in (*named, *own):
        if not messages:
            continue
        arguments = renderer.options.arguments
        try:
            ids = prompt_ids(renderer.tokenizer, messages, **arguments)
        except REFUSALS:
            continue
        found.append(Prompt(tuple(messages), tuple(ids), where))
    return tuple(found)


def _messages(row: Sample) -> Sequence[dict[str, Any]]:
    """The messages before the last answer, as plain values; none for what is no plain chat."""
    match row:
        case Conversation():
            messages: Iterable[Any] = row.messages
        case Rated():
            messages = row.conversation.messages
        case Preference():
            messages = row.prompt
        case Completion():
            return [{"role": "user", "content": row.prompt}]
        case _:
            return []
    plain = list(messages)
    while plain and plain[-1].role == "assistant":
        plain.pop()
    if not plain or any(each.tool_calls or each.role == "tool" for each in plain):
        return []
    return [{"role": each.role, "content": each.content or ""} for each in plain]
