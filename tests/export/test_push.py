"""Pushing: stand-ins for the hubs; a token never shows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest

from tunesmith.errors import UserError
from tunesmith.export import push
from tunesmith.export.push import Destination, parse_destination, push_folder
from tunesmith.types import SilentReporter

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bD2"


class Hub:
    """A stand-in for both hubs' clients."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = []
        self.error = error

    def __call__(self, **_: Any) -> Hub:
        return self

    def create_repo(self, name: str, **how: Any) -> str:
        self.calls.append(("create", {"name": name, **how}))
        return f"https://hub/{name}"

    def upload_folder(self, **how: Any) -> None:
        if self.error:
            raise self.error
        self.calls.append(("upload", how))

    def upload_large_folder(self, **how: Any) -> None:
        self.calls.append(("large", how))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "a.txt").write_text("content")
    return tmp_path / "export"


def test_destinations() -> None:
    assert parse_destination("hf:me/my-model.v1") == Destination("hf", "me/my-model.v1")
    assert parse_destination("ms:me/x", is_private=True).is_private
    for text in ("me/x", "hf:x", "s3:me/x", "hf:me/x/y", f"hf:{TOKEN}"):
        with pytest.raises(UserError, match=r"export\.destination") as caught:
            parse_destination(text)
        assert TOKEN not in str(caught.value)


def test_a_folder_goes_to_hugging_face(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    address = push_folder(folder, Destination("hf", "me/x", is_private=True), SilentReporter())
    assert address == "https://hub/me/x"
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert hub.calls[0][1] == {"name": "me/x", "private": True, "exist_ok": True}
    assert hub.calls[1][1]["folder_path"] == folder


def test_a_large_one_goes_so_that_it_can_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(push, "LARGE_BYTES", 3)
    push_folder(folder, Destination("hf", "me/x"), SilentReporter())
    assert [name for name, _ in hub.calls] == ["create", "large"]


def test_a_refusal_tells_no_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    error = OSError(f"401 for https://hub with Authorization: Bearer {TOKEN}")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(error))
    with pytest.raises(UserError, match=r"export\.push.*401") as caught:
        push_folder(folder, Destination("hf", "me/x"), SilentReporter())
    assert TOKEN not in str(caught.value)
    assert "HF_TOKEN" in str(caught.value)


def test_modelscope(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    api = ModuleType("modelscope.hub.api")
    api.HubApi = hub  # type: ignore[attr-defined]
    for name, module in (
        ("modelscope", ModuleType("modelscope")),
        ("modelscope.hub", ModuleType("modelscope.hub")),
        ("modelscope.hub.api", api),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret-of-this-test")
    address = push_folder(folder, Destination("ms", "me/x"), SilentReporter())
    assert address == "https://modelscope.cn/models/me/x"
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert hub.calls[0][1]["visibility"] == "public"
    assert all(how["token"] == "ms-secret-of-this-test" for _, how in hub.calls)


def test_modelscopes_package_may_be_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match=r"export\.missing-package.*modelscope"):
        push_folder(folder, Destination("ms", "me/x"), SilentReporter())
