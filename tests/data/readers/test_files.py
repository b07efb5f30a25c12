"""Folders: which files are data, and which split they belong to."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from tunesmith.data.readers import Meter, find_files, named_splits, read_rows, total_bytes
from tunesmith.errors import DataError

MINDRECORD = Path(__file__).parents[1] / "mindrecord"


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"a": 1}')
    return folder


def found(folder: Path, split: str | None = None) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_files(folder, split=split)]


def refusal(path: Path, split: str | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        find_files(path, split=split)
    return caught.value


def test_a_file_is_itself(tmp_path: Path) -> None:
    path = tree(tmp_path, "test.docx") / "test.docx"
    assert find_files(path) == [path]
    assert named_splits(path) == {}
    assert refusal(path, "test").code == "data.split"


def test_a_missing_path(tmp_path: Path) -> None:
    error = refusal(tree(tmp_path, "data.jsonl") / "dta.jsonl")
    assert (error.code, error.try_) == (
        "data.missing-file",
        f"did you mean {tmp_path / 'data.jsonl'}?",
    )


def test_what_is_data(tmp_path: Path) -> None:
    data = ["a.jsonl", "b/c/d.csv.gz", "b/x.JSON", "e.parquet", "f.tsv.zst", "g.md", "h.xlsx"]
    others = [
        *("README.md", "readme_zh.txt", "LICENSE.txt", ".hidden.json", ".git/a.json"),
        *("dataset_info.json", "b/dataset_infos.json", "__MACOSX/a.json", "a.png", "a.py"),
        *("a.db", "a.mindrecord.db", "h.xlsx.gz", "~$h.xlsx"),
    ]
    assert found(tree(tmp_path, *data, *others)) == sorted(data, key=Path)
    assert named_splits(tmp_path) == {}
    assert total_bytes(find_files(tmp_path)) == 8 * len(data)


def test_no_data(tmp_path: Path) -> None:
    error = refusal(tree(tmp_path, "README.md", "a.png"))
    assert error.code == "data.empty-folder"
    assert ".parquet" in error.expected


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("a_train.csv", "a_dev.csv", "a_test.csv"),
        ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"),
        ("data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet", "test.parquet"),
        ("Train/a.md", "VAL/b.md", "Test/c.md"),
        ("train/a.arrow", "eval/a.arrow", "test/a.arrow"),
        ("my-training-set.json.gz", "my-evaluation-set.json.gz", "testing.json.gz"),
    ],
)
def test_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    tree(tmp_path, *names, "notes.png")
    train, validation, test = names
    assert {split: [str(p) for p in paths] for split, paths in named_splits(tmp_path).items()} == {
        "train": [str(tmp_path / train)],
        "validation": [str(tmp_path / validation)],
        "test": [str(tmp_path / test)],
    }
    assert list(named_splits(tmp_path)) == ["train", "validation", "test"]
    assert found(tmp_path) == found(tmp_path, "train") == [train]
    assert found(tmp_path, "test") == [test]
    assert found(tmp_path, "dev") == found(tmp_path, "validation") == [validation]
    error = refusal(tmp_path, "extra")
    assert (error.code, error.found) == ("data.split", "no split `extra`")
    assert error.expected == "one of: train, validation, test"


def test_shards_in_order(tmp_path: Path) -> None:
    names = [f"train-{n:05}-of-00012.parquet" for n in range(12)]
    assert found(tree(tmp_path, *reversed(names), "test-00000-of-00001.parquet")) == names


def test_splits_of_their_own_names(tmp_path: Path) -> None:
    names = [f"data/{split}-00000-of-00001-abc.parquet" for split in ("train_sft", "test_sft")]
    tree(tmp_path, *names, "data/train_gen-00000-of-00001-abc.parquet")
    assert list(named_splits(tmp_path)) == ["train_gen", "train_sft", "test_sft"]
    assert found(tmp_path, "train_sft") == names[:1]
    error = refusal(tmp_path)
    assert error.expected == "one of: train_gen, train_sft, test_sft"


def test_files_beside_a_test_split_are_for_training(tmp_path: Path) -> None:
    tree(tmp_path, "a.jsonl", "b.jsonl", "test.jsonl")
    assert found(tmp_path) == ["a.jsonl", "b.jsonl"]
    tree(tmp_path, "train.jsonl")
    assert found(tmp_path) == ["train.jsonl"]


def test_pages_about_tests_are_no_tests(tmp_path: Path) -> None:
    assert found(tree(tmp_path, "test.md", "dev.md", "a.md")) == ["a.md", "dev.md", "test.md"]
    assert "no `split`" in refusal(tmp_path, "test").expected


def test_words_inside_words_are_no_splits(tmp_path: Path) -> None:
    names = ["attest.json", "contrain.json", "devices.json", "values.json"]
    assert found(tree(tmp_path, *names)) == names
    assert named_splits(tmp_path) == {}


def save_to_disk(folder: Path, rows: list[dict[str, int]]) -> None:
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    name = "data-00000-of-00001.arrow"
    with (
        pa.OSFile(str(folder / name), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    (folder / "cache-0123.arrow").write_bytes(b"of a map that was run")
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name}], "_fingerprint": "x", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def test_a_data_set_that_was_saved(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "d", [{"n": 1}, {"n": 2}])
    (path,) = find_files(tmp_path / "d")
    assert [row.value for row in read_rows(path)] == [{"n": 1}, {"n": 2}]


def test_splits_that_were_saved(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        save_to_disk(tmp_path / split, [{"n": number}])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for number, split in enumerate((None, "test")):
        (path,) = find_files(tmp_path, split=split)
        assert [row.value for row in read_rows(path)] == [{"n": number}]


def test_the_shards_of_a_mindrecord_set_stand_together(tmp_path: Path) -> None:
    shards = [MINDRECORD / f"llama_sft.mindrecord{n}" for n in range(3)]
    for path in (MINDRECORD / "llama_sft.mindrecord", shards[1]):
        assert find_files(path) == shards
    files = find_files(MINDRECORD)
    assert files[1:4] == [MINDRECORD / "expected_rows.json", *shards[:2]]
    assert len(files) == len(set(files)) == 10
    meter = Meter()
    num_rows = [len(list(read_rows(path, meter=meter))) for path in shards]
    assert min(num_rows) > 0
    assert meter.bytes_read == total_bytes(shards)


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree(tmp_path, "d/a.json") / "d"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert refusal(path / "a.json").code == "data.unreadable"

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    error = refusal(path)
    assert (error.code, error.where) == ("data.unreadable", str(path))


def test_links(tmp_path: Path) -> None:
    tree(tmp_path / "blobs", "123.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").symlink_to(tmp_path / "blobs" / "123.json")
    (tmp_path / "data" / "loop").symlink_to(tmp_path)
    assert found(tmp_path / "data") == ["a.json"]
    (tmp_path / "data" / "b.json").symlink_to(tmp_path / "nothing")
    error = refusal(tmp_path / "data")
    assert (error.code, error.found) == ("data.missing-file", "a link to nothing")


def test_a_broken_state_is_passed_over(tmp_path: Path) -> None:
    tree(tmp_path, "a.arrow", "state.json")
    assert found(tmp_path) == ["a.arrow"]
