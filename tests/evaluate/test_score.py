"""`tunesmith score` and the functions below it, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import make_byte_tokenizer, make_tiny_config
from tunesmith.cli.main import main
from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data.sources import Source
from tunesmith.errors import DataError
from tunesmith.evaluate.score import ScoredRow, score_sources, summary
from tunesmith.infer.score_model import ScoreModel, open_score_model
from tunesmith.model.heads import Head, put_head
from tunesmith.types import SilentReporter

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]
PAIR = {"prompt": "hi", "chosen": "good day", "rejected": "go away"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reward model and a classifier that nobody has trained."""
    import torch
    from transformers import LlamaForSequenceClassification

    found: dict[str, Path] = {}
    for name, labels in (("reward", ()), ("classes", ("cold", "warm"))):
        config = make_tiny_config()
        put_head(config, Head(labels, 256), name)
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name) / "model"
        LlamaForSequenceClassification(config).save_pretrained(found[name])
        make_byte_tokenizer().save_pretrained(found[name])
    return found


def opened(folder: Path) -> ScoreModel:
    return open_score_model(str(folder), SilentReporter())


def score(scorer: ScoreModel, path: Path) -> list[ScoredRow]:
    source = Source(SourceConfig(path=path.name), (path,))
    data = DataConfig.model_validate(str(path))
    return score_sources(scorer, [source], data, SilentReporter())


def test_a_reward_model_scores_rows_of_any_kind(
    folders: dict[str, Path], write_jsonl: Callable[..., Path]
) -> None:
    scorer = opened(folders["reward"])
    path = write_jsonl(
        [PAIR, {"messages": CHAT}, {"text": "plain"}, {"prompt": "p", "completion": "c"}]
    )
    pair, chat, text, _ = (row.values for row in score(scorer, path))
    whole = scorer.rendered(CHAT)
    assert pair["chosen"] == pytest.approx(scorer.score([whole], is_rendered=True)[0], abs=1e-6)
    assert chat["score"] == pytest.approx(pair["chosen"], abs=1e-6)
    assert text["score"] == pytest.approx(scorer.score(["plain"])[0], abs=1e-6)
    assert pair["right"] is (pair["chosen"] > pair["rejected"])  # type: ignore[operator]
    ids = scorer.tokenizer.backend_tokenizer.encode_batch([whole], add_special_tokens=False)[0].ids
    assert scorer.score([ids]) == scorer.score([whole], is_rendered=True)


def test_a_classifier_takes_rows_with_and_without_labels(
    folders: dict[str, Path], write_jsonl: Callable[..., Path]
) -> None:
    rows = [
        {"question": "is it?", "label": "warm"},
        {"text": "so"},
        {"messages": CHAT, "label": "cold"},
    ]
    found = score(opened(folders["classes"]), write_jsonl(rows))
    assert [row.values.get("expected") for row in found] == ["warm", None, "cold"]
    for row in found:
        chances: Any = row.values["probabilities"]
        assert sum(chances.values()) == pytest.approx(1)
        assert row.values["label"] == max(chances, key=chances.get)
    figures = summary(found)
    right = [row.values["label"] == row.values.get("expected") for row in (found[0], found[2])]
    assert figures["accuracy"] == sum(right) / 2
    assert 0 <= figures["macro_f1"] <= 1


def test_bad_rows_are_named(folders: dict[str, Path], write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"text": "t", "label": "cold"}, {"number": 3}, {"text": " "}])
    with pytest.raises(DataError) as caught:
        score(opened(folders["classes"]), path)
    assert f"{path}:2" in str(caught.value)
    assert f"{path}:3" in str(caught.value)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tunesmith", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return int(caught.value.code or 0), out.out, out.err

    return call


def test_the_command(
    folders: dict[str, Path],
    write_jsonl: Callable[..., Path],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path, out = write_jsonl([PAIR] * 7), tmp_path / "scores.jsonl"
    code, shown, _ = run("score", folders["reward"], path, "--out", out)
    assert not code
    assert "The first 5 rows" in shown
    assert "accuracy: " in shown
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, 8))
    assert set(lines[0]) == {"path", "line", "chosen", "rejected", "right"}


def test_a_model_without_a_head(
    tiny_model_folder: Path, write_jsonl: Callable[..., Path], run: Callable[..., Any]
) -> None:
    code, _, error = run("score", tiny_model_folder, write_jsonl([PAIR]))
    assert code == 2
    assert "model.no-head" in error
    assert "objective: reward" in error
