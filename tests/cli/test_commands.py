"""The commands on the tiny model, as a user calls them."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.cli.main import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["tunesmith", *(str(item) for item in arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        assert not caught.value.code, out.err
        return out.out

    return call


def test_help_brings_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['tunesmith', '--help']\nfrom tunesmith.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("train", "preview", "plan", "chat", "quickstart"):
        assert command in done.stdout


def test_train_prints_reasons_progress_and_result(
    run: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    text = run("train", tiny_recipe(method={"rank": "auto"}))
    assert "32 samples to train on, 8 to validate on" in text
    assert re.search(r"method\.rank +│ 16 +│ enough for a task", text)
    assert re.search(r"step 1/20 +loss \d", text)
    assert "validation loss" in text
    assert "before training" in text
    for name in ("train_loss", "eval_loss", "runtime", "samples per second", "peak memory"):
        assert name in text
    folder = tmp_path / "run"
    for name in ("recipe.yaml", "recipe.resolved.yaml", "events.jsonl", "loss.png", "summary.json"):
        assert (folder / name).stat().st_size > 0
    assert "# enough for a task" in (folder / "recipe.resolved.yaml").read_text()
    again = run("train", tmp_path / "recipe.yaml")
    assert "is finished already" in again


def test_preview_marks_exactly_the_answer(
    run: Callable[..., str], tiny_recipe: Callable[..., Path]
) -> None:
    text = run("preview", tiny_recipe(), "-n", "1")
    assert "data.jsonl:1" in text
    plain = text.replace("|", "").replace("\n", "")
    assert "<im_start>assistant↵[answer 0<im_end>]" in plain
    assert "38 tokens, 9 supervised" in text


def test_plan_trains_nothing(
    run: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    text = run("plan", tiny_recipe())
    assert "20 (4 an epoch)" in text
    assert "estimated time" in text
    assert "estimated memory" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_chat_answers_from_a_run_as_plain_transformers_does(
    run: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run("train", tiny_recipe())
    text = run("chat", tmp_path / "run", "-p", "question 1", "-t", "0", "--max-new-tokens", "12")
    script = (
        "import sys, torch\nfrom peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "messages = [{'role': 'user', 'content': 'question 1'}]\n"
        "inputs = tokenizer.apply_chat_template(\n"
        "    messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**inputs, max_new_tokens=12, do_sample=False)\n"
        "text = tokenizer.decode(out[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True)\n"
        "sys.stdout.buffer.write(text.encode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run" / "model")],
        capture_output=True,
        check=True,
    )
    assert text.rstrip("\n") == done.stdout.decode().rstrip("\n")
    assert text.strip()
