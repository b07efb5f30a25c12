from pathlib import Path

import pytest

from tunesmith.io.cache import cache_folder


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "mine"))
    assert cache_folder("stores") == tmp_path / "mine" / "stores"
    assert cache_folder("stores").is_dir()
    monkeypatch.delenv("TUNESMITH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("models") == tmp_path / "home" / ".cache" / "tunesmith" / "models"
    assert cache_folder("models").is_dir()
