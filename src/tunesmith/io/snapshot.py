"""Repositories of the Hugging Face hub, fetched into its cache: tried again, and checked.

huggingface_hub goes on behind what has come, and falls back on a copy in the cache. Added here:
further attempts where it has none (a reset in the middle of a file, 503 for a listing), a look at
the hashes of what came, and errors in plain words. Not covered: a server that breaks off again and
again without ranges, to which huggingface_hub 2.4 goes back for ever.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tunesmith.io.redact import redact
from tunesmith.io.retry import NoAnswerError, retried

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
CLOCK_SECONDS = 2.0
"""What clocks of file systems may be off."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
OF_OTHER_JSON = (KeyError, TypeError, AttributeError, AssertionError)
"""What huggingface_hub raises when a server that is no hub answers with some JSON."""
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A model or a data set on the Hugging Face hub; without a revision its main branch."""

    name: str
    kind: Literal["model", "dataset"]
    revision: str | None = None

    @property
    def endpoint(self) -> str:
        """The hub's address; read here too, as huggingface_hub reads it only at its import."""
        from huggingface_hub import constants

        return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    @property
    def page(self) -> str:
        """Where a person finds it."""
        folder = "datasets/" if self.kind == "dataset" else ""
        return f"{self.endpoint}/{folder}{self.name}"

    @property
    def noun(self) -> str:
        """What errors call it."""
        return "data set" if self.kind == "dataset" else "model"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an error says; no secrets are in it."""

    found: str
    expected: str
    try_: str


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def fetch_snapshot(
    repository: HubRepository,
    names: Sequence[str],
    *,
    ignored: Sequence[str] = (),
    shows_progress: bool = False,
) -> Path:
    """The folder in the hub's cache with those files of a repository, downloaded where missing.

    Its name is the commit. A copy in the cache serves when the hub cannot be reached.

    Args:
        repository: whose files.
        names: patterns of those that are wanted.
        ignored: patterns of those that are not wanted all the same.
        shows_progress: draw huggingface_hub's own bars.

    Raises:
        NoAnswerError: they cannot be had; its cause is what huggingface_hub raised.
    """
    how = {
        "allow_patterns": list(names),
        "ignore_patterns": list(ignored) or None,
        "tqdm_class": None if shows_progress else _silent_bar(),
    }
    return retried(partial(_attempt, repository, how))


def _attempt(repository: HubRepository, how: Mapping[str, Any]) -> Path:
    """One attempt; what has come stays in the cache, and the next one goes on behind it."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError

    begun = time.time()
    try:
        folder = snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            endpoint=repository.endpoint,
            local_files_only=is_offline() or constants.is_offline_mode(),
            **how,
        )
    except (HTTPError, OSError, ValueError, RuntimeError, *OF_OTHER_JSON) as error:
        reason = _first_line(error.__cause__ or error)
        raise NoAnswerError(reason, may_pass=_may_pass(error)) from error
    _refuse_altered(Path(folder), begun)
    return Path(folder)


def _may_pass(error: Exception) -> bool:
    """Whether the network failed, or a server that has too much to do, or a file came in part."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return isinstance(error.__cause__, Exception) and _may_pass(error.__cause__)
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    is_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
    return not is_disk and (
        isinstance(error, errors.HTTPError) or "Consistency check failed" in str(error)
    )


def _refuse_altered(folder: Path, begun: float) -> None:
    """Takes a file out of the cache that is not what its name there says.

    Large files are kept under their SHA-256, which huggingface_hub itself does not compare. Only
    those that came since `begun` are looked at: hashing everything at each start would take long.

    Raises:
        NoAnswerError: there was one.
    """
    for link in sorted(folder.rglob("*")):
        blob = link.resolve()
        is_named = link.is_symlink() and blob.is_file() and _SHA256.fullmatch(blob.name)
        if not is_named or blob.stat().st_mtime < begun - CLOCK_SECONDS:
            continue
        with blob.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != blob.name:
            blob.unlink()
            link.unlink()
            reason = f"{link.relative_to(folder)} with another SHA-256 than the hub says"
            raise NoAnswerError(reason, may_pass=True)


def _silent_bar() -> Any:
    """A progress bar that shows nothing: the reporter is the one that speaks."""
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    return SilentBar


def explain(repository: HubRepository, failure: NoAnswerError) -> Explanation:
    """Says in plain words why `fetch_snapshot` failed, and what to try."""
    from huggingface_hub import errors

    error = failure.__cause__ or failure
    page, noun = repository.page, repository.noun
    readable = f"a {noun} that may be read"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        try_ = "free some space, or set HF_HOME to another place"
        return _public(str(error), "a cache that can be written", try_)
    if isinstance(error, errors.GatedRepoError):
        found = f"a gated {noun}: {page} asks to accept its terms first"
        return _public(found, readable, f"accept them on {page}, then `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        found = f"no revision {repository.revision or 'main'} of {page}"
        return _public(found, "a branch, tag or commit", f"choose one of {page}/tree/main")
    if isinstance(error, errors.RepositoryNotFoundError) or _status(error.__cause__) == 404:
        try_ = "check the spelling; for a private one `hf auth login` with a token that may read it"
        return _public(f"no {noun} {page}, or a private one", readable, try_)
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is None:
        return offline_explanation(noun)
    copied = f"copy the {noun} to this machine and name its folder"
    return _public(
        f"no usable answer from {page}: {failure}",
        f"the {noun}, or a copy in the cache",
        f"check the network or set HF_ENDPOINT to a mirror (https://hf-mirror.com); or {copied}",
    )


def offline_explanation(noun: str) -> Explanation:
    """Nothing in the cache, and no leave to ask."""
    return Explanation(
        "no whole copy in the cache, while HF_HUB_OFFLINE forbids to download",
        f"a {noun} that was downloaded before",
        f"unset HF_HUB_OFFLINE once, or copy the {noun} to this machine and name its folder",
    )


def _public(found: str, expected: str, try_: str) -> Explanation:
    """Addresses and answers may hold credentials: of an endpoint, a proxy, a signed address."""
    return Explanation(redact(found), expected, redact(try_))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
