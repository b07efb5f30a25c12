"""lm-eval's figures on the loaded model are those of its own command line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_byte_tokenizer, make_tiny_config
from tunesmith.errors import EvaluationError, UserError
from tunesmith.evaluate import benchmarks
from tunesmith.evaluate.benchmarks import BenchmarkOptions, run_benchmarks
from tunesmith.evaluate.intervals import compare, measured, wilson
from tunesmith.evaluate.scores import by_name
from tunesmith.infer.chat_model import ChatModel, open_chat_model
from tunesmith.types import SilentReporter

SILENT = SilentReporter()
OPTIONS = BenchmarkOptions(batch_size=4)

CHOICE = """
task: choose_color
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.5}}
"""
GENERATION = """
task: say_color
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""
GROUP = "group: colors\ntask: [choose_color, say_color]\n"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    colors = ["red", "green", "blue", "grey"]
    rows = [
        {"question": f"What color is thing {n}?", "choices": colors[: 2 + n % 3], "answer": n % 2}
        for n in range(12)
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "model"
    LlamaForCausalLM(make_tiny_config()).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    chat = ChatModel(None, None, "m")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"(?s)evaluate\.library.*tunesmith\[benchmarks\]"):
        run_benchmarks(chat, ["arc_easy"], None, SILENT)


needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_figures_are_those_of_the_command_line(
    tasks: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    chat = open_chat_model(str(model), SILENT)
    names = ["choose_color", "say_*"]
    found = by_name(run_benchmarks(chat, names, str(tasks), SILENT, OPTIONS))
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
        *("--model_args", f"pretrained={model}", "--tasks", "choose_color,say_color"),
        *("--include_path", str(tasks), "--batch_size", "4", "--device", "cpu"),
        *("--output_path", str(tmp_path / "out")),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ})
    (printed,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(printed.read_text())["results"]
    for score, key in (("choose_color/acc", "acc"), ("choose_color/acc_norm", "acc_norm")):
        assert found[score].value == theirs["choose_color"][f"{key},none"]
    assert found["say_color/exact_match"].value == theirs["say_color"]["exact_match,none"]
    accuracy = found["choose_color/acc"]
    assert accuracy.num_rows == 12 and accuracy.better == "higher"
    assert accuracy.signature.startswith("choose_color/acc|task:1.5|shots:0|chat:no|lm-eval:")
    assert (accuracy.low, accuracy.high) == wilson(12 * accuracy.value, 12)
    same = compare(measured(accuracy), measured(accuracy))
    assert (same.test, same.p_value) == ("mcnemar-exact", 1.0)

    # A group without figures of its own stands for its tasks; chats are templated on request.
    limited = BenchmarkOptions(batch_size=4, limit=3, num_fewshot=1, has_chat_template=True)
    group = by_name(run_benchmarks(chat, ["colors"], str(tasks), SILENT, limited))
    assert {each.num_rows for each in group.values()} == {3} and set(group) == set(found)
    assert "shots:1|chat:yes" in group["choose_color/acc"].signature

    (tasks / "choice.yaml").write_text(CHOICE.format(data="/nowhere/rows.json"))
    with pytest.raises(EvaluationError, match=r"evaluate\.task-data"):
        run_benchmarks(chat, ["choose_color"], str(tasks), SILENT, OPTIONS)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks_get_the_nearest_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a short list: to read all of lm-eval's takes 16 s."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", lambda self, **_: None)
    monkeypatch.setattr(TaskManager, "match_tasks", lambda self, names: [])
    monkeypatch.setattr(TaskManager, "all_tasks", ["arc_easy", "gsm8k"])
    chat = ChatModel(None, None, "m")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"(?s)evaluate\.unknown-task.*mean arc_easy\?"):
        run_benchmarks(chat, ["arc_eazy"], None, SILENT)
