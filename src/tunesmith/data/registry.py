"""LLaMA-Factory's dataset_info.json, read as it is: its entries become sources of ours."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from tunesmith.config.recipe import SourceConfig
from tunesmith.errors import DataError, Problem

ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
}
"""LLaMA-Factory's word for a column -> ours; the entry gives the name in the file."""

CHAT_COLUMNS = {
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
}

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function",
    "system_tag": "system",
}

MEDIA = ("images", "videos", "audios")

REFUSED = {
    "subset": "a configuration of a hub data set; download it and name its files in `file_name`",
    "folder": "a folder of a hub data set; download it and name it in `file_name`",
    "script_url": "a loading script, which would run somebody's code; name its data files instead",
    "cloud_file_name": "a file in cloud storage; copy it to this machine and name it `file_name`",
    "om_hub_url": "a data set of the OpenMind hub; name its files in `file_name`",
}
"""Keys that change what is read, and what to do in their place."""

HUBS = {"hf_hub_url": "hf", "ms_hub_url": "ms"}


def read_registry(path: Path, names: Sequence[str]) -> list[SourceConfig]:
    """The sources behind entries of a dataset_info.json; paths are relative to its folder.

    Args:
        path: the file, or the folder that it lies in.
        names: the entries wanted.

    Raises:
        DataError: the file is missing or broken (`data.registry`), or has no such entry
            (`data.registry-name`), or an entry asks for what is not read.
    """
    if path.is_dir():
        path = path / "dataset_info.json"
    entries = _load(path)
    sources: list[SourceConfig] = []
    for name in names:
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1)
            found = f"no entry {name!r}; there are {', '.join(list(entries)[:20])}"
            raise DataError(
                [Problem(str(path), "data.registry-name", found, "the name of an entry")],
                try_=f"did you mean {near[0]}?" if near else None,
            )
        sources.append(_Entry(path, name, entries[name]).source())
    return sources


def _load(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _error(path, str(error.strerror), "LLaMA-Factory's dataset_info.json") from None
    except (ValueError, RecursionError) as error:
        raise _error(path, f"broken JSON: {error}", "an object of entries by name") from None
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise _error(path, "something else", "an object of entries by name")
    return cast("dict[str, dict[str, Any]]", entries)


def _error(where: Path | str, found: str, expected: str) -> DataError:
    return DataError([Problem(str(where), "data.registry", found, expected)])


class _Entry:
    """One entry of the file."""

    def __init__(self, path: Path, name: str, values: Mapping[str, Any]) -> None:
        self.folder = path.parent
        self.where = f"{path}:{name}"
        self.name = name
        self.values = values

    def source(self) -> SourceConfig:
        """The source that the entry describes."""
        formatting = self.values.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt", "openai"):
            raise _error(self.where, f"formatting {formatting!r}", "alpaca, sharegpt or openai")
        for key, meaning in REFUSED.items():
            if self.values.get(key):
                raise _error(self.where, f"`{key}`, {meaning}", "an entry without it")
        path = self._place()
        is_local = "file_name" in self.values
        shape = self._shape(formatting)
        try:
            return SourceConfig.model_validate(
                {
                    "path": path,
                    "name": self.name,
                    "format": shape,
                    "columns": self._columns(formatting, shape),
                    "tags": self._tags(),
                    "split": self._split(path, is_local=is_local),
                    # So many rows of an epoch, at random, rather than the first of the file.
                    "count": self.values.get("num_samples"),
                    "sha1": self._sha1() if is_local else None,
                }
            )
        except ValidationError as error:
            first = error.errors()[0]
            key = {"count": "num_samples", "sha1": "file_sha1"}.get(str(first["loc"][0]))
            key = key or ".".join(str(part) for part in first["loc"])
            found = f"{key}: {first['input']!r}"
            raise _error(self.where, found, str(first["msg"]).lower()) from None

    def _place(self) -> str:
        if "file_name" in self.values:
            return str(self.folder / str(self.values["file_name"]))
        for key, hub in HUBS.items():
            if key in self.values:
                return f"{hub}:{self.values[key]}"
        found = f"an entry with {', '.join(self.values) or 'nothing'}"
        raise _error(self.where, found, "file_name, hf_hub_url or ms_hub_url")

    def _split(self, path: str, *, is_local: bool) -> str | None:
        split: str | None = self.values.get("split")
        if is_local and not Path(path).is_dir():
            if split not in (None, "train"):
                found = f"the split {split!r} of a single file"
                raise _error(self.where, found, "a folder with splits, or no `split`")
            return None
        return split

    def _sha1(self) -> object:
        sha1: object = self.values.get("file_sha1")
        return sha1.lower() if isinstance(sha1, str) else sha1

    def _shape(self, formatting: str) -> str:
        columns = self._object("columns")
        if self.values.get("ranking"):
            return "preference"
        if "kto_tag" in columns:
            return "kto"
        if formatting == "alpaca":
            # A pretraining entry maps its one column as the prompt and names no answer.
            return "text" if set(columns) == {"prompt"} else "alpaca"
        return "sharegpt" if formatting == "sharegpt" else "messages"

    def _columns(self, formatting: str, shape: str) -> dict[str, str]:
        given = self._object("columns")
        table = ALPACA_COLUMNS if formatting == "alpaca" else CHAT_COLUMNS
        self._check(given, (*table, *MEDIA), "columns")
        for key in MEDIA:
            if given.get(key):
                found = f"the column {key}, whose media are not read"
                raise _error(self.where, found, "a data set of texts")
        if shape == "text":
            return {"text": given["prompt"]}
        columns = {table[key]: actual for key, actual in given.items() if actual}
        if shape == "messages" and "conversations" in columns:
            columns["messages"] = columns.pop("conversations")
        return columns

    def _tags(self) -> dict[str, str]:
        given = self._object("tags")
        self._check(given, TAGS, "tags")
        return {TAGS[key]: value for key, value in given.items() if value}

    def _object(self, key: str) -> dict[str, str]:
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise _error(self.where, f"{key}: {value!r}", "an object of names")
        return cast("dict[str, str]", value)

    def _check(self, given: Iterable[str], known: Iterable[str], what: str) -> None:
        for key in given:
            if key not in known:
                found = f"`{key}` among its {what}"
                raise _error(self.where, found, f"one of: {', '.join(known)}")
