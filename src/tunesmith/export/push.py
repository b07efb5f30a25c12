"""Sends an export to the Hugging Face hub or ModelScope; tokens are never options or files here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.io.redact import redact
from tunesmith.types import Reporter

LARGE_BYTES = 2 * 10**9
"""From here on an upload goes file by file and, cut off, goes on where it was."""

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Destination:
    """A repository on a hub.

    Args:
        hub: hf or ms.
        name: OWNER/NAME.
        is_private: whether others may not see it, if it is made.
    """

    hub: str
    name: str
    is_private: bool = False


def parse_destination(text: str, *, is_private: bool = False) -> Destination:
    """Reads `hf:OWNER/NAME` or `ms:OWNER/NAME`.

    Raises:
        UserError: it is neither (`export.destination`).
    """
    hub, _, name = text.partition(":")
    if hub not in ("hf", "ms") or not NAME.fullmatch(name):
        raise UserError(
            "export.destination",
            "--push",
            found=redact(text)[:100],
            expected="hf:OWNER/NAME or ms:OWNER/NAME",
        )
    return Destination(hub, name, is_private)


def push_folder(folder: Path, destination: Destination, reporter: Reporter) -> str:
    """Sends a folder; gives the address of the repository.

    Raises:
        UserError: the hub refuses it or cannot be reached (`export.push`), or ModelScope's package
            is not installed (`export.missing-package`).
    """
    send = _to_hugging_face if destination.hub == "hf" else _to_modelscope
    with reporter.waiting(f"Pushing {destination.name}"):
        return send(folder, destination)


def _to_hugging_face(folder: Path, destination: Destination) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # What the HTTP library raises without an answer: httpx to version 1 of the hub's, then httpx2.
    silence: Any = HfHubHTTPError.__bases__[0]
    api: Any = HfApi(library_name="tunesmith")
    # Version 2 goes on by itself where an upload was cut off, and has no such method any more.
    large: Any = getattr(api, "upload_large_folder", None)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        made = api.create_repo(destination.name, private=destination.is_private, exist_ok=True)
        if size > LARGE_BYTES and large is not None:
            large(repo_id=destination.name, folder_path=folder, repo_type="model")
        else:
            api.upload_folder(
                repo_id=destination.name, folder_path=folder, commit_message="tunesmith export"
            )
    except (silence, OSError, ValueError, RuntimeError) as error:
        raise _refusal(destination, error, "HF_TOKEN, or `hf auth login`") from error
    return str(made)


def _to_modelscope(folder: Path, destination: Destination) -> str:
    """Not run against the hub itself: tests use a stand-in for its package."""
    try:
        from modelscope.hub.api import HubApi  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "export.missing-package",
            "--push ms:",
            found="no package modelscope",
            expected="it installed",
            try_="pip install 'tunesmith[modelscope]'",
        ) from error
    api: Any = HubApi()
    # Given with each call: to log in would leave it in a file.
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    known: dict[str, str] = {"token": token} if token else {}
    try:
        api.create_repo(
            destination.name,
            repo_type="model",
            visibility="private" if destination.is_private else "public",
            exist_ok=True,
            **known,
        )
        api.upload_folder(
            repo_id=destination.name,
            folder_path=str(folder),
            commit_message="tunesmith export",
            repo_type="model",
            **known,
        )
    except (*_modelscope_errors(), OSError, ValueError, RuntimeError, KeyError) as error:
        raise _refusal(destination, error, "MODELSCOPE_API_TOKEN") from error
    return f"https://modelscope.cn/models/{destination.name}"


def _modelscope_errors() -> tuple[type[Exception], ...]:
    """What newer versions of its package raise; older ones have the standard errors alone."""
    if importlib.util.find_spec("modelscope_hub") is None:
        return ()
    return (importlib.import_module("modelscope_hub.errors").HubError,)


def _refusal(destination: Destination, error: Exception, token: str) -> UserError:
    said = (redact(str(error)).strip() or type(error).__name__).splitlines()[0][:300]
    return UserError(
        "export.push",
        f"{destination.hub}:{destination.name}",
        found=said,
        expected="a hub that takes the folder",
        try_=f"set {token}, and run the same command with --overwrite again; what is in the folder "
        "was verified",
    )
