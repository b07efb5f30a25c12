"""Run directories as training and evaluation leave them, made by hand; and a reader of pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

RECIPE = """model:
  id: builtin:smollm2-135m
  dtype: bfloat16  # this cpu computes bfloat16 fast
data:
  train:
  - path: data/病句.json
    format: auto
  validation: 40
method:
  name: lora
  rank: 16
  alpha: 32.0  # twice the rank
objective:
  name: sft
train:
  epochs: 10  # 1,021 rows; the best checkpoint is kept
  learning_rate: 0.001
  max_steps: null
output: runs/grammar
"""

SENTENCES = [
    (
        "它渐渐失去了青苍的颜色，变成嫩黄，变成柔绿。",
        "它渐渐失去了青苍的颜色，变成柔绿，变成嫩黄。",
    ),
    ("纱厂工人终日面临着音响，尘埃和湿气的。", "纱厂工人终日面临着音响，尘埃和湿气的问题。"),
    ("一部分家长过分溺爱孩子，使学生缺乏自制力。", "一部分家长溺爱孩子，使学生缺乏自制力。"),
    ("老丁大约六十岁上下，可是身体非常硬朗。", "老丁大约六十岁，可是身体非常硬朗。"),
]


def start(**more: Any) -> dict[str, Any]:
    text = (
        "builtin:smollm2-135m: 1,021 samples to train on, 40 to validate on, 190,943 tokens; "
        "template: the tokenizer's own chat template"
    )
    found = {"event": "start", "step": 0, "time": 1.0, "num_steps": 60, "overview": text}
    return {**found, "model": "builtin:smollm2-135m", "notes": [], "reasons": {}, **more}


def steps(losses: Iterable[float | None], **more: Any) -> list[dict[str, Any]]:
    """Steps from 1 on with these losses."""
    same = {"grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 1000, "supervised_tokens": 400}
    return [
        {"event": "step", "step": n, "time": 1.0 + n, "loss": loss, **same}
        | {"tokens_per_second": 450.0, **more}
        for n, loss in enumerate(losses, 1)
    ]


def evaluations(losses: dict[int, float], **more: Any) -> list[dict[str, Any]]:
    """Validations with these losses, by step."""
    return [
        {"event": "evaluation", "step": step, "time": 1.5 + step, "loss": loss, **more}
        for step, loss in losses.items()
    ]


def done(**more: Any) -> dict[str, Any]:
    return {"event": "done", "step": 60, "time": 200.0, "steps": 60, "epochs": 0.5, **more}


def falling(count: int, first: float = 1.0, last: float = 0.2) -> list[float]:
    return [first + (last - first) * n / (count - 1) for n in range(count)]


def write_run(folder: Path, events: Iterable[dict[str, Any]] = (), *, recipe: str = RECIPE) -> Path:
    """Writes recipe and events; the start comes by itself if none is among the events."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "recipe.resolved.yaml").write_text(recipe, encoding="utf-8")
    events = list(events)
    if not any(event["event"] == "start" for event in events):
        events.insert(0, start())
    lines = (json.dumps(event, ensure_ascii=False) + "\n" for event in events)
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def ordinary_run(folder: Path) -> Path:
    """A finished run that got better."""
    summary = {
        "train_loss": 0.6,
        "eval_loss": 0.25,
        "steps": 60,
        "best_step": 60,
        "epochs": 3.0,
        "runtime_seconds": 195.8,
        "tokens_per_second": 441.6,
        "trained_parameters": 4_884_480,
        "peak_memory_bytes": 2**31,
        "peak_of_steps_bytes": 2**31,
        "predicted_peak_of_steps_bytes": 2**31 - 2**26,
        "finished": "2026-11-22 03:47:13",
    }
    events = [
        *steps(falling(60)),
        *evaluations({0: 1.0, 20: 0.3, 40: 0.26, 60: 0.25}),
        {"event": "checkpoint", "step": 30, "time": 31.0, "path": "checkpoints/step-00000030"},
        done(**summary),
    ]
    write_run(folder, events)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def score(value: float, room: float = 0.05, better: str = "higher", rows: int = 100) -> Any:
    ends = {"low": value - room, "high": value + room}
    return {"value": value, **ends, "signature": "m|v1", "better": better, "num_rows": rows}


def comparison(metric: str, before: float, after: float, **more: Any) -> dict[str, Any]:
    found = {"metric": metric, "before": before, "after": after, "low": after - before - 0.05}
    found |= {"high": after - before + 0.05, "p_value": 0.0004, "verdict": "better"}
    return {**found, "test": "paired bootstrap, 2,000 resamples", **more}


def answer(text: str, label: str, loss: float = 0.5) -> dict[str, Any]:
    share = float(text == label)
    return {"prediction": text, "loss": loss, "scores": {"exact_match": share}}


def row(number: int, label: str, before: str, after: str, **more: Any) -> dict[str, Any]:
    question = f"检测这个句子的语法错误\n{SENTENCES[number % len(SENTENCES)][0]}"
    found: dict[str, Any] = {"id": f"{number:016x}", "path": "data/病句.json", "line": number}
    found |= {"prompt": question, "messages": [{"role": "user", "content": question}]}
    found |= {"label": label, "before": answer(before, label, 0.9), "after": answer(after, label)}
    return {**found, **more}


def four_rows() -> list[dict[str, Any]]:
    """One fixed, one broken, one right and one wrong both times."""
    (s0, l0), (s1, l1), (_, l2), (s3, l3) = SENTENCES
    return [row(1, l0, s0, l0), row(2, l1, l1, s1), row(3, l2, l2, l2), row(4, l3, "对。", s3)]


def write_evaluation(
    run: Path,
    rows: list[dict[str, Any]] | None = None,
    *,
    name: str = "nacgec",
    after: float = 0.31,
    **more: Any,
) -> Path:
    """Writes an evaluation with F0.5, exact match and loss."""
    folder = run / "evaluation" / name
    folder.mkdir(parents=True, exist_ok=True)
    scores = {
        "before": {"correction_f0.5": score(0.02, 0.01), "stop_rate": score(0.95)},
        "after": {"correction_f0.5": score(after), "stop_rate": score(1.0, 0.0)},
    }
    about: dict[str, Any] = {
        "version": 1,
        "created": "2026-11-22T04:10:00+00:00",
        "command": "tunesmith evaluate runs/grammar held_out.json",
        "data": {"label": "held_out.json", "rows": 100, "fingerprint": "abc"},
        "models": [
            {"role": role, "name": f"the {role}", "scores": each} for role, each in scores.items()
        ],
        "comparisons": [comparison("correction_f0.5", 0.02, after)],
        "effect": {"kl_nats": 0.21, "kl_tokens": 6120, "answers_changed": 0.83},
        "notes": ["12 rows have more than one reference"],
        **more,
    }
    (folder / "evaluation.json").write_text(json.dumps(about), encoding="utf-8")
    lines = (json.dumps(each) + "\n" for each in rows or four_rows())
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


VOID = {"meta", "path", "line", "br", "link", "img", "input"}


class Tags(HTMLParser):
    """Checks that every tag that opens closes, in order, and collects what a page points at."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def read_page(path: Path) -> Tags:
    """Parses a page and checks what holds for every one."""
    text = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    assert all(link.startswith("#") for link in tags.links), tags.links
    assert {link[1:] for link in tags.links} <= set(tags.ids)
    assert tags.handlers == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", text)
    return tags
