"""LLaMA-Factory's dataset_info.json: entries to sources, sources to samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data.columns import read_samples
from tunesmith.data.registry import read_registry
from tunesmith.data.sources import find_sources
from tunesmith.errors import DataError, Problem
from tunesmith.types import (
    Conversation,
    Message,
    Preference,
    Rated,
    Sample,
    SilentReporter,
    Text,
)

ASKED, ANSWER = Message("user", "q"), Message("assistant", "a")
Register = Callable[..., Path]


@pytest.fixture
def register(tmp_path: Path) -> Register:
    """Writes a registry with one entry, `mine`, and its data file."""

    def write(entry: dict[str, Any], rows: list[Any] | None = None) -> Path:
        if rows is not None:
            (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
        path = tmp_path / "dataset_info.json"
        entries = {"other": {"file_name": "other.json"}, "mine": entry}
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path

    return write


def source_of(path: Path) -> SourceConfig:
    (source,) = read_registry(path, ["mine"])
    assert source.name == "mine"
    return source


def sample_of(path: Path) -> Sample:
    data = DataConfig(registry=str(path), names=["mine"], validation=0)
    (source,) = find_sources(data, Path, SilentReporter()).train
    (sample,) = read_samples(source.config, source.files)
    assert not isinstance(sample, Problem), str(sample)
    return sample


def error_of(path: Path, name: str = "mine") -> DataError:
    with pytest.raises(DataError) as caught:
        read_registry(path, [name])
    return caught.value


# Entries as they are met


def test_alpaca(register: Register) -> None:
    path = register({"file_name": "mine.json"}, [{"instruction": "q", "input": "", "output": "a"}])
    assert source_of(path) == SourceConfig(
        path=str(path.parent / "mine.json"), name="mine", format="alpaca"
    )
    sample = sample_of(path)
    assert isinstance(sample, Conversation)
    assert sample.messages == (ASKED, ANSWER)


def test_alpaca_with_columns(register: Register) -> None:
    names = {"prompt": "p", "query": "x", "response": "r", "history": "h", "system": "s"}
    row = {"p": "q", "x": "", "r": "a", "h": [["b", "c"]], "s": "s", "instruction": "no"}
    sample = sample_of(register({"file_name": "mine.json", "columns": names}, [row]))
    assert isinstance(sample, Conversation)
    assert [message.content for message in sample.messages] == ["s", "b", "c", "q", "a"]


def test_sharegpt_with_tags(register: Register) -> None:
    entry = {
        "file_name": "mine.json",
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "tools": "functions"},
        "tags": {
            "role_tag": "who",
            "content_tag": "what",
            "user_tag": "U",
            "assistant_tag": "A",
            "observation_tag": "O",
            "function_tag": "F",
            "system_tag": "S",
        },
    }
    words = [("S", "s"), ("U", "q"), ("F", '{"name": "f"}'), ("O", "r"), ("A", "a")]
    row = {
        "chat": [{"who": who, "what": what} for who, what in words],
        "functions": '[{"name":"f"}]',
    }
    sample = sample_of(register(entry, [row]))
    assert isinstance(sample, Conversation)
    roles = [message.role for message in sample.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert len(sample.tools) == 1


@pytest.mark.parametrize("columns", [{}, {"messages": "messages"}])
def test_openai(register: Register, columns: dict[str, str]) -> None:
    entry = {"file_name": "mine.json", "formatting": "openai", "columns": columns}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sample = sample_of(register(entry, [{"messages": chat}]))
    assert isinstance(sample, Conversation)
    assert sample.messages == (ASKED, ANSWER)


@pytest.mark.parametrize(
    ("formatting", "columns", "row"),
    [
        ("alpaca", {}, {"instruction": "q", "chosen": "a", "rejected": "b"}),
        (
            "alpaca",
            {"prompt": "p", "query": "", "chosen": "good", "rejected": "bad"},
            {"p": "q", "good": "a", "bad": "b"},
        ),
        (
            "sharegpt",
            {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
        ),
    ],
)
def test_ranking(register: Register, formatting: str, columns: Any, row: Any) -> None:
    entry = {"file_name": "mine.json", "ranking": True, "formatting": formatting}
    sample = sample_of(register({**entry, "columns": columns}, [row]))
    assert isinstance(sample, Preference)
    assert (sample.prompt, sample.chosen) == ((ASKED,), (ANSWER,))


@pytest.mark.parametrize(
    ("formatting", "columns", "row"),
    [
        (
            "alpaca",
            {"prompt": "p", "response": "r", "kto_tag": "ok"},
            {"p": "q", "r": "a", "ok": True},
        ),
        (
            "sharegpt",
            {"messages": "messages", "kto_tag": "label"},
            {
                "messages": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a"}],
                "label": True,
            },
        ),
    ],
)
def test_ratings(register: Register, formatting: str, columns: Any, row: Any) -> None:
    entry = {"file_name": "mine.json", "formatting": formatting, "columns": columns}
    sample = sample_of(register(entry, [row]))
    assert isinstance(sample, Rated)
    assert sample.is_good
    assert sample.conversation.messages == (ASKED, ANSWER)


def test_pretraining(register: Register) -> None:
    entry = {"file_name": "mine.json", "columns": {"prompt": "body"}}
    sample = sample_of(register(entry, [{"body": "words", "text": "no"}]))
    assert isinstance(sample, Text)
    assert sample.text == "words"


# Places


def test_the_folder_in_place_of_the_file(register: Register) -> None:
    path = register({"file_name": "mine.json"}, [{"instruction": "q", "output": "a"}])
    assert read_registry(path.parent, ["mine"]) == read_registry(path, ["mine"])
    assert isinstance(sample_of(path.parent), Conversation)


def test_several_names_in_their_order(register: Register) -> None:
    path = register({"file_name": "mine.json"})
    assert [source.name for source in read_registry(path, ["mine", "other"])] == ["mine", "other"]
    assert read_registry(path, []) == []


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ({"hf_hub_url": "org/name"}, "hf:org/name"),
        ({"ms_hub_url": "org/name"}, "ms:org/name"),
        ({"hf_hub_url": "org/name", "ms_hub_url": "Org/name"}, "hf:org/name"),
    ],
)
def test_hubs(register: Register, entry: dict[str, str], path: str) -> None:
    found = source_of(register({**entry, "split": "train_sft", "file_sha1": "0" * 40}))
    assert (found.path, found.split, found.sha1) == (path, "train_sft", None)


def test_a_split_of_a_folder(register: Register, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        row = json.dumps({"instruction": name, "output": "a"})
        (tmp_path / "set" / f"{name}.jsonl").write_text(row, encoding="utf-8")
    sample = sample_of(register({"file_name": "set", "split": "test"}))
    assert isinstance(sample, Conversation)
    assert sample.messages[0].content == "test"


def test_a_split_of_a_file(register: Register) -> None:
    rows = [{"instruction": "q", "output": "a"}]
    assert isinstance(
        sample_of(register({"file_name": "mine.json", "split": "train"}, rows)), Conversation
    )
    error = error_of(register({"file_name": "mine.json", "split": "test"}, rows))
    assert (error.code, error.found) == ("data.registry", "the split 'test' of a single file")


def test_a_number_of_samples(register: Register) -> None:
    source = source_of(register({"file_name": "mine.json", "num_samples": 5}))
    assert (source.count, source.limit) == (5, None)


# Hashes


def test_sha1(register: Register) -> None:
    rows = [{"instruction": "q", "output": "a"}]
    digest = hashlib.sha1(json.dumps(rows).encode()).hexdigest()
    path = register({"file_name": "mine.json", "file_sha1": digest.upper()}, rows)
    assert isinstance(sample_of(path), Conversation)
    register({"file_name": "mine.json", "file_sha1": "0" * 40}, rows)
    with pytest.raises(DataError) as caught:
        sample_of(path)
    assert caught.value.code == "data.sha1"
    assert digest in caught.value.found
    assert "0" * 40 in caught.value.expected


# Mistakes


def test_an_unknown_name(register: Register) -> None:
    error = error_of(register({"file_name": "mine.json"}), "mime")
    assert error.code == "data.registry-name"
    assert "no entry 'mime'; there are other, mine" in error.found
    assert error.try_ == "did you mean mine?"
    assert error_of(register({"file_name": "mine.json"}), "xyz").try_ is None


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({}, "an entry with nothing"),
        ({"formatting": "sharegpt"}, "an entry with formatting"),
        ({"file_name": "a.json", "formatting": "chatml"}, "formatting 'chatml'"),
        ({"hf_hub_url": "org/name", "subset": "sft"}, "`subset`, a configuration of a hub"),
        ({"hf_hub_url": "org/name", "folder": "sft"}, "`folder`, a folder of a hub"),
        ({"script_url": "loader.py"}, "`script_url`, a loading script"),
        ({"cloud_file_name": "s3://a/b.json"}, "`cloud_file_name`, a file in cloud storage"),
        ({"om_hub_url": "org/name"}, "`om_hub_url`"),
        ({"file_name": "a.json", "columns": ["prompt"]}, "columns: ['prompt']"),
        ({"file_name": "a.json", "columns": {"promt": "q"}}, "`promt` among its columns"),
        ({"file_name": "a.json", "columns": {"messages": "q"}}, "`messages` among its columns"),
        ({"file_name": "a.json", "columns": {"images": "i"}}, "the column images"),
        ({"file_name": "a.json", "columns": {"prompt": 3, "query": "x"}}, "columns.instruction: 3"),
        ({"file_name": "a.json", "tags": {"user": "q"}}, "`user` among its tags"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples: 0"),
        ({"file_name": "a.json", "file_sha1": 7}, "file_sha1: 7"),
        ({"hf_hub_url": "org/name", "split": 3}, "split: 3"),
    ],
)
def test_mistakes_in_entries(register: Register, entry: dict[str, Any], found: str) -> None:
    path = register(entry)
    error = error_of(path)
    assert error.code == "data.registry"
    assert error.where == f"{path}:mine"
    assert found in error.found
    assert error.expected


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "No such file"),
        ("{", "broken JSON"),
        ("[]", "something else"),
        ('{"mine": 3}', "something else"),
        ('{"a": "\xff"}'.encode("latin-1"), "broken JSON"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, content: str | bytes | None, found: str) -> None:
    path = tmp_path / "dataset_info.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    for given in (path, tmp_path):
        error = error_of(given)
        assert (error.code, error.where) == ("data.registry", str(path))
        assert found in error.found


def test_a_data_file_that_is_not_there(register: Register) -> None:
    path = register({"file_name": "mine.json"})
    with pytest.raises(DataError) as caught:
        sample_of(path)
    assert caught.value.code == "data.missing-file"


def test_the_demo_data_of_llamafactory(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "llamafactory-demo"
    entries = {
        name: {"file_name": f"{folder}/{name}.json"} for name in ("identity", "alpaca_zh_demo")
    }
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    for source in read_registry(path, list(entries)):
        samples = list(read_samples(source, [Path(source.path)]))
        assert len(samples) > 50
        assert all(isinstance(sample, Conversation) for sample in samples)
