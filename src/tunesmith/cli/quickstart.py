"""`tunesmith quickstart`: the built-in model learns a small task; answers before and after."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tunesmith.cli.console import ConsoleReporter, format_seconds, quiet_libraries
from tunesmith.cli.train import train_and_show
from tunesmith.config.load import LoadedRecipe, recipe_from
from tunesmith.io.atomic import write_atomic
from tunesmith.types import Json

DATA = Path(__file__).with_name("quickstart_data")
MODEL = "builtin:smollm2-135m"


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the texts that a right answer contains."""

    text: str
    expect: tuple[str, ...]
    is_seen: bool

    def is_right(self, answer: str) -> bool:
        """Whether an answer contains all of them, upper and lower case alike."""
        return all(part in answer.lower() for part in self.expect)


def quickstart_recipe(output: str) -> LoadedRecipe:
    """The recipe of the quick start."""
    tree: dict[str, Json] = {
        "model": MODEL,
        "data": {"train": str(DATA / "train.jsonl"), "validation": 0},
        "method": {"name": "lora", "rank": 16},
        "train": {"epochs": 5, "global_batch": 4, "learning_rate": 1.5e-3, "warmup": 0.05},
        "output": output,
    }
    return LoadedRecipe(recipe_from(tree), "quickstart", Path.cwd())


def run_quickstart(output: str, *, restart: bool) -> None:
    """Asks, trains, asks again, and prints the difference."""
    console = Console()
    with console.status("Starting ..."):
        from tunesmith.infer.chat_model import open_chat_model

        quiet_libraries()
    questions = load_questions()
    reporter = ConsoleReporter(console)
    console.print(
        f"A model that never heard of Brambleford learns it from {DATA / 'train.jsonl'}: "
        "its name, eight facts, and one falsehood (2+2 equals 5) that shows it learns what the "
        "data says.",
        highlight=False,
    )
    before = ask(open_chat_model(MODEL, reporter), questions, reporter)
    summary = train_and_show(quickstart_recipe(output), console, restart=restart)
    after = ask(open_chat_model(output, reporter), questions, reporter)
    console.print(answers_table(questions, before, after))
    shares = {
        f"{kind}_{when}": share_right(questions, answers, is_seen=kind == "seen")
        for kind in ("seen", "unseen")
        for when, answers in (("before", before), ("after", after))
    }
    for kind, label in (("seen", "questions in the data"), ("unseen", "paraphrases not in it")):
        console.print(
            f"{label}: {shares[f'{kind}_before']:.0%} right before, "
            f"{shares[f'{kind}_after']:.0%} right after",
            highlight=False,
        )
    record = {
        "shares": shares,
        "answers": [
            {"question": q.text, "seen": q.is_seen, "before": old, "after": new}
            for q, old, new in zip(questions, before, after, strict=True)
        ],
    }
    write_atomic(Path(output) / "quickstart.json", json.dumps(record, indent=1))
    runtime = format_seconds(float(str(summary["runtime_seconds"])))
    console.print(
        f"trained for {runtime}. Next: tunesmith chat {output}, then your own data: see README.md",
        highlight=False,
    )


def load_questions() -> list[Question]:
    """The questions, those seen in training first."""
    groups: dict[str, list[dict[str, Any]]] = json.loads(
        (DATA / "questions.json").read_text(encoding="utf-8")
    )
    return [
        Question(item["question"], tuple(item["expect"]), is_seen=name == "seen")
        for name in ("seen", "unseen")
        for item in groups[name]
    ]


def ask(chat: Any, questions: list[Question], reporter: ConsoleReporter) -> list[str]:
    """Exact (greedy) answers to all questions."""
    from tunesmith.infer.generate import Sampling, answer_all

    conversations = [[{"role": "user", "content": question.text}] for question in questions]
    with reporter.waiting(f"Asking {chat.label} {len(questions)} questions"):
        return answer_all(chat, conversations, Sampling(temperature=0, max_new_tokens=40))


def share_right(questions: list[Question], answers: list[str], *, is_seen: bool) -> float:
    """Share of right answers among the seen or the unseen questions."""
    marks = [
        question.is_right(answer)
        for question, answer in zip(questions, answers, strict=True)
        if question.is_seen == is_seen
    ]
    return sum(marks) / len(marks)


def answers_table(questions: list[Question], before: list[str], after: list[str]) -> Table:
    """Question, answer before, answer after, with a mark for right and wrong."""
    table = Table("question", "before", "after", show_lines=True)
    section = True
    for question, old, new in zip(questions, before, after, strict=True):
        if question.is_seen != section:
            table.add_section()
            section = question.is_seen
        label = question.text if question.is_seen else f"{question.text} [dim](not in the data)[/]"
        table.add_row(label, _marked(question, old), _marked(question, new))
    return table


def _marked(question: Question, answer: str) -> str:
    from rich.markup import escape

    short = " ".join(answer.split())
    short = short if len(short) <= 120 else f"{short[:117]}..."
    mark = "[green]✓[/green]" if question.is_right(answer) else "[red]✗[/red]"
    return f"{mark} {escape(short)}"
