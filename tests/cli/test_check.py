"""`tunesmith check` as a person meets it, with a byte tokenizer in place of a model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from conftest import make_byte_tokenizer
from tunesmith.cli import check as check_command
from tunesmith.cli.check import load_data
from tunesmith.cli.main import app
from tunesmith.errors import DataError, RecipeError

GOOD = [{"question": f"第{n}个问题", "answer": f"答案是{n * 7919}"} for n in range(4)]


@dataclass(frozen=True)
class FakeDevice:
    """A device that needs no measuring."""

    kind: str = "cpu"

    def measure_flops(self) -> float:
        """A round number."""
        return 1e9


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `tunesmith check` in a folder of its own, on 80 columns."""
    sizes = SimpleNamespace(context_tokens=512, num_parameters=1000, num_trained=10)
    monkeypatch.setattr(check_command, "find_model", lambda *_: SimpleNamespace(label="bytes"))
    monkeypatch.setattr(check_command, "load_tokenizer", lambda _: make_byte_tokenizer())
    monkeypatch.setattr(check_command, "load_config", lambda _: None)
    monkeypatch.setattr(check_command, "measure_config", lambda *_: sizes)
    monkeypatch.setattr(check_command, "find_device", FakeDevice)
    monkeypatch.setattr(
        check_command, "Console", lambda stderr: Console(width=80, stderr=stderr, color_system=None)
    )
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["check", *arguments])


def write(name: str, rows: list[Any]) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_good_data(check: Callable[..., Result]) -> None:
    write("good.jsonl", GOOD)
    result = check("good.jsonl")
    assert result.exit_code == 0, result.output
    assert "good.jsonl: 4 samples" in result.stdout
    assert "tokens of a sample: p5" in result.stdout
    assert "█" in result.stdout
    assert "training: 15 epochs" in result.stdout
    assert "name yours with --model" in result.stdout
    assert "--fix" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_bad_rows_end_with_2(check: Callable[..., Result]) -> None:
    write("bad.jsonl", [*GOOD, GOOD[0], "{broken"])
    result = check("bad.jsonl")
    assert result.exit_code == 2
    assert "\nbad.jsonl:6: data.json: found broken JSON" in result.stdout
    assert "\nbad.jsonl:5: data.duplicate: found the same as line 1; expected" in result.stdout
    assert "bad.jsonl: 5 samples, 1 unusable row" in result.stdout
    assert "cannot be used: training stops" in result.stdout
    assert "try: --fix clean.jsonl" in result.stdout


def test_no_more_than_twenty_in_full(check: Callable[..., Result]) -> None:
    write("bad.jsonl", [*GOOD, *["{broken"] * 100])
    result = check("bad.jsonl")
    assert result.stdout.count("data.json: found") == 19
    assert result.stdout.count(": found ") == 20  # the last says that there are few rows
    assert "  data.json  100" in result.stdout


def test_json_is_all_of_stdout(check: Callable[..., Result]) -> None:
    write("bad.jsonl", [*GOOD, GOOD[0], "{broken"])
    result = check("bad.jsonl", "--json", "--html", "out/page.html", "--fix", "out/clean.csv")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["counts"]["data.json"] == report["errors"] == 1
    assert report["fixed"]["kept"] == 4
    assert report["fixed"]["dropped"] == 2
    assert report["cost"]["epochs"] == 15
    assert Path("out/page.html").exists()
    assert Path("out/clean.csv.dropped.jsonl").read_text(encoding="utf-8").count("\n") == 2


def test_fix(check: Callable[..., Result]) -> None:
    write("bad.jsonl", [*GOOD, "{broken"])
    result = check("bad.jsonl", "--fix", "clean.jsonl", "--html", "page.html")
    assert result.exit_code == 0
    assert "4 rows kept: clean.jsonl" in result.stdout
    assert "1 row left out, with reasons: clean.jsonl.dropped.jsonl" in result.stdout
    assert "page: page.html" in result.stdout
    assert check("clean.jsonl").exit_code == 0


def test_a_target_is_refused_before_the_work(
    check: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("good.jsonl", GOOD)
    monkeypatch.setattr(check_command, "check_sources", None)
    result = check("good.jsonl", "--fix", "good.jsonl")
    assert isinstance(result.exception, DataError)
    assert result.exception.code == "data.fix-target"


def test_leaks(check: Callable[..., Result]) -> None:
    write("train.jsonl", GOOD)
    write("held_out.jsonl", [GOOD[2]])
    result = check("train.jsonl", "--validation", "held_out.jsonl")
    assert result.exit_code == 0
    assert "train.jsonl:3: data.leak: found the same as held_out.jsonl:1" in result.stdout
    assert "validation  held_out.jsonl: 1 sample" in result.stdout


def test_gbk_is_named_and_then_read(check: Callable[..., Result]) -> None:
    Path("excel.csv").write_bytes("问题,回答\n多少钱？,十元\n大吗？,很大\n".encode("gb18030"))
    result = check("excel.csv")
    assert isinstance(result.exception, DataError)
    assert "data.encoding=gb18030" in str(result.exception)
    result = check("excel.csv", "data.encoding=gb18030")
    assert result.exit_code == 0
    assert "excel.csv: 2 samples" in result.stdout


def test_columns_hold_for_all_data_named(check: Callable[..., Result]) -> None:
    write("one.jsonl", [{"frage": "a?", "antwort": "b"}])
    write("two.jsonl", [{"frage": "c?", "antwort": "d"}])
    write("three.jsonl", [{"frage": "e?", "antwort": "f"}])
    columns = ("data.columns.question=frage", "data.columns.answer=antwort")
    result = check("one.jsonl", "two.jsonl", "--validation", "three.jsonl", *columns)
    assert result.exit_code == 0, result.output
    assert result.stdout.count(".jsonl: 1 sample") == 3


def test_a_folder_brings_its_own_validation(check: Callable[..., Result]) -> None:
    Path("set").mkdir()
    write("set/train.jsonl", GOOD)
    write("set/validation.jsonl", GOOD[:1])
    assert "data.leak" in check("set").stdout


def test_a_recipe_asks_for_what_its_objective_learns(check: Callable[..., Result]) -> None:
    write("pairs.jsonl", [{"prompt": "a?", "chosen": "yes", "rejected": "no"}])
    assert check("pairs.jsonl").exit_code == 0
    Path("r.yaml").write_text("model: m\ndata: pairs.jsonl\n", encoding="utf-8")
    result = check("r.yaml")
    assert result.exit_code == 2
    assert "data.kind: found a preference pair" in result.stdout
    assert "name yours with --model" not in result.stdout


def test_a_recipe_says_what_happens_to_overlong_samples(check: Callable[..., Result]) -> None:
    write("long.jsonl", [{"question": "q?", "answer": "x" * 100}])
    Path("r.yaml").write_text(
        "model: m\ndata: {train: long.jsonl, max_length: 64, overlong: cut_left}\n"
    )
    assert "its start is cut off" in check("r.yaml").stdout
    assert "cut into 2 pieces" in check("r.yaml", "data.overlong=split").stdout
    assert "left out" in check("r.yaml", "data.overlong=drop").stdout


def test_markup_in_data_is_text(check: Callable[..., Result]) -> None:
    write("a[red]b.jsonl", [{"question": "[bold]q[/]?", "answer": "<s>[/INST] {{name}}"}])
    result = check("a[red]b.jsonl")
    assert result.exit_code == 0, result.output
    assert "a[red]b.jsonl: 1 sample" in result.stdout
    assert "found <s>, [/INST] in the answer" in result.stdout


def test_nothing_to_check() -> None:
    with pytest.raises(RecipeError, match="no data"):
        load_data(["data.max_length=5"])


@pytest.mark.slow
def test_with_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("good.jsonl", GOOD)
    result = CliRunner().invoke(app, ["check", "good.jsonl", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tokenizer"] == "builtin:smollm2-135m"
    assert report["max_length"] == 8192
    assert report["cost"]["seconds"] > 0
