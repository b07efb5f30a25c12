"""The rows of the fault matrix about the network: hubs that fail, lie, or are not there.

A server on this machine stands in for the Hugging Face hub and for ModelScope.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

from tunesmith.data.readers import modelscope
from tunesmith.data.readers.hub import fetch_dataset, parse_hub_id
from tunesmith.errors import DataError, ModelError, TunesmithError
from tunesmith.io import fault, retry
from tunesmith.types import SilentReporter

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "data/train.jsonl"
CONTENT = b"".join(b'{"text": "row %d"}\n' % row for row in range(2000))
BOTH = pytest.mark.parametrize("kind", ["hf", "ms"])


@dataclass
class Hub:
    """Both hubs with one data set of one file, and what goes wrong with the next requests of it."""

    troubles: list[str] = field(default_factory=list)
    """Taken one by one by the requests for content; `always` stays for all that follow."""
    always: str | None = None
    asked_troubles: list[str] = field(default_factory=list)
    """The same for the requests that come before it: listings, revisions."""
    has_ranges: bool = True
    starts: list[int] = field(default_factory=list)
    """From which byte on the content was asked for."""
    num_requests: int = 0
    address: str = ""
    is_over: threading.Event = field(default_factory=threading.Event)

    def listing(self, place: str) -> Any:
        """What a request that is not for content gets; None if there is nothing."""
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        if place == "/api/v1/datasets/org/set/repo/tree":
            entry = {"Path": NAME, "Type": "blob", "Size": len(CONTENT), "Sha256": sha256}
            return {"Code": 200, "Success": True, "Data": {"Files": [entry]}}
        if place == "/api/datasets/org/set/revision/main":
            return {"id": "org/set", "sha": COMMIT, "siblings": []}
        if place.startswith("/api/datasets/org/set/tree/"):
            lfs = {"oid": sha256, "size": len(CONTENT), "pointerSize": 130}
            return [{"type": "file", "path": NAME, "size": len(CONTENT), "oid": COMMIT, "lfs": lfs}]
        return None


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub that the server carries."""

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.num_requests += 1
        parts = urlsplit(self.path)
        place = unquote(parts.path)
        is_content = "FilePath" in parse_qs(parts.query) or "/resolve/" in place
        if is_content and self.command == "GET":
            trouble = hub.troubles.pop(0) if hub.troubles else hub.always
            self.send_content(hub, trouble)
        elif is_content:
            self.send_head(200, len(CONTENT))
        elif hub.asked_troubles:
            self.refuse(hub, hub.asked_troubles.pop(0))
        else:
            listing = hub.listing(place)
            body = json.dumps(listing).encode()
            self.send_head(404 if listing is None else 200, len(body))
            self.wfile.write(body)

    do_HEAD = do_GET

    def send_head(self, status: int, size: int, **headers: str) -> None:
        self.send_response(status)
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        known = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256}"', "Content-Length": str(size)}
        for name, value in {**known, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send_content(self, hub: Hub, trouble: str | None) -> None:
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        hub.starts.append(start)
        if trouble in ("503", "reset", "silent"):
            self.refuse(hub, trouble)
            return
        content = CONTENT.replace(b"row", b"sow", 1) if trouble == "altered" else CONTENT
        start = start if hub.has_ranges else 0
        body = content[start:]
        if start:
            last = len(CONTENT) - 1
            self.send_head(206, len(body), Content_Range=f"bytes {start}-{last}/{len(CONTENT)}")
        else:
            self.send_head(200, len(body))
        sent = body[: len(body) // 2] if trouble in ("cut", "slow", "cut-reset") else body
        self.wfile.write(sent)
        self.wfile.flush()
        if trouble == "slow":
            hub.is_over.wait(30)
        if trouble == "cut-reset":
            hub.is_over.wait(0.2)  # else what was sent is lost with the connection
            self.reset()
        self.close_connection = True

    def refuse(self, hub: Hub, trouble: str) -> None:
        if trouble == "503":
            self.send_head(503, 0, Retry_After="7")
        elif trouble == "silent":
            hub.is_over.wait(30)
        else:
            self.reset()
        self.close_connection = True

    def reset(self) -> None:
        """Ends the connection with a TCP reset."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def finish(self) -> None:
        if self.connection.fileno() >= 0:
            super().finish()


class Server(ThreadingHTTPServer):
    """Keeps quiet about connections that its handler broke on purpose."""

    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited; nothing is."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> Iterator[Hub]:
    del pauses
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = Hub(address=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.hub.address)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.hub.address)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.15)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(modelscope, "TIMEOUT_SECONDS", 0.15)
    yield server.hub
    server.hub.is_over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(kind: str) -> bytes:
    hub_id = parse_hub_id(f"{kind}:org/set")
    assert hub_id is not None
    return (fetch_dataset(hub_id, SilentReporter()) / NAME).read_bytes()


def error_of(kind: str) -> DataError:
    with pytest.raises(DataError) as raised:
        fetch(kind)
    return raised.value


# 43


@BOTH
@pytest.mark.parametrize("trouble", ["503", "reset", "silent", "cut", "cut-reset", "slow"])
def test_row_43_a_hub_that_fails_in_passing(hub: Hub, kind: str, trouble: str) -> None:
    """503, reset, slow, dead in the middle, twice: the whole file, by range where half has come."""
    hub.troubles = [trouble, trouble]
    assert fetch(kind) == CONTENT
    has_begun = trouble in ("cut", "cut-reset", "slow")
    assert len(set(hub.starts)) == (3 if has_begun else 1)
    assert hub.starts == sorted(hub.starts)


@BOTH
@pytest.mark.parametrize("trouble", ["503", "reset"])
def test_row_43_a_listing_that_fails_in_passing(hub: Hub, kind: str, trouble: str) -> None:
    """503 or reset before any file is named, twice: asked again."""
    hub.asked_troubles = [trouble, trouble]
    assert fetch(kind) == CONTENT


@BOTH
def test_row_43_a_server_without_ranges(hub: Hub, kind: str) -> None:
    """Dead in the middle, and all comes again from the start: not a byte twice in the file."""
    hub.has_ranges = False
    hub.troubles = ["cut", "cut"]
    assert fetch(kind) == CONTENT


@BOTH
@pytest.mark.parametrize(
    ("trouble", "said"), [("503", "503"), ("reset", "reset"), ("silent", "timed out")]
)
def test_row_43_a_hub_that_goes_on_failing(
    hub: Hub,
    kind: str,
    trouble: str,
    said: str,
    *,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same again and again: a bounded number of attempts, longer pauses, one clear error."""
    if kind == "hf":  # each of them is six of huggingface_hub's own
        monkeypatch.setattr(retry, "ATTEMPTS", 2)
    hub.always = trouble
    error = error_of(kind)
    assert error.code == "data.hub"
    assert hub.address in error.found
    assert said in error.found
    assert f"the last of {retry.ATTEMPTS} attempts" in error.found
    variable = "HF_ENDPOINT" if kind == "hf" else "MODELSCOPE_ENDPOINT"
    assert f"check the network or set {variable} to a mirror" in str(error.try_)
    if kind == "ms":
        waited = [7.0, 7.0, 7.0, 8.0] if trouble == "503" else [1.0, 2.0, 4.0, 8.0]
        assert pauses == waited  # Retry-After: 7 counts where it is longer
        assert len(hub.starts) == retry.ATTEMPTS


def test_row_43_a_server_that_never_gets_further(hub: Hub) -> None:
    """Dead at the same byte each time, without ranges: what comes anew each time is no progress.

    For ModelScope alone: huggingface_hub 2.4 goes on for ever there.
    """
    hub.always, hub.has_ranges = "cut", False
    assert "bytes early" in error_of("ms").found
    assert len(hub.starts) == retry.ATTEMPTS


def test_row_43_a_planted_failure_of_a_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th read of a connection fails: gone on behind what has come."""
    try:
        fault.arm({"TUNESMITH_FAULT": "net.read:3:raise:ConnectionError"})
        assert fetch("ms") == CONTENT
    finally:
        fault.arm()
    assert len(hub.starts) == 2


def test_row_43_a_bad_line_gets_a_large_file_through(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More failures than attempts, but each time some of the file has come: it goes on."""
    monkeypatch.setattr(retry, "PROGRESS_BYTES", 100)
    hub.troubles = ["cut"] * (retry.ATTEMPTS + 2)
    assert fetch("ms") == CONTENT
    assert hub.starts == sorted(set(hub.starts))


# 44


def files_in(folder: Path) -> list[Path]:
    """Regular files with content; the hub library's empty lock files are not meant."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


@BOTH
@pytest.mark.parametrize("trouble", ["cut", "altered"])
def test_row_44_a_download_that_differs(hub: Hub, kind: str, trouble: str) -> None:
    """Truncated, or altered at the same size: noticed, and fetched again."""
    hub.has_ranges = False
    hub.troubles = [trouble]
    assert fetch(kind) == CONTENT
    assert hub.starts[-1] == 0 or trouble == "cut"


@BOTH
def test_row_44_nothing_altered_is_ever_cached(hub: Hub, kind: str, tmp_path: Path) -> None:
    """Altered each time: an error that says so, nothing in the cache, and a later start fetches."""
    hub.always = "altered"
    error = error_of(kind)
    assert "another SHA-256" in error.found
    assert not any(b"sow" in path.read_bytes() for path in files_in(tmp_path / "cache"))
    hub.always = None
    assert fetch(kind) == CONTENT


# 45


class NetworkCallError(BaseException):
    """Not to be caught by anybody."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to reach something ends the test."""

    def refuse(*args: Any, **_: Any) -> None:
        raise NetworkCallError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@BOTH
def test_row_45_data_offline(
    hub: Hub, kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """HF_HUB_OFFLINE and a copy in the cache: the copy, without one network call."""
    assert fetch(kind) == CONTENT
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request.getfixturevalue("no_network")
    assert fetch(kind) == CONTENT


@BOTH
def test_row_45_data_while_the_hub_is_away(
    hub: Hub, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variable, nobody at the address, a copy in the cache: the copy."""
    assert fetch(kind) == CONTENT
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(kind) == CONTENT


@BOTH
def test_row_45_data_while_the_hub_is_busy(hub: Hub, kind: str) -> None:
    """A hub that answers 503 to everything, a copy in the cache: the copy."""
    assert fetch(kind) == CONTENT
    hub.asked_troubles = ["503"] * 50
    assert fetch(kind) == CONTENT


@pytest.fixture
def cached_model(hub: Hub, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model as huggingface_hub keeps it after a download; its id."""
    home = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--org--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_model_folder, home / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    return "org/tiny"


def load_everything(model: str) -> None:
    """All that a run reads of a model."""
    from tunesmith.config.recipe import ModelConfig
    from tunesmith.model.load import find_model, load_config, load_model, load_tokenizer

    source = find_model(ModelConfig(id=model), SilentReporter())
    assert not source.is_local
    assert load_tokenizer(source).eos_token == "<|im_end|>"
    assert load_config(source).hidden_size == 32
    assert load_model(source).config.hidden_size == 32


def test_row_45_a_model_offline(
    cached_model: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """HF_HUB_OFFLINE and a model in the cache: loaded, without one network call."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    request.getfixturevalue("no_network")
    load_everything(cached_model)


def test_row_45_a_model_while_the_hub_is_away(
    cached_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variable, nobody at the address, a model in the cache: loaded."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    load_everything(cached_model)


def test_row_45_no_model_in_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """HF_HUB_OFFLINE and no copy: an error of ours that names the model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    request.getfixturevalue("no_network")
    with pytest.raises(TunesmithError) as raised:
        load_everything("org/other")
    assert isinstance(raised.value, ModelError)
    assert raised.value.where == "org/other"
    assert "name its folder" in str(raised.value.try_)
