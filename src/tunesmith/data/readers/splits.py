"""Which split the files of a folder belong to, told by the names of folders and files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tunesmith.data.readers.data_file import format_ending

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}

WORDS = {word: split for split, words in SPLIT_WORDS.items() for word in words}

# The hub's shards: `train-00000-of-00002.parquet`, or `train_sft-00000-of-00002-<hash>.parquet`.
SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")


def split_of(path: Path, folder: Path) -> str | None:
    """The split that a file's name speaks of, or that of the folders it lies in.

    `train`, `training` (train), `validation`, `valid`, `val`, `dev`, `eval` (validation) and
    `test`, `testing` (test) count as whole words of a file's name, and as whole names of folders.
    Shards may name splits of their own that begin so (`train_sft`). Notes in Markdown have no split
    by their own name: `test.md` is a page about tests.
    """
    for name in path.relative_to(folder).parts[:-1]:
        if name.lower() in WORDS:
            return WORDS[name.lower()]
    if format_ending(path) == ".md":
        return None
    name = path.name.lower()
    shard = SHARD.match(name)
    if shard and shard["split"] not in WORDS and shard["split"].split("_")[0] in WORDS:
        return shard["split"]
    words = re.split(r"[^a-z]+", name.split(".")[0] if shard else name)
    return next((WORDS[word] for word in words if word in WORDS), None)


def by_split(files: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """The files of each split; {} if no name speaks of one.

    Files without a split in their names are those to train on where no other is, and left out
    where some are named so.
    """
    named: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in files:
        split = split_of(path, folder)
        (others if split is None else named.setdefault(split, [])).append(path)
    if named and others and not any(name.startswith("train") for name in named):
        named["train"] = others
    return dict(sorted(named.items(), key=lambda item: _rank(item[0])))


def _rank(split: str) -> tuple[int, str]:
    order = list(SPLIT_WORDS)
    word = split.split("_")[0]
    return order.index(WORDS[word]) if word in WORDS else len(order), split
