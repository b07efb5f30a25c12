"""The rows of the fault matrix that are about data: what goes wrong, and what is said about it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import make_byte_tokenizer
from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data.build import open_store
from tunesmith.data.check.checker import check_sources
from tunesmith.data.check.report import CheckReport
from tunesmith.data.columns import read_samples
from tunesmith.data.sources import find_sources
from tunesmith.data.store import StoreInputs
from tunesmith.data.templates import Renderer
from tunesmith.errors import DataError, Problem
from tunesmith.types import Conversation, SilentReporter

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def lines(*rows: Any) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(content: str | bytes, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def report_of(*paths: Path, max_length: int | None = None, **data: Any) -> CheckReport:
    config = DataConfig.model_validate(
        {"train": [str(path) for path in paths], "validation": 0, **data}
    )
    sources = find_sources(config, Path, SilentReporter())
    renderer = Renderer(make_byte_tokenizer())
    return check_sources(sources, renderer, SilentReporter(), max_length=max_length)[0]


def refusal(path: Path) -> DataError:
    sources = find_sources(DataConfig.model_validate(str(path)), Path, SilentReporter())
    inputs = StoreInputs(
        sources.train, Renderer(make_byte_tokenizer()), folder=path.parent / "stores"
    )
    with pytest.raises(DataError) as caught:
        open_store(inputs, SilentReporter())
    return caught.value


def test_row_47_malformed_json_names_its_line(write: Callable[..., Path]) -> None:
    """Broken JSON in line 3 and 30 more: line and byte of the first 20, all of them counted."""
    broken = '{"messages": [}\n'
    error = refusal(write(lines(GOOD, GOOD, broken, GOOD, *[broken] * 30)))
    assert error.problems[0].where.endswith("data.jsonl:3")
    assert error.problems[0].code == "data.json"
    assert "byte 14" in error.problems[0].found
    assert (len(error.problems), error.num_problems) == (20, 31)


def test_row_48_wrong_type_in_one_row(write: Callable[..., Path]) -> None:
    """An object for a text in line 900: its line and field, what was found, what was expected."""
    bad = {"messages": [GOOD["messages"][0], {"role": "assistant", "content": {"x": 1}}]}
    error = refusal(write(lines(*[GOOD] * 899, bad, GOOD)))
    assert error.problems == [
        Problem(
            f"{error.problems[0].where.rsplit(':', 1)[0]}:900",
            "data.bad-type",
            'messages[1].content = {"x": 1}',
            "messages[1].content as text",
        )
    ]


def test_row_49_roles_empty_answers_unknown_tools(write: Callable[..., Path]) -> None:
    """Roles out of order, an empty answer, an unknown tool: counted by code, refused by default."""
    user, answer = GOOD["messages"]
    call = {"function": {"name": "sing", "arguments": "{}"}}
    tools = [{"type": "function", "function": {"name": "dance", "parameters": {}}}]
    rows = [
        {"messages": [user, user, answer]},
        {"messages": [user, answer, answer]},
        {"messages": [user, {**answer, "content": " "}]},
        {"messages": [user, {"role": "assistant", "tool_calls": [call]}], "tools": tools},
        GOOD,
    ]
    path = write(lines(*rows))
    assert dict(report_of(path).findings.counts) == {
        "data.role-order": 2,
        "data.empty-answer": 1,
        "data.unknown-tool": 1,
        "data.few-rows": 1,
    }
    assert refusal(path).num_problems == 4  # an error unless the recipe says bad_rows: drop


def test_row_50_prompt_longer_than_the_limit(write: Callable[..., Path]) -> None:
    """A prompt that leaves no room for the answer: named with its row, nothing trained on it."""
    long = {"messages": [{"role": "user", "content": "q" * 200}, GOOD["messages"][1]]}
    report = report_of(write(lines(long, GOOD)), max_length=100)
    (problem,) = report.findings.first["data.overlong"]
    assert problem.where.endswith(":1")
    assert "nothing is left to learn" in problem.found


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-16"),
    ],
    ids=["bom", "crlf", "utf-16"],
)
def test_row_51_marks_and_line_ends(
    encode: Callable[[str], bytes], write: Callable[..., Path]
) -> None:
    """A byte order mark, CRLF, UTF-16: read like any other file."""
    path = write(encode(lines(GOOD, {"prompt": "问", "completion": "答"})))
    samples = list(read_samples(SourceConfig(path="d"), [path]))
    assert isinstance(samples[0], Conversation)
    assert not any(isinstance(sample, Problem) for sample in samples)


def test_row_51_invalid_bytes(write: Callable[..., Path]) -> None:
    """A byte that is no UTF-8: named with its line, the rows before it are read."""
    path = write(lines(GOOD).encode() + b'{"prompt": "\xff", "completion": "a"}\n')
    first, second = read_samples(SourceConfig(path="d"), [path])
    assert isinstance(first, Conversation)
    assert isinstance(second, Problem)
    assert (second.where, second.code) == (f"{path}:2", "data.encoding")
    assert "0xff" in second.found


def test_row_51_gbk_is_recognized(write: Callable[..., Path]) -> None:
    """A file in GBK: refused with the setting that reads it."""
    path = write('{"prompt": "你好吗", "completion": "我很好，谢谢你"}\n'.encode("gbk"))
    (problem,) = read_samples(SourceConfig(path="d"), [path])
    assert isinstance(problem, Problem)
    assert "encoding: gb18030" in problem.expected
    (sample,) = read_samples(SourceConfig(path="d", encoding="gb18030"), [path])
    assert not isinstance(sample, Problem)


def test_row_51_a_line_of_a_hundred_megabytes(write: Callable[..., Path]) -> None:
    """A line of 100 MB: read, or named, never the end of the process."""
    huge = b'{"prompt": "' + b"x" * 100_000_000 + b'", "completion": "a"}\n'
    path = write(lines(GOOD).encode() + huge + lines(GOOD).encode())
    first, second, *rest = read_samples(SourceConfig(path="d"), [path])
    assert isinstance(first, Conversation)
    if isinstance(second, Problem):
        assert (second.where, second.code) == (f"{path}:2", "data.long-row")
    else:
        assert len(rest) == 1


def test_row_52_training_rows_found_in_validation(write: Callable[..., Path]) -> None:
    """A training row that validation has, too: counted, with both places."""
    other = {"prompt": "something else", "completion": "entirely different"}
    train = write(lines(GOOD, other, GOOD), "train.jsonl")
    validation = write(lines(GOOD), "validation.jsonl")
    report = report_of(train, validation=[{"path": str(validation)}])
    assert report.findings.counts["data.leak"] == 1
    (leak,) = report.findings.first["data.leak"]
    assert (leak.where, leak.found) == (f"{train}:1", f"the same as {validation}:1")


def test_row_51_chinese_files_in_a_c_locale(write: Callable[..., Path]) -> None:
    """A system whose own encoding is not UTF-8: reads the same."""
    path = write(lines({"prompt": "你好", "completion": "您好"}))
    script = (
        "from pathlib import Path\n"
        "from tunesmith.config.recipe import SourceConfig\n"
        "from tunesmith.data.columns import read_samples\n"
        f"(sample,) = read_samples(SourceConfig(path='d'), [Path({str(path)!r})])\n"
        "assert sample.completion == '\\u60a8\\u597d'\n"
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": ""}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


@pytest.mark.slow
def test_row_48_check_exits_with_2_on_errors_only(write: Callable[..., Path]) -> None:
    """A wrong type in one row: `tunesmith check` says where and exits with 2, else with 0."""
    from tunesmith.cli.main import app

    good = write(lines(GOOD), "good.jsonl")
    bad = write(lines(GOOD, '{"prompt": 1}\n'), "bad.jsonl")
    assert CliRunner().invoke(app, ["check", str(good)]).exit_code == 0
    result = CliRunner().invoke(app, ["check", str(bad)])
    assert result.exit_code == 2
    assert f"{bad}:2: data.columns" in result.output
