"""File names that come from elsewhere, kept inside one folder.

For names in archives, indexes, uploads and lists of a hub; not for what the user typed, who may
name any place. Covered: the name alone, and links that exist when it is resolved. Not covered: a
link that another process puts there afterwards.
"""

from __future__ import annotations

import re
from pathlib import Path

from tunesmith.errors import UserError

MAX_NAME_BYTES = 1024
MAX_PART_BYTES = 255
"""Longest name of one file on the usual file systems."""

# Control characters, halves of surrogate pairs, and those that turn the direction of writing and so
# make `gpj.exe` look like `exe.jpg`.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_DRIVE = re.compile(r"[A-Za-z]:")


def resolve_inside(root: Path, name: str) -> Path:
    """The file of that name below `root`, its links resolved; it need not exist.

    Raises:
        UserError: it is, or leads, outside (`path.outside`), or is no name for a file
            (`path.name`).
    """
    parts = safe_parts(name)
    inside = root.resolve()
    try:
        path = inside.joinpath(*parts).resolve()
    except (OSError, RuntimeError) as error:
        raise _name_error(name, f"a name that cannot be resolved ({error})") from None
    # By parts: as texts, /data/runs-of-others starts with /data/runs.
    if path == inside or not path.is_relative_to(inside):
        raise _outside_error(name, f"a link to {path}")
    return path


def safe_parts(name: str) -> tuple[str, ...]:
    """The parts of a relative name that goes down only, without those that mean nothing.

    Raises:
        UserError: as `resolve_inside`; links are not looked at.
    """
    if name.startswith(("/", "\\", "~")) or _DRIVE.match(name):
        raise _outside_error(name, "an absolute path")
    if "\\" in name:
        raise _name_error(name, "a name with a backslash")
    if _UNSEEN.search(name):
        raise _name_error(name, "a name with control characters")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise _name_error(name, f"a name of {len(name.encode())} bytes")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise _outside_error(name, "a path that goes up")
    if not parts:
        raise _name_error(name, "an empty name")
    for part in parts:
        if len(part.encode()) > MAX_PART_BYTES:
            raise _name_error(name, f"a part of {len(part.encode())} bytes")
        if not part.strip(". "):
            raise _name_error(name, "a part of dots and spaces alone")
    return parts


def plain_name(name: str) -> str:
    """The name, if it is that of a file without any folder.

    Raises:
        UserError: as `safe_parts`, or it has a folder in it (`path.outside`).
    """
    if safe_parts(name) != (name,):
        raise _outside_error(name, "a path")
    return name


def shown(name: str) -> str:
    """A name as an error may show it: its unseen characters escaped, and not too long."""
    text = ascii(name) if _UNSEEN.search(name) else repr(name)
    return text if len(text) <= 100 else text[:97] + "..."


def _outside_error(name: str, found: str) -> UserError:
    return UserError(
        "path.outside", shown(name), found=found, expected="a relative path below the folder"
    )


def _name_error(name: str, found: str) -> UserError:
    return UserError(
        "path.name", shown(name), found=found, expected="a file name of visible characters"
    )
