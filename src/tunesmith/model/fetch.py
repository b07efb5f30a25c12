"""Fetches from the hub what a model's view may show: settings, tokenizer data, safetensors files.

Pickles and Python files are not even downloaded.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.io.safeload import ADAPTER_WEIGHTS, DATA_SUFFIXES, INDEX, WEIGHTS, shard_names
from tunesmith.io.snapshot import OF_OTHER_JSON, HubRepository, fetch_snapshot

# `*` matches slashes, too: what lies deeper, such as other formats in onnx/, stays away.
SETTINGS = [f"*{suffix}" for suffix in DATA_SUFFIXES]
DEEPER = [f"*/*{suffix}" for suffix in DATA_SUFFIXES if suffix != ".jinja"]


def fetch_model(model_id: str, revision: str | None, *, with_weights: bool) -> Path:
    """The folder in the hub's cache with a model's files, downloaded where they are missing.

    Its name is the commit. A copy in the cache serves when the hub cannot be reached.

    Raises:
        NoAnswerError: they cannot be had.
        ModelError: the index of the weights names other files (`model.bad-index`).
    """
    folder = fetch_snapshot(HubRepository(model_id, "model", revision), SETTINGS, ignored=DEEPER)
    if with_weights:
        index = folder / INDEX
        names = shard_names(index) if index.exists() else [WEIGHTS, ADAPTER_WEIGHTS]
        # The same commit: the branch may have moved since.
        exact = HubRepository(model_id, "model", folder.name)
        fetch_snapshot(exact, names, ignored=DEEPER, shows_progress=True)
    return folder


def list_files(model_id: str, revision: str | None) -> list[str]:
    """The names of a hub model's files; none if the hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        return HfApi().list_repo_files(model_id, revision=revision)
    except (HTTPError, OSError, ValueError, *OF_OTHER_JSON):
        return []
