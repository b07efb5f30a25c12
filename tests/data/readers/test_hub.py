"""Hub ids, and downloads from a local stand-in for the Hugging Face hub and for ModelScope."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.readers import modelscope
from tunesmith.data.readers.files import TABLE_ENDINGS, TEXT_ENDINGS
from tunesmith.data.readers.hub import HubId, declared_splits, fetch_dataset, parse_hub_id
from tunesmith.errors import DataError, DiskError
from tunesmith.io import retry
from tunesmith.types import SilentReporter

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# A data set\n",
    "data/train.jsonl": b'{"text": "one"}\n',
    "data/test.csv": b"text\ntwo\n",
    "model.bin": b"not wanted",
}


@dataclass
class StandIn:
    """A hub with one data set, `org/set`, and what a test wants it to do."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    status: int = 200
    error_code: str | None = None
    body: bytes | None = None
    failures: int = 0
    lie_about: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut_short: bool = False
    redirect_to: str | None = None
    ignores_pages: bool = False
    requests: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and body for a path, by the rules of the two hubs."""
        self.requests.append(path)
        if self.failures:
            self.failures -= 1
            return 503, b"busy"
        if self.status != 200 or self.body is not None:
            return self.status, self.body or b"{}"
        parts = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        place = unquote(parts.path)
        if place == "/api/v1/datasets/org/set/repo/tree":
            return 200, json.dumps(self.modelscope_listing(query)).encode()
        if place == "/api/v1/datasets/org/set/repo":
            return 200, self.files[query["FilePath"]]
        if place.startswith("/api/datasets/org/set/tree/"):
            return 200, json.dumps(self.huggingface_tree()).encode()
        if place in {f"/api/datasets/org/set/revision/{each}" for each in ("main", "v1", COMMIT)}:
            return 200, json.dumps({"id": "org/set", "sha": COMMIT, "siblings": []}).encode()
        resolve = f"/datasets/org/set/resolve/{COMMIT}/"
        if place.startswith(resolve):
            return 200, self.files[place.removeprefix(resolve)]
        return 404, b'{"Success": false, "Message": "not found"}'

    def huggingface_tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.files.items()
        ]

    def modelscope_listing(self, query: dict[str, str]) -> dict[str, Any]:
        entries: list[dict[str, Any]] = [{"Path": "data", "Type": "tree", "Size": 0, "Sha256": ""}]
        for path, data in self.files.items():
            sha256 = hashlib.sha256(data).hexdigest()
            entry = {"Path": path, "Type": "blob", "Size": len(data), "Sha256": sha256}
            entries.append(entry | self.lie_about.get(path, {}))
        size = int(query["PageSize"])
        start = 0 if self.ignores_pages else size * (int(query["PageNumber"]) - 1)
        return {"Code": 200, "Success": True, "Data": {"Files": entries[start : start + size]}}


def handler_of(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.headers.append(dict(self.headers))
            redirects = hub.redirect_to and "FilePath" in self.path
            status, body = (302, b"") if redirects else hub.answer(self.path)
            self.send_response(status)
            if redirects:
                self.send_header("Location", f"{hub.redirect_to}{self.path}")
            if hub.error_code:
                self.send_header("X-Error-Code", hub.error_code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            is_cut = hub.cut_short and "tree" not in self.path
            self.send_header("Content-Length", str(len(body) + (5 if is_cut else 0)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(stand_in))
    stand_in.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", stand_in.address)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.0)
    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


class Notes(SilentReporter):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def fetch(text: str, notes: Notes | None = None) -> Path:
    hub_id = parse_hub_id(text)
    assert hub_id is not None
    return fetch_dataset(hub_id, notes or Notes())


def error_of(text: str) -> DataError:
    with pytest.raises(DataError) as raised:
        fetch(text)
    return raised.value


def content_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


WANTED = {path: data for path, data in FILES.items() if path != "model.bin"}
BOTH = pytest.mark.parametrize("kind", ["hf", "ms"])


# Ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/name", HubId("hf", "org/name")),
        ("ms:org/name", HubId("ms", "org/name")),
        ("hf:org/name:train", HubId("hf", "org/name", split="train")),
        ("hf:org/name@main:train", HubId("hf", "org/name", "main", "train")),
        ("ms:A.I-x_1/b.c-d@v1.0", HubId("ms", "A.I-x_1/b.c-d", "v1.0")),
        ("hf:o/n@refs/convert/parquet:test", HubId("hf", "o/n", "refs/convert/parquet", "test")),
        (f"hf:o/n@{COMMIT}", HubId("hf", "o/n", COMMIT)),
        ("ms:org/a--b", HubId("ms", "org/a--b")),
    ],
)
def test_ids_are_parsed_and_printed(text: str, expected: HubId) -> None:
    assert parse_hub_id(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["train.jsonl", "org/name", "hf/org/name", "HF:o/n", "C:\\x", ""])
def test_other_texts_are_no_ids(text: str) -> None:
    assert parse_hub_id(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *("hf:", "hf:name", "hf:org/", "hf:/name", "hf:a/b/c", "hf: org/name", "hf:org/na me"),
        *("hf:org/name@", "hf:org/name:", "hf:org/name:train@main", "hf:org/name@a/../b"),
        *("hf:org/..", "hf:../name", "ms:org/-name", "hf:org/a--b", "hf:组织/数据", "hf:o/n\n"),
        *("hf:https://huggingface.co/datasets/o/n", "ms:org/name:train:test", "hf:o/n@/etc"),
    ],
)  # fmt: skip
def test_malformed_ids_say_what_is_expected(text: str) -> None:
    with pytest.raises(DataError, match="hf:org/name or ms:org/name") as raised:
        parse_hub_id(text)
    assert raised.value.code == "data.hub-id"
    assert raised.value.where == text


@given(st.text())
def test_any_text_is_an_id_or_an_error(text: str) -> None:
    try:
        parsed = parse_hub_id(f"hf:{text}")
    except DataError:
        return
    assert str(parsed) == f"hf:{text}"


# Downloads


@BOTH
def test_only_data_files_are_fetched(hub: StandIn, kind: str) -> None:
    assert content_of(fetch(f"{kind}:org/set")) == WANTED
    assert not any("model.bin" in request for request in hub.requests)


@pytest.mark.parametrize(
    "ending", [*TEXT_ENDINGS, *TABLE_ENDINGS, ".csv.gz", ".mindrecord", ".mindrecord07"]
)
def test_whatever_is_read_is_fetched(hub: StandIn, ending: str) -> None:
    hub.files = {f"data/x{ending}": b"something", "data/x.mindrecord.db": b"not wanted"}
    assert content_of(fetch("hf:org/set")) == {f"data/x{ending}": b"something"}
    assert content_of(fetch("ms:org/set")) == {f"data/x{ending}": b"something"}


@BOTH
def test_nothing_is_fetched_twice(hub: StandIn, kind: str) -> None:
    first = fetch(f"{kind}:org/set")
    count = len(hub.requests)
    assert fetch(f"{kind}:org/set:train") == first
    assert len(hub.requests) == count + 1  # it only asks whether something changed


@BOTH
def test_offline_takes_the_copy_in_the_cache(
    hub: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch(f"{kind}:org/set")
    count = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(f"{kind}:org/set") == first
    assert len(hub.requests) == count


@BOTH
def test_offline_without_a_copy(hub: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = error_of(f"{kind}:org/set")
    assert error.code == "data.hub"
    assert "HF_HUB_OFFLINE" in error.found
    assert "name its folder" in str(error.try_)
    assert hub.requests == []


def test_offline_with_a_copy_that_lacks_a_file(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fetch("hf:org/set") / "data" / "test.csv").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no whole copy in the cache" in error_of("hf:org/set").found


@BOTH
def test_copy_in_the_cache_serves_while_the_hub_is_down(
    hub: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch(f"{kind}:org/set")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    notes = Notes()
    assert fetch(f"{kind}:org/set", notes) == first
    assert kind == "hf" or "the copy in the cache is used" in notes.notes[0]


@BOTH
def test_hub_that_cannot_be_reached(
    hub: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    error = error_of(f"{kind}:org/set")
    assert error.code == "data.hub"
    assert "http://127.0.0.1:9/" in error.found
    assert "refused" in error.found
    variable = "HF_ENDPOINT" if kind == "hf" else "MODELSCOPE_ENDPOINT"
    assert f"set {variable} to a mirror" in str(error.try_)


@BOTH
def test_revision_is_asked_for(hub: StandIn, kind: str) -> None:
    fetch(f"{kind}:org/set@v1")
    assert any("/revision/v1" in each or "Revision=v1&" in each for each in hub.requests)


@BOTH
@pytest.mark.parametrize("code", ["RepoNotFound", None])  # mirrors leave the header out
def test_missing_data_set(hub: StandIn, kind: str, code: str | None) -> None:
    hub.status, hub.error_code = 404, code
    error = error_of(f"{kind}:org/set")
    assert error.code == "data.hub"
    assert error.found.startswith("no data set http://127.0.0.1")
    assert "check the spelling" in str(error.try_)


def test_missing_revision(hub: StandIn) -> None:
    hub.status, hub.error_code = 404, "RevisionNotFound"
    assert error_of("hf:org/set@v9").found.startswith("no revision v9 of http")
    hub.error_code = None
    assert "with the revision v9" in error_of("ms:org/set@v9").found


@BOTH
def test_gated_or_private_data_set(hub: StandIn, kind: str) -> None:
    hub.status, hub.error_code = 403, "GatedRepo"
    error = error_of(f"{kind}:org/set")
    assert error.code == "data.hub"
    assert "gated" in error.found
    assert "accept" in str(error.try_) or "access" in str(error.try_)


@BOTH
def test_data_set_without_data_files(hub: StandIn, kind: str) -> None:
    hub.files = {"README.md": b"", "a.bin": b"", "dataset_info.json": b"{}"}
    error = error_of(f"{kind}:org/set")
    assert error.found == "a data set without data files"
    assert "*.parquet" in error.expected


def test_data_set_without_any_file_that_is_fetched(hub: StandIn) -> None:
    hub.files = {"a.bin": b""}
    assert error_of("hf:org/set").found == "a data set without data files"
    assert error_of("ms:org/set").found == "a data set without data files"


@BOTH
@pytest.mark.parametrize("body", [b"<html>log in</html>", b"[1]", b"{}", b"null", b"\xff"])
def test_server_that_is_no_hub(hub: StandIn, kind: str, body: bytes) -> None:
    hub.body = body
    error = error_of(f"{kind}:org/set")
    assert error.code == "data.hub"


@BOTH
def test_disk_that_cannot_be_written(
    hub: StandIn, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if kind == "hf":
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    else:
        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DiskError, match="No space left") as raised:
        fetch(f"{kind}:org/set")
    assert raised.value.code == "disk.full"


def test_name_that_only_the_hub_library_refuses(hub: StandIn) -> None:
    assert error_of("hf:org/name.git").code == "data.hub-id"


def test_hub_without_progress_bars(hub: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    fetch("hf:org/set")
    assert capfd.readouterr().err == ""


# ModelScope alone


def test_long_listings_come_in_pages(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelscope, "LISTING_PAGE_FILES", 2)
    assert content_of(fetch("ms:org/set")) == WANTED
    assert sum("PageNumber" in request for request in hub.requests) == 3


def test_endless_listing_is_cut(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelscope, "LISTING_PAGE_FILES", 1)
    monkeypatch.setattr(modelscope, "MAX_LISTING_PAGES", 3)
    with pytest.raises(modelscope.NoAnswerError, match="more than 3 pages"):
        modelscope.DatasetRepository("org/set").files()


def test_server_that_ignores_pages(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelscope, "LISTING_PAGE_FILES", 5)
    hub.ignores_pages = True
    assert content_of(fetch("ms:org/set")) == WANTED


def test_changed_files_get_a_folder_of_their_own(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch("ms:org/set")
    os.utime(first, (1, 1))
    hub.files["data/train.jsonl"] = b'{"text": "new"}\n'
    second = fetch("ms:org/set")
    assert content_of(first)["data/train.jsonl"] == FILES["data/train.jsonl"]
    assert content_of(second)["data/train.jsonl"] == b'{"text": "new"}\n'
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("ms:org/set") == second


def test_busy_server_is_asked_again(hub: StandIn) -> None:
    hub.failures = 2
    assert content_of(fetch("ms:org/set")) == WANTED
    hub.failures = retry.ATTEMPTS
    assert content_of(fetch("ms:org/set")) == WANTED  # the copy
    hub.failures = retry.ATTEMPTS
    assert "HTTP 503" in error_of("ms:org/set@v1").found


@pytest.mark.parametrize(
    ("lie", "said"),
    [({"Size": 3}, "16 of 3 bytes"), ({"Sha256": "0" * 64}, "another SHA-256")],
)
def test_file_that_differs_from_the_listing(hub: StandIn, lie: dict[str, Any], said: str) -> None:
    hub.lie_about["data/train.jsonl"] = lie
    error = error_of("ms:org/set")
    assert said in error.found
    assert sum("train.jsonl" in request for request in hub.requests) == retry.ATTEMPTS


def test_listing_without_sizes_is_believed(hub: StandIn) -> None:
    hub.lie_about = {path: {"Size": None, "Sha256": None} for path in FILES}
    assert content_of(fetch("ms:org/set")) == WANTED


def test_connection_that_ends_early(hub: StandIn, tmp_path: Path) -> None:
    hub.cut_short = True
    hub.lie_about = {path: {"Size": None} for path in FILES}
    assert "5 bytes early" in error_of("ms:org/set").found
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "path", ["../x.json", "/etc/x.json", "a/../../x.json", "a\\..\\x.json", ""]
)
def test_files_that_lead_out_of_the_folder(hub: StandIn, tmp_path: Path, path: str) -> None:
    hub.files[path] = b"{}"
    error = error_of("ms:org/set")
    assert f"a file that is called {path!r}" in error.found
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_failure_inside_a_good_answer(hub: StandIn) -> None:
    hub.body = b'{"Code": 10010205001, "Success": false, "Message": "record not found"}'
    assert "record not found" in error_of("ms:org/set").found


def test_token_is_not_sent_on_to_another_host(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(other))
    hub.redirect_to = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    assert content_of(fetch("ms:org/set")) == WANTED
    server.shutdown()
    thread.join()
    server.server_close()
    assert all(headers["Authorization"] == "Bearer secret" for headers in hub.headers)
    assert other.headers
    assert not any("secret" in str(headers) for headers in other.headers)


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [("ftp://x", "without http"), ("http://[", "no usable answer"), ("http://a b", "no usable")],
)
def test_endpoint_that_is_no_address(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch, endpoint: str, said: str
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    assert said in error_of("ms:org/set").found


def test_domain_without_scheme_means_https(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELSCOPE_ENDPOINT", raising=False)
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    repository = modelscope.DatasetRepository("o/n")
    assert repository.address == "https://www.modelscope.cn/api/v1/datasets/o/n/repo"
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.modelscope.ai")
    assert repository.address == "https://www.modelscope.ai/api/v1/datasets/o/n/repo"


# Declared splits


def splits_of(folder: Path, header: str) -> dict[str, list[str]]:
    (folder / "README.md").write_text(f"---\n{header}\n---\n# Title\n", encoding="utf-8")
    return declared_splits(folder)


def test_splits_of_the_default_configuration(tmp_path: Path) -> None:
    header = """
configs:
- config_name: other
  data_files: other/*.json
- config_name: default
  data_files:
  - split: train
    path: [data/train-*.parquet, more/train.parquet]
  - split: test
    path: data/test-*
"""
    assert splits_of(tmp_path, header) == {
        "train": ["data/train-*.parquet", "more/train.parquet"],
        "test": ["data/test-*"],
    }


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("configs: [{config_name: a, data_files: x.csv}]", {"train": ["x.csv"]}),
        ("configs: [{data_files: [x.csv, y.csv]}]", {"train": ["x.csv", "y.csv"]}),
        ("configs: [{data_files: {train: a, test: [b, c]}}]", {"train": ["a"], "test": ["b", "c"]}),
        ("configs: [{data_files: a}, {data_files: b, default: true}]", {"train": ["b"]}),
        ("configs: [{data_files: [{path: a}]}]", {"train": ["a"]}),
        ("configs: [{data_dir: d, data_files: '*.csv'}]", {"train": ["d/*.csv"]}),
        ("configs: [{config_name: first, data_files: a}, {data_files: b}]", {"train": ["a"]}),
        ("configs: [{data_files: [{split: train, path: ../a}]}]", {}),
        ("configs: [{data_files: [/etc/x, https://x/y.csv, ok.csv]}]", {"train": ["ok.csv"]}),
        ("configs: [{config_name: a}]", {}),
        ("configs: [{data_files: [{path: a}, b]}]", {"train": ["a"]}),
        ("configs: text", {}),
        ("language: zh", {}),
        ("just text", {}),
        ("broken: [", {}),
        ("date: 2024-99-99", {}),
        ("[" * 2_000, {}),
    ],
)
def test_splits_in_other_spellings(
    tmp_path: Path, header: str, expected: dict[str, list[str]]
) -> None:
    assert splits_of(tmp_path, header) == expected


def test_readme_without_header(tmp_path: Path) -> None:
    assert declared_splits(tmp_path) == {}
    (tmp_path / "README.md").write_text("# Title\n---\na: 1\n---\n", encoding="utf-8")
    assert declared_splits(tmp_path) == {}


def test_readme_with_windows_line_ends_and_mark(tmp_path: Path) -> None:
    text = "\ufeff---\r\nconfigs:\r\n- data_files: x.csv\r\n---\r\n"
    (tmp_path / "README.md").write_bytes(text.encode())
    assert declared_splits(tmp_path) == {"train": ["x.csv"]}
