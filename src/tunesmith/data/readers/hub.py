"""Data sets on the Hugging Face hub (`hf:org/name`) and on ModelScope (`ms:org/name`).

Both are fetched into a cache, only the files that a reader knows. A copy in the cache is used when
the hub cannot be reached, or when `HF_HUB_OFFLINE` forbids to ask it. Environment variables that
are respected: `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_HOME` of huggingface_hub;
`MODELSCOPE_ENDPOINT`, `MODELSCOPE_DOMAIN` and `MODELSCOPE_API_TOKEN` of ModelScope.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast
from urllib.parse import quote

import yaml

from tunesmith.data.readers.modelscope import (
    DEFAULT_REVISION,
    DatasetRepository,
)
from tunesmith.errors import DataError, DiskError, Problem
from tunesmith.io.atomic import atomic_directory
from tunesmith.io.cache import cache_folder
from tunesmith.io.redact import redact
from tunesmith.io.retry import NoAnswerError
from tunesmith.io.snapshot import (
    DISK_ERRORS,
    HubRepository,
    explain,
    fetch_snapshot,
    is_offline,
    offline_explanation,
)
from tunesmith.types import Reporter

DATA_PATTERNS = [
    *("*.json", "*.jsonl", "*.ndjson", "*.csv", "*.tsv", "*.txt", "*.md", "*.gz", "*.zst"),
    *("*.parquet", "*.arrow", "*.xlsx", "*.xlsm"),
    *("*.mindrecord", "*.mindrecord[0-9]", "*.mindrecord[0-9][0-9]"),
]
"""Files that are fetched; the README and dataset_info.json are among them."""

NOT_DATA = ("readme.md", "dataset_info.json", "dataset_infos.json", "license.txt", "license.md")
"""Files that match the patterns and yet hold no rows."""

MAX_CARD_CHARACTERS = 4 << 20

_PART = r"\w(?:[\w.-]*\w)?"
_ID = re.compile(
    rf"(?P<hub>hf|ms):(?P<name>{_PART}/{_PART})"
    r"(?:@(?P<revision>\w[\w.+-]*(?:/\w[\w.+-]*)*))?(?::(?P<split>\w[\w.-]*))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class HubId:
    """A data set on a hub; without a revision its main branch, without a split all of them."""

    hub: Literal["hf", "ms"]
    name: str
    revision: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        split = f":{self.split}" if self.split else ""
        return f"{self.hub}:{self.name}{revision}{split}"


def parse_hub_id(text: str) -> HubId | None:
    """The id, or None if the text does not start with `hf:` or `ms:`.

    Raises:
        DataError: it does, and goes on in no form that is known (`data.hub-id`).
    """
    if not text.startswith(("hf:", "ms:")):
        return None
    match = _ID.fullmatch(text)
    name = match["name"] if match else ""
    if match is None or ".." in text or (match["hub"] == "hf" and "--" in name):
        raise _id_error(text)
    hub: Literal["hf", "ms"] = "hf" if match["hub"] == "hf" else "ms"
    return HubId(hub, name, match["revision"], match["split"])


def fetch_dataset(hub_id: HubId, reporter: Reporter) -> Path:
    """The local folder with the data files of a data set, downloaded if the cache has no copy.

    Raises:
        DataError: it does not exist, is private or gated, has no data files, or the hub cannot be
            reached and there is no copy (`data.hub`), or its name is impossible (`data.hub-id`).
        DiskError: there is no room for it (`disk.full`), or no right to write (`disk.write`).
    """
    fetch = _fetch_from_huggingface if hub_id.hub == "hf" else _fetch_from_modelscope
    folder = fetch(hub_id, reporter)
    names = {path.name for path in folder.rglob("*")}
    if not any(_matches(name) and name.lower() not in NOT_DATA for name in names):
        raise _error(
            hub_id,
            "a data set without data files",
            f"files that are called {', '.join(DATA_PATTERNS)}",
            "convert its files to one of these, or name another data set",
        )
    return folder


def declared_splits(folder: Path) -> dict[str, list[str]]:
    """Split names with their glob patterns, as the header of the folder's README.md has them.

    Of several configurations the one marked `default`, else the one named so, else the first is
    taken. A README without header, or with one that declares no files, gives no splits.
    """
    configs = _header_of_card(folder / "README.md").get("configs")
    usable = [each for each in _list(configs) if isinstance(each, dict) and each.get("data_files")]
    marked = [each for each in usable if each.get("default") is True]
    named = [each for each in usable if each.get("config_name") == "default"]
    for config in [*marked, *named, *usable]:
        return _splits_of_config(config)
    return {}


# Errors


def _error(hub_id: HubId, found: str, expected: str, try_: str) -> DataError:
    # Addresses and answers may hold credentials: of an endpoint, of a proxy, of a signed address.
    problem = Problem(str(hub_id), "data.hub", redact(found), expected)
    return DataError([problem], try_=redact(try_))


def _id_error(text: str) -> DataError:
    expected = "hf:org/name or ms:org/name, then @revision and :split if wanted"
    try_ = "write for example hf:org/name@main:train"
    return DataError([Problem(text, "data.hub-id", "a name in another form", expected)], try_=try_)


def _offline_error(hub_id: HubId) -> DataError:
    said = offline_explanation("data set")
    return _error(hub_id, said.found, said.expected, said.try_)


def _matches(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in DATA_PATTERNS)


# Hugging Face


def _fetch_from_huggingface(hub_id: HubId, reporter: Reporter) -> Path:
    repository = HubRepository(hub_id.name, "dataset", hub_id.revision)
    try:
        with reporter.waiting(f"downloading {hub_id}"):
            return fetch_snapshot(repository, DATA_PATTERNS)
    except NoAnswerError as failure:
        raise _huggingface_error(hub_id, repository, failure) from failure.__cause__


def _huggingface_error(
    hub_id: HubId, repository: HubRepository, failure: NoAnswerError
) -> DataError | DiskError:
    from huggingface_hub.errors import HFValidationError

    error, said = failure.__cause__, explain(repository, failure)
    if isinstance(error, HFValidationError):
        return _id_error(str(hub_id))
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        code = "disk.full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "disk.write"
        where = str(hub_id)
        return DiskError(code, where, found=said.found, expected=said.expected, try_=said.try_)
    return _error(hub_id, said.found, said.expected, said.try_)


# ModelScope


def _fetch_from_modelscope(hub_id: HubId, reporter: Reporter) -> Path:
    repository = DatasetRepository(hub_id.name, hub_id.revision or DEFAULT_REVISION)
    home = cache_folder("datasets") / "ms" / hub_id.name.replace("/", "--")
    home = home / quote(repository.revision, safe="")
    copies = [each for each in home.glob("*") if not each.name.startswith(".")]
    newest = max(copies, key=lambda copy: copy.stat().st_mtime, default=None)
    if is_offline():
        if newest is None:
            raise _offline_error(hub_id)
        return newest
    try:
        return _current_copy(hub_id, repository, home, reporter)
    except NoAnswerError as error:
        if error.may_pass and newest is not None:
            reason = redact(str(error))
            reporter.note(f"{hub_id}: no answer ({reason}), so the copy in the cache is used")
            return newest
        raise _modelscope_error(hub_id, repository.address, error) from error


def _current_copy(
    hub_id: HubId, repository: DatasetRepository, home: Path, reporter: Reporter
) -> Path:
    """The folder of what is listed now; named by a digest of the listing, it never changes."""
    files = [file for file in repository.files() if _matches(file.path)]
    listing = json.dumps([(file.path, file.size, file.sha256) for file in files])
    folder = home / hashlib.sha256(listing.encode()).hexdigest()[:16]
    if folder.is_dir():
        os.utime(folder)  # the copy that was current last is the one to use offline
        return folder
    with atomic_directory(folder) as temporary:
        for file in reporter.track(f"downloading {hub_id}", files, len(files)):
            repository.download(file, temporary / file.path)
    return folder


def _modelscope_error(hub_id: HubId, address: str, error: NoAnswerError) -> DataError:
    if error.status in (401, 403):
        found = f"a private or gated data set: {address} answers {error}"
        try_ = "ask for access on its page, then set MODELSCOPE_API_TOKEN"
        return _error(hub_id, found, "a data set that may be read", try_)
    if error.status == 404:
        revision = f" with the revision {hub_id.revision}" if hub_id.revision else ""
        found = f"no data set {address}{revision}, or a private one: {error}"
        try_ = "check the spelling; for a private one set MODELSCOPE_API_TOKEN"
        return _error(hub_id, found, "a data set that may be read", try_)
    return _error(
        hub_id,
        f"no usable answer from {address}: {error}",
        "the data set, or a copy in the cache",
        "check the network or set MODELSCOPE_ENDPOINT to a mirror; or copy the data set to this "
        "machine and name its folder",
    )


# The header of README.md


def _header_of_card(path: Path) -> dict[str, Any]:
    """The YAML between the first two `---` lines; a text without them is a README all the same."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(MAX_CARD_CHARACTERS)
    match = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*(?:\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        header = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", header) if isinstance(header, dict) else {}


def _splits_of_config(config: dict[str, Any]) -> dict[str, list[str]]:
    files = config["data_files"]
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    elif not any(isinstance(each, dict) for each in _list(files)):
        files = [{"split": "train", "path": files}]
    folder = str(config.get("data_dir") or "")
    splits: dict[str, list[str]] = {}
    for each in _list(files):
        if isinstance(each, dict):
            paths = [str(PurePosixPath(folder, str(path))) for path in _list(each.get("path"))]
            inside = [path for path in paths if _is_inside(path)]
            splits.setdefault(str(each.get("split", "train")), []).extend(inside)
    return {split: paths for split, paths in splits.items() if paths}


def _is_inside(pattern: str) -> bool:
    """Whether a pattern stays in the data set's folder; addresses and absolute paths do not."""
    return not pattern.startswith("/") and ".." not in pattern.split("/") and ":/" not in pattern


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return cast("list[Any]", value) if isinstance(value, list) else [value]
