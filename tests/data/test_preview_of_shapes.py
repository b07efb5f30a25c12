"""One conversation, given in every shape: the same tokens, the same of them supervised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import make_byte_tokenizer
from tunesmith.cli import preview
from tunesmith.cli.preview import run_preview

QUESTION, ANSWER = "什么是打铁？", "把铁烧红，再用锤子打。"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}

SHAPES: dict[str, Any] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}]},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "alpaca-zh": {"指令": QUESTION, "输出": ANSWER},
    "completion": {"prompt": QUESTION, "completion": ANSWER},
    "completion-messages": {"prompt": [USER], "completion": [ASSISTANT]},
    "query": {"query": QUESTION, "response": ANSWER},
    "qa": {"question": QUESTION, "answer": ANSWER},
    "qa-zh": {"问题": QUESTION, "回答": ANSWER},
    "llama-chinese": {"text": f"<s>Human: {QUESTION}\n</s><s>Assistant: {ANSWER}\n</s>"},
    "kto": {"prompt": QUESTION, "completion": ANSWER, "label": True},
}
SHAPES["sharegpt"]["conversations"].append({"from": "gpt", "value": ANSWER})
PAIRS: dict[str, Any] = {
    "text": {"prompt": QUESTION, "chosen": ANSWER, "rejected": "不知道"},
    "messages": {
        "prompt": [USER],
        "chosen": [ASSISTANT],
        "rejected": [{"role": "assistant", "content": "不知道"}],
    },
    "alpaca": {"instruction": QUESTION, "input": "", "chosen": ANSWER, "rejected": "不知道"},
    "openai": {
        "input": {"messages": [USER]},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [{"role": "assistant", "content": "不知道"}],
    },
}


@pytest.fixture
def shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """What `tunesmith preview` prints for a file, from the tokens on."""
    monkeypatch.setattr(preview, "find_model", lambda *_: None)
    monkeypatch.setattr(preview, "load_tokenizer", lambda _: make_byte_tokenizer())
    monkeypatch.setattr(preview, "Console", lambda: Console(width=300, color_system=None))

    def show(content: str, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        run_preview(str(path), [], num_samples=3)
        printed = capsys.readouterr().out
        return printed[printed.index("<|im_start|>") :]

    return show


def test_every_shape_gives_the_same_tokens(shown: Callable[..., str]) -> None:
    texts = {
        name: shown(json.dumps(row, ensure_ascii=False) + "\n", f"{name}.jsonl")
        for name, row in SHAPES.items()
    }
    assert "把(3)|铁(3)|" in texts["messages"]
    assert texts["messages"].count("[") == 1  # one run of supervised tokens
    assert "|[把(3)|" in texts["messages"]
    for name, text in texts.items():
        assert text == texts["messages"], name


def test_tables_give_the_same_tokens(shown: Callable[..., str]) -> None:
    expected = shown(json.dumps(SHAPES["messages"]) + "\n")
    assert shown(f"问题,回答\n{QUESTION},{ANSWER}\n", "zh.csv") == expected
    assert shown(f"instruction\toutput\n{QUESTION}\t{ANSWER}\n", "en.tsv") == expected


def test_preference_pairs_give_the_same_tokens_on_both_sides(shown: Callable[..., str]) -> None:
    single = shown(json.dumps(SHAPES["messages"]) + "\n")
    texts = [shown(json.dumps(row) + "\n") for row in PAIRS.values()]
    assert all(text == texts[0] for text in texts)
    assert texts[0].startswith(single.rstrip())
    assert "rejected" in texts[0]
