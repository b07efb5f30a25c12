"""The whole command, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.cli.export import ExportOptions, run_export
from tunesmith.errors import ExportError, UserError
from tunesmith.export import formats
from tunesmith.export.trained import Trained
from tunesmith.export.written import Request, Written

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def trained(make_trained: Callable[..., Trained]) -> Trained:
    from peft import LoraConfig

    return make_trained(LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A run directory with the adapter as its result, and data."""
    folder = tmp_path / "run"
    folder.mkdir()
    assert trained.adapter is not None
    trained.adapter.rename(folder / "model")
    rows = [{"messages": turn(f"question {n}", f"answer {n}")} for n in range(12)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"id": trained.base.path},
        "data": {"train": str(data)},
        "method": {"name": "lora", "rank": 4},
    }
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "summary.json").write_text(json.dumps({"eval_loss": 1.25, "steps": 3}))
    measured = folder / "evaluation" / "test" / "evaluation.json"
    measured.parent.mkdir(parents=True)
    score = {"value": 0.5, "low": 0.25, "high": 0.75, "signature": "s"}
    models = [{"label": "run", "scores": {"exact_match": score}}]
    measured.write_text(json.dumps({"models": models}))
    return folder


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def export(target: Path, out: Path, to: str, **options: Any) -> dict[str, Any]:
    run_export(str(target), ExportOptions(to=to, out=str(out), **options))
    return json.loads((out / "export.json").read_text())


def test_a_run_is_merged_compared_and_described(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = export(run, tmp_path / "out", "merged")
    said = " ".join(capsys.readouterr().out.split())
    assert "same as what was trained, read by transformers: logits differ by at most" in said
    assert "same prompts: 12, token by token" in said
    assert record["verified"]["logits"]["samples"] == 8
    assert record["verified"]["logits"]["top_1_agreement"] == 1.0
    assert record["stop_ids"] == [258]
    assert set(record["files"]) >= {"model.safetensors", "config.json", "README.md"}
    assert record["data"][0]["rows"] == 12
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for text in (
        "| eval_loss | 1.25 |",
        "| run | exact_match | 0.5 | 0.25 to 0.75 |",
        "| rows.jsonl | 12 |",
        "<|im_start|>user\nHello!<|im_end|>",
        "Answers end with `<|im_end|>`",
        "method.rank | 4",
    ):
        assert text in card, card


@pytest.mark.slow
@pytest.mark.parametrize("to", ["adapter", "mindspore"])
def test_other_formats_of_a_run(to: str, run: Path, tmp_path: Path) -> None:
    record = export(run, tmp_path / "out", to)
    assert record["verified"]["logits"]["max_difference"] < 1e-4
    assert record["verified"]["prompts"] == 12


@pytest.mark.slow
def test_an_adapter_folder_and_a_model_folder_are_exported(
    trained: Trained, tmp_path: Path
) -> None:
    assert trained.adapter is not None
    assert export(trained.adapter, tmp_path / "a", "merged")["verified"]["prompts"] == 4
    record = export(Path(trained.base.path), tmp_path / "b", "merged", dtype="float16")
    assert record["verified"]["logits"]["samples"] == 4  # own conversations: there is no run


def test_a_model_without_an_adapter_has_none_to_export(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export\.no-adapter"):
        export(Path(trained.base.path), tmp_path / "out", "adapter")
    assert not (tmp_path / "out").exists()


def test_what_differs_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trained: Trained, folder: Path, request: Request, reporter: Any) -> Written:
        written = formats.export_merged(trained, folder, request, reporter)

        def logits(samples: Sequence[Any]) -> list[Any]:
            assert written.logits is not None
            return [each.flip(-1) for each in written.logits(samples)]

        return Written("float32", "a loader", logits)

    monkeypatch.setitem(formats.EXPORTERS, "merged", broken)
    with pytest.raises(ExportError, match=r"export\.differs.*rows\.jsonl:1, token 1"):
        export(run, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))
    record = export(run, tmp_path / "out", "merged", is_verified=False)
    assert record["verified"] is None


@pytest.mark.slow
def test_another_template_is_a_difference(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(trained: Trained, folder: Path, request: Request, reporter: Any) -> Written:
        formats.export_merged(trained, folder, request, reporter)
        return Written("float32", "a loader", None, lambda messages: [1, 2])

    monkeypatch.setitem(formats.EXPORTERS, "merged", other)
    with pytest.raises(ExportError, match=r"export\.prompt-differs"):
        export(run, tmp_path / "out", "merged")


@pytest.mark.slow
def test_folders_of_others_are_never_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for is_overwritten in (False, True):
        with pytest.raises(UserError, match=r"export\.exists"):
            export(run, out, "merged", is_overwritten=is_overwritten)
    assert (out / "thesis.txt").exists()
    (out / "thesis.txt").unlink()
    export(run, out, "merged")
    with pytest.raises(UserError, match=r"export\.exists") as caught:
        export(run, out, "merged")
    assert "--overwrite" in str(caught.value)
    export(run, out, "merged", is_overwritten=True)


WRONG: list[dict[str, Any]] = [
    {"to": "mergd"},
    {"to": "merged", "dtype": "int7"},
    {"to": "merged", "quantization": "q8_0"},
    {"to": "merged", "shard_size": "much"},
    {"to": "gguf", "quantization": "q9"},
    {"to": "merged", "push": "me/x"},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_options_are_told_before_anything_is_loaded(
    options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"export\.(format|quantization|destination)"):
        run_export("no-such-run", ExportOptions(out=str(tmp_path / "out"), **options))


@pytest.mark.slow
def test_gone_data_is_no_obstacle(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "rows.jsonl").unlink()
    record = export(run, tmp_path / "out", "merged")
    assert "cannot be read any more" in " ".join(capsys.readouterr().out.split())
    assert record["verified"]["prompts"] == 4
