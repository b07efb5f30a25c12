"""`tunesmith preview`: the first samples, token by token, as the model will see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from rich.console import Console
from rich.text import Text

from tunesmith.cli.check import load_data
from tunesmith.cli.console import ConsoleReporter, quiet_libraries
from tunesmith.config.load import LoadedRecipe
from tunesmith.data.columns import read_samples
from tunesmith.data.encode import Pipeline
from tunesmith.data.sources import find_recipe_sources
from tunesmith.data.templates import build_renderer
from tunesmith.data.tokenize import TokenSequence
from tunesmith.errors import DataError, Problem
from tunesmith.model.load import find_model, load_tokenizer
from tunesmith.types import Labeled, Preference, Reporter, Sample, Tokenizer


def run_preview(recipe: str, overrides: Sequence[str], *, num_samples: int) -> None:
    """Prints the first samples of a recipe's or a file's data; needs a tokenizer, not a model."""
    console = Console()
    loaded = load_data([recipe, *overrides])
    quiet_libraries()
    source = find_model(loaded.recipe.model, ConsoleReporter(console), loaded.folder)
    tokenizer = load_tokenizer(source)
    renderer, template = build_renderer(tokenizer, loaded.recipe.data, loaded.folder)
    pipeline = Pipeline(renderer, loaded.recipe.data.prompt_loss_weight)
    console.print(f"template: {template}", highlight=False)
    console.print(_legend(console))
    samples = first_samples(loaded, num_samples, ConsoleReporter(console))
    for sample, sequences in pipeline.tokens_of(samples):
        if isinstance(sequences, Problem):
            raise DataError([sequences])
        show_sample(console, tokenizer, sample, sequences, loaded.recipe.data.max_length)
    for note, count in renderer.notes.items():
        console.print(f"note ({count} of these samples): {note}", highlight=False)


def first_samples(loaded: LoadedRecipe, count: int, reporter: Reporter) -> list[Sample]:
    """The first good samples; problems among them are an error.

    Raises:
        DataError: a row before the last of them is wrong.
    """
    rows = (
        row
        for source in find_recipe_sources(loaded.recipe, loaded.locate, reporter).train
        for row in read_samples(source.config, source.files)
    )
    if loaded.recipe.data.bad_rows == "drop":
        rows = (row for row in rows if not isinstance(row, Problem))
    first = list(islice(rows, count))
    problems = [row for row in first if isinstance(row, Problem)]
    if problems:
        raise DataError(problems)
    return [row for row in first if not isinstance(row, Problem)]


def show_sample(
    console: Console,
    tokenizer: Tokenizer,
    sample: Sample,
    sequences: Sequence[TokenSequence],
    max_length: int | str,
) -> None:
    """Prints the sequences of one sample with their counts."""
    if not sequences:
        console.print(f"\n{sample.origin}", style="bold", highlight=False)
        console.print("nothing in it is learned: it is left out", style="yellow", highlight=False)
    for number, sequence in enumerate(sequences, start=1):
        total, learned = len(sequence.ids), sum(run[1] for run in sequence.runs)
        part = f", sequence {number} of {len(sequences)}" if len(sequences) > 1 else ""
        if isinstance(sample, Preference) and len(sequences) == 2:
            part = (", chosen", ", rejected")[number - 1]
        if isinstance(sample, Labeled):
            part = f", label {sample.label}, which the last token tells"
        console.print(f"\n{sample.origin}{part}", style="bold", highlight=False)
        console.print(token_text(tokenizer, sequence, console))
        line = f"{total} tokens, {learned} supervised ({100 * learned / max(total, 1):.0f} %)"
        if isinstance(max_length, int) and total > max_length:
            line += f"; longer than {max_length} (data.overlong)"
        console.print(line, style="dim", highlight=False)


def token_text(tokenizer: Tokenizer, sequence: TokenSequence, console: Console) -> Text:
    """Every token between bars; supervised ones in green, in brackets where there is no color.

    A weight other than 1 stands in front of the tokens that have it.
    """
    weights = np.zeros(len(sequence.ids))
    for first, length, weight in sequence.runs:
        weights[first : first + length] = weight
    has_color = console.color_system is not None
    special = set(tokenizer.all_special_tokens)
    text = Text()
    before = 0.0
    for piece, weight in readable_tokens(tokenizer, sequence.ids.tolist(), weights.tolist()):
        if weight != before:
            if before and not has_color:
                text.append("]")
            if weight and not has_color:
                text.append("[")
            if weight not in (0.0, 1.0):
                text.append(f"{weight:g}×", style="bold cyan")
        style = "bold black on green" if weight else "default"
        if piece in special:
            style = "bold white on dark_green" if weight else "magenta"
        text.append(piece.replace("\n", "↵\n"), style=style)
        text.append("|", style="dim")
        before = weight
    if before and not has_color:
        text.append("]")
    return text


def readable_tokens(
    tokenizer: Tokenizer, ids: Sequence[int], weights: Iterable[float]
) -> Iterable[tuple[str, float]]:
    """Token texts; tokens that share a character are shown together, with their number."""
    pending: list[int] = []
    for token, weight in zip(ids, weights, strict=True):
        pending.append(token)
        text = str(tokenizer.decode(pending, skip_special_tokens=False))
        if "\ufffd" in text and len(pending) < 8:
            continue
        yield text if len(pending) == 1 else f"{text}({len(pending)})", weight
        pending = []
    if pending:
        yield str(tokenizer.decode(pending)), 0.0


def _legend(console: Console) -> Text:
    if console.color_system is None:
        return Text("[supervised tokens], | between tokens, ↵ a line break, (3) three tokens")
    legend = Text("supervised", style="bold black on green")
    legend.append("  special", style="not bold magenta on default")
    legend.append("  | between tokens, ↵ a line break, (3) three tokens", style="not bold dim")
    return legend
