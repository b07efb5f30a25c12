"""Which files a path stands for: one file, a folder of them, or one split of a folder."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tunesmith.data.readers.data_file import format_ending
from tunesmith.data.readers.splits import WORDS, by_split
from tunesmith.errors import DataError, Problem

TEXT_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".md")
"""Formats that may also be packed as .gz or .zst."""

TABLE_ENDINGS = (".xlsx", ".xlsm", ".parquet", ".arrow")

MINDRECORD = re.compile(r"\.mindrecord\d*$", re.IGNORECASE)

HIDDEN = (".", "__", "~$")
"""How names begin of what programs leave behind: `__MACOSX`, `~$book.xlsx` of an open workbook."""

# What lies beside data: the files in which `datasets` and LLaMA-Factory describe it, and papers.
DESCRIPTIONS = frozenset(
    ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
)
PAPERS = re.compile(r"(readme|licen[sc]e)([^a-z]|$)", re.IGNORECASE)


def find_files(path: Path, *, split: str | None = None) -> list[Path]:
    """The data files that a path stands for, in sorted order.

    A file stands for itself, a shard of a MindRecord set for all shards. A folder stands for the
    data files in it and below, whatever their formats; hidden files, READMEs, licenses and
    descriptions are left out, and of a folder that `datasets` has saved only its own tables are
    taken. Where names speak of splits (see `splits.split_of`), one split is taken: `train` if none
    is asked for.

    Raises:
        DataError: nothing there (`data.missing-file`), no data file in the folder
            (`data.empty-folder`), or no such split (`data.split`).
    """
    if not path.is_dir():
        return _files_of_file(path, split)
    files = all_files(path)
    splits = by_split(files, path)
    if not splits and split is None:
        return files
    wanted = "train" if split is None else WORDS.get(split, split)
    if wanted in splits:
        return splits[wanted]
    expected = f"one of: {', '.join(splits)}" if splits else "no `split`, as no name speaks of one"
    raise DataError([Problem(str(path), "data.split", f"no split `{wanted}`", expected)])


def named_splits(path: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder (train, validation, test); {} if it has none."""
    return by_split(all_files(path), path) if path.is_dir() else {}


def total_bytes(files: Iterable[Path]) -> int:
    """What a Meter comes to when all of the files have been read."""
    return sum(file.stat().st_size for file in files)


def is_mindrecord(path: Path) -> bool:
    """Whether a name is that of a MindRecord shard, or of what its shards have in common."""
    return bool(MINDRECORD.search(path.name))


def check_file(path: Path) -> None:
    """Refuses what is no file that can be read.

    Raises:
        DataError: missing, a folder, without permission or empty.
    """
    if path.is_dir():
        raise _error(path, "data.not-a-file", "a folder", "a data file")
    if not path.exists():
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        try_ = f"did you mean {path.parent / near[0]}?" if near else None
        raise _error(path, "data.missing-file", "no such file", "a data file", try_)
    if not os.access(path, os.R_OK):
        raise _error(path, "data.unreadable", "a file that may not be read", "read permission")
    if path.stat().st_size == 0:
        raise _error(path, "data.empty-file", "0 bytes", "at least one row")


def _error(path: Path, code: str, found: str, expected: str, try_: str | None = None) -> DataError:
    return DataError([Problem(str(path), code, found, expected)], try_=try_)


def _files_of_file(path: Path, split: str | None) -> list[Path]:
    if split is not None:
        found = f"the split `{split}` of a single file"
        raise _error(path, "data.split", found, "a folder, or no `split`")
    if is_mindrecord(path):
        return _mindrecord_set(path)
    check_file(path)
    return [path]


def all_files(folder: Path) -> list[Path]:
    """Every data file of a folder, whatever its split."""
    files: list[Path] = []
    for path in sorted(_walk(folder)):
        if is_mindrecord(path):
            files += [shard for shard in _mindrecord_set(path) if shard not in files]
        elif path.exists():
            files.append(path)
        else:
            raise _error(path, "data.missing-file", "a link to nothing", "a data file")
    if not files:
        endings = " ".join((*TEXT_ENDINGS, *TABLE_ENDINGS, ".mindrecord"))
        raise _error(folder, "data.empty-folder", "no data file", f"files that end in {endings}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Every data file below a folder, in no order."""
    saved = _saved_tables(folder)
    if saved:
        yield from saved
        return
    try:
        items = list(folder.iterdir())
    except PermissionError:
        found = "a folder that may not be read"
        raise _error(folder, "data.unreadable", found, "read permission") from None
    for item in items:
        if item.name.startswith(HIDDEN):
            continue
        if item.is_dir():
            is_loop = item.is_symlink() and folder.resolve().is_relative_to(item.resolve())
            yield from () if is_loop else _walk(item)
        elif _is_data(item):
            yield item


def _is_data(path: Path) -> bool:
    if path.name.lower() in DESCRIPTIONS or PAPERS.match(path.name):
        return False
    is_text = format_ending(path) in TEXT_ENDINGS
    return is_text or path.suffix.lower() in TABLE_ENDINGS or is_mindrecord(path)


def _saved_tables(folder: Path) -> list[Path]:
    """The tables of a folder that `datasets` has saved, without those of its cache."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / str(table["filename"]) for table in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _mindrecord_set(path: Path) -> list[Path]:
    from tunesmith.data.readers.mindrecord import mindrecord_shards

    return mindrecord_shards(path)
