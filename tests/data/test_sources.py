"""From what a recipe names to files, and what is said of those that are left out."""

import json
from pathlib import Path

import pytest

from tunesmith.config.recipe import DataConfig
from tunesmith.data.sources import Sources, find_sources
from tunesmith.types import SilentReporter

ROW = json.dumps({"prompt": "q", "completion": "a"}) + "\n"


class Notes(SilentReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def found(folder: Path, reporter: Notes, **data: object) -> Sources:
    config = DataConfig.model_validate({"train": str(folder), **data})
    return find_sources(config, Path, reporter)


@pytest.mark.parametrize(
    ("names", "used", "said"),
    [
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"], []),
        (
            ["extra.jsonl", "train.jsonl"],
            ["train.jsonl"],
            ["rows: 1 of 2 files are trained on, those of split train"],
        ),
        (
            ["test.jsonl", "train.jsonl", "validation.jsonl"],
            ["train.jsonl"],
            ["rows: 1 of 3 files are trained on, those of split train"],
        ),
    ],
)
def test_files_left_out_are_said(
    tmp_path: Path, names: list[str], used: list[str], said: list[str]
) -> None:
    folder, notes = tmp_path / "rows", Notes()
    folder.mkdir()
    for name in names:
        (folder / name).write_text(ROW)
    sources = found(folder, notes)
    assert [file.name for file in sources.train[0].files] == used
    assert notes.lines == said
    expected = ["validation.jsonl"] if "validation.jsonl" in names else []
    assert [file.name for source in sources.validation for file in source.files] == expected
    assert found(folder, notes, validation=0).validation == ()


def test_splits_that_a_card_declares(tmp_path: Path) -> None:
    """The card of a data set from a hub decides, also where patterns take in folders and itself."""
    header = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: part*/*\n  - split: val\n    path: '*'\n---\n"
    )
    (tmp_path / "README.md").write_text(header)
    (tmp_path / "part1").mkdir()
    (tmp_path / "part1" / "x.jsonl").write_text(ROW)
    (tmp_path / "held.jsonl").write_text(ROW)
    sources = found(tmp_path, Notes())
    assert [file.name for file in sources.train[0].files] == ["x.jsonl"]
    assert [file.name for source in sources.validation for file in source.files] == ["held.jsonl"]
