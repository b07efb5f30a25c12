"""ModelScope's data set repositories over its HTTP API: list the files, download one.

Its own client would be a large dependency for these two calls. Not covered: resuming a download in
the middle of a file.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlencode

import msgspec

T = TypeVar("T")

DEFAULT_ENDPOINT = "https://www.modelscope.cn"
DEFAULT_REVISION = "master"
LISTING_PAGE_FILES = 200
MAX_LISTING_PAGES = 5_000
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0
ATTEMPTS = 3
RETRY_SECONDS = 1.0


class NoAnswerError(Exception):
    """The hub did not send what was asked for.

    Args:
        reason: what it sent instead, or what the network said.
        may_pass: whether the same question may be answered later.
        status: of an HTTP answer, None if there was none.
    """

    def __init__(self, reason: str, *, may_pass: bool, status: int | None = None) -> None:
        super().__init__(reason)
        self.may_pass = may_pass
        self.status = status


class ListedFile(msgspec.Struct, frozen=True):
    """One entry of the listing of a repository; folders are of another kind than `blob`."""

    path: str = msgspec.field(name="Path")
    kind: str = msgspec.field(name="Type", default="blob")
    size: int | None = msgspec.field(name="Size", default=None)
    sha256: str | None = msgspec.field(name="Sha256", default=None)


class ListedFiles(msgspec.Struct, frozen=True):
    """One page of the listing."""

    files: list[ListedFile] | None = msgspec.field(name="Files", default=None)


class Listing(msgspec.Struct, frozen=True):
    """The envelope around the listing; failures come in it too, with HTTP status 200."""

    data: ListedFiles | list[ListedFile] | None = msgspec.field(name="Data", default=None)
    message: str | None = msgspec.field(name="Message", default=None)
    is_success: bool = msgspec.field(name="Success", default=True)


@dataclass(frozen=True, slots=True)
class DatasetRepository:
    """One revision of a data set; `MODELSCOPE_ENDPOINT` or `MODELSCOPE_DOMAIN` name the server."""

    name: str
    revision: str = DEFAULT_REVISION

    @property
    def address(self) -> str:
        """Where the API has the data set."""
        named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN")
        endpoint = (named or DEFAULT_ENDPOINT).strip().rstrip("/")
        endpoint = endpoint if "://" in endpoint else f"https://{endpoint}"
        return f"{endpoint}/api/v1/datasets/{self.name}/repo"

    def files(self) -> list[ListedFile]:
        """All files, in the order of their paths.

        Raises:
            NoAnswerError: there is no listing, or one with paths that lead out of a folder.
        """
        found: dict[str, ListedFile] = {}
        for page in range(1, MAX_LISTING_PAGES + 1):
            entries = _retried(partial(self._listing_page, page))
            known = len(found)
            found |= {entry.path: entry for entry in entries}
            # A server without pages sends the same one again: nothing new also ends the listing.
            if len(entries) < LISTING_PAGE_FILES or len(found) == known:
                break
        else:
            reason = f"a listing of more than {MAX_LISTING_PAGES} pages"
            raise NoAnswerError(reason, may_pass=False)
        files = [found[path] for path in sorted(found) if found[path].kind == "blob"]
        for file in files:
            if not _stays_inside(file.path):
                raise NoAnswerError(f"a file that is called {file.path!r}", may_pass=False)
        return files

    def download(self, file: ListedFile, target: Path) -> None:
        """Writes one file, and compares it with what the listing says of it.

        Raises:
            NoAnswerError: it does not come, or not whole, in three attempts.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        query = {"Source": "SDK", "Revision": self.revision, "FilePath": file.path}
        url = f"{self.address}?{urlencode(query)}"
        _retried(partial(_write_checked, url, file, target))

    def _listing_page(self, page: int) -> list[ListedFile]:
        query = {"Revision": self.revision, "Recursive": "True"}
        paging = {"PageNumber": page, "PageSize": LISTING_PAGE_FILES}
        body = b"".join(_stream(f"{self.address}/tree?{urlencode(query | paging)}"))
        try:
            listing = msgspec.json.decode(body, type=Listing)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = f"a listing that cannot be read: {error}"
            raise NoAnswerError(reason, may_pass=True) from error
        if not listing.is_success:
            raise NoAnswerError(listing.message or "no reason", may_pass=False, status=404)
        data = listing.data
        return (data.files or []) if isinstance(data, ListedFiles) else (data or [])


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not {"..", "/"} & set(parts) and "\\" not in path and "\0" not in path


def _write_checked(url: str, file: ListedFile, target: Path) -> None:
    digest = hashlib.sha256()
    size = 0
    with target.open("wb") as output:
        for chunk in _stream(url):
            output.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    if file.size is not None and size != file.size:
        raise NoAnswerError(f"{size} of {file.size} bytes of {file.path}", may_pass=True)
    if file.sha256 and digest.hexdigest() != file.sha256.lower():
        reason = f"{file.path} with another SHA-256 than the listing has"
        raise NoAnswerError(reason, may_pass=True)


def _retried(action: Callable[[], T]) -> T:
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except NoAnswerError as error:
            if not error.may_pass:
                raise
            time.sleep(RETRY_SECONDS * 2**attempt)
    return action()


def _stream(url: str) -> Iterator[bytes]:
    """The bytes behind an address, in pieces."""
    if not url.startswith(("https://", "http://")):
        raise NoAnswerError("an address without http or https", may_pass=False)
    try:
        # S310 warns of other schemes than http: they were refused above.
        with urllib.request.urlopen(_request(url), timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            while chunk := answer.read(CHUNK_BYTES):
                yield chunk
            if answer.length:
                reason = f"the connection ended {answer.length} bytes early"
                raise NoAnswerError(reason, may_pass=True)
    except urllib.error.HTTPError as error:
        with error:
            reason = f"HTTP {error.code} {error.reason}"
        may_pass = error.code == 429 or error.code >= 500
        raise NoAnswerError(reason, may_pass=may_pass, status=error.code) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswerError(str(error) or type(error).__name__, may_pass=True) from error


def _request(url: str) -> urllib.request.Request:
    request = urllib.request.Request(url, headers={"User-Agent": "tunesmith"})  # noqa: S310
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    if token:
        # Not sent on after a redirect: the files themselves lie with other hosts.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
        request.add_unredirected_header("Cookie", f"m_session_id={token}")
    return request
