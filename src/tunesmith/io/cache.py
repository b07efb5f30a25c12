"""Where things made once are kept: converted models and token stores."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The cache's folder of that name, made if needed; `TUNESMITH_CACHE` moves the cache."""
    root = os.environ.get("TUNESMITH_CACHE")
    base = Path(root) if root else Path.home() / ".cache" / "tunesmith"
    folder = base / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
