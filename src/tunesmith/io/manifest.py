"""A directory's table of contents with the sha256 of every file; it tells whole from broken."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import cast

from tunesmith.io.atomic import write_atomic
from tunesmith.types import Json

MANIFEST = "MANIFEST.json"
SCHEMA = 1


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, extra: dict[str, Json] | None = None) -> None:
    """Lists every file of `folder` with size and sha256; call it last."""
    files: dict[str, Json] = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest: dict[str, Json] = {"schema": SCHEMA, **(extra or {}), "files": files}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))


def find_damage(folder: Path) -> str | None:
    """Says what is wrong with a directory that should have a manifest, or None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = cast("dict[str, dict[str, object]]", manifest["files"])
        return _find_damaged_file(folder, files)
    except FileNotFoundError:
        return "it has no manifest: the save did not finish"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"


def _find_damaged_file(folder: Path, files: dict[str, dict[str, object]]) -> str | None:
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if file_sha256(file) != entry["sha256"]:
            return f"{name} has changed since it was saved (sha256 differs)"
    return None
