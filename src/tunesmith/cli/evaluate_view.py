"""What `tunesmith evaluate` shows."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tunesmith.evaluate.evaluation import Evaluation
from tunesmith.evaluate.scores import Comparison, Score

ARROWS = {"higher": "↑", "lower": "↓", "neither": " "}
COLORS = {"better": "green", "worse": "red", "no clear difference": "default"}
SHOWN_ROWS = 4
SHOWN_CHARACTERS = 120


def show_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Prints the figures, what can be said of them, and a few rows."""
    console.print(_figures(evaluation))
    if evaluation.comparisons:
        console.print("95 % intervals and p-values over rows; ↑ more is better, ↓ less is.")
    if evaluation.effect is not None:
        effect = evaluation.effect
        far = f", divergence {effect.kl_nats:.3g} nats a token" if effect.kl_tokens else ""
        console.print(
            f"effect of training: {effect.answers_changed:.0%} of {effect.num_rows:,} answers "
            f"changed{far}",
            highlight=False,
        )
    for note in evaluation.notes:
        console.print(f"note: {note}", highlight=False)
    changed = _changed_rows(evaluation)
    if changed is not None:
        console.print(changed, markup=False)
    console.print("signatures:", highlight=False)
    for score in evaluation.scores[evaluation.sides[-1].role]:
        console.print(f"  {score.signature}", highlight=False, markup=False, soft_wrap=True)


def _figures(evaluation: Evaluation) -> Table:
    title = f"{evaluation.data}: {len(evaluation.sides[-1].predictions):,} rows"
    table = Table(title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    for side in evaluation.sides:
        table.add_column(
            f"{side.role}\n{side.target}" if len(evaluation.sides) > 1 else side.target
        )
    if evaluation.comparisons:
        table.add_column("difference")
        table.add_column("p", no_wrap=True)
        table.add_column("verdict")
    by_metric = {each.metric: each for each in evaluation.comparisons}
    sides = [{s.name: s for s in evaluation.scores[side.role]} for side in evaluation.sides]
    for name in dict.fromkeys(name for side in sides for name in side):
        direction = next(side[name].better for side in sides if name in side)
        cells = [f"{name} {ARROWS[direction]}"]
        cells += [score_text(side.get(name)) for side in sides]
        if evaluation.comparisons:
            cells += _difference(by_metric.get(name))
        table.add_row(*cells)
    return table


def score_text(score: Score | None) -> str:
    """A figure with its interval."""
    if score is None:
        return "-"
    text = f"{score.value:.3g}"
    if score.low is None or score.high is None:
        return text
    return f"{text} [{score.low:.3g}, {score.high:.3g}]"


def _difference(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["", "", ""]
    difference = comparison.after - comparison.before
    p_value = "<0.001" if comparison.p_value < 0.001 else f"{comparison.p_value:.3f}"
    color = COLORS[comparison.verdict]
    said = "not clear" if comparison.verdict == "no clear difference" else comparison.verdict
    return [
        f"{difference:+.3g} [{comparison.low:+.3g}, {comparison.high:+.3g}]",
        p_value,
        f"[{color}]{said}[/{color}]",
    ]


def _changed_rows(evaluation: Evaluation) -> Table | None:
    """The first rows, those that are answered otherwise before the others."""
    rows = evaluation.rows()
    if not rows:
        return None
    roles = [side.role for side in evaluation.sides]
    rows.sort(key=lambda row: len({row[role]["prediction"] for role in roles if role in row}) < 2)
    table = Table(title="Some rows", title_justify="left", show_lines=True)
    for name in ("line", "asked", "label", *roles):
        table.add_column(name)
    for row in rows[:SHOWN_ROWS]:
        asked = str(row["messages"][-1]["content"]) if row["messages"] else row["prompt"]
        said = [row[role]["prediction"] if role in row else "-" for role in roles]
        label = "-" if row["label"] is None else row["label"]
        table.add_row(str(row["line"]), *map(_short, (asked, label, *said)))
    return table


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
