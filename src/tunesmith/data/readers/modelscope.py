"""ModelScope's data set repositories over its HTTP API: list the files, download one.

Its own client would be a large dependency for these two calls. What fails in passing is asked for
again, with longer and longer pauses, and a file goes on behind the bytes that have come. Not
covered: going on with files that another process began; a server that sends a byte now and then.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlencode

import msgspec

from tunesmith.io.fault import fault
from tunesmith.io.retry import NoAnswerError, retried

DEFAULT_ENDPOINT = "https://www.modelscope.cn"
DEFAULT_REVISION = "master"
LISTING_PAGE_FILES = 200
MAX_LISTING_PAGES = 5_000
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0
"""Without a byte for so long a connection is given up."""


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
            entries = retried(partial(self._listing_page, page))
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
            NoAnswerError: it does not come, or not as it is listed, in ATTEMPTS attempts.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        query = {"Source": "SDK", "Revision": self.revision, "FilePath": file.path}
        url = f"{self.address}?{urlencode(query)}"
        download = _Download(url, file, target)
        retried(download.go_on, download.num_bytes)

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


@dataclass
class _Download:
    """A file on its way: what has come stays, and the next attempt asks for the rest."""

    url: str
    file: ListedFile
    target: Path
    version: str | None = None
    """The ETag of what has come; a server whose file has another one then sends it all."""

    def num_bytes(self) -> int:
        return self.target.stat().st_size if self.target.exists() else 0

    def go_on(self) -> None:
        """Fetches what is missing, and compares the whole with the listing."""
        start = self.num_bytes()
        if self.file.size is None or start < self.file.size or not start:
            self._fetch_from(start)
        problem = self._difference()
        if problem is not None:
            self.target.unlink()
            raise NoAnswerError(problem, may_pass=True)

    def _fetch_from(self, start: int) -> None:
        try:
            self._append(start)
        except NoAnswerError as error:
            if error.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                self.target.unlink()  # more has come than there is: from the start again
            raise

    def _append(self, start: int) -> None:
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and self.version is not None:
            headers["If-Range"] = self.version
        with _answer(self.url, headers) as answer, self.target.open("ab") as output:
            if answer.status != http.client.PARTIAL_CONTENT:
                output.truncate(0)  # a server without ranges sends everything
            self.version = answer.headers["ETag"]
            size = output.seek(0, os.SEEK_END)
            for piece in _pieces(answer):
                output.write(piece)
                size += len(piece)
                if self.file.size is not None and size > self.file.size:
                    break

    def _difference(self) -> str | None:
        """What is not as listed."""
        size, listed = self.num_bytes(), self.file
        if listed.size is not None and size != listed.size:
            return f"{size} of {listed.size} bytes of {listed.path}"
        if not listed.sha256:
            return None
        with self.target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        is_same = digest == listed.sha256.lower()
        return None if is_same else f"{listed.path} with another SHA-256 than the listing has"


def _stream(url: str) -> Iterator[bytes]:
    """The bytes behind an address, in pieces."""
    with _answer(url, {}) as answer:
        yield from _pieces(answer)


@contextmanager
def _answer(url: str, headers: Mapping[str, str]) -> Generator[http.client.HTTPResponse]:
    """A good answer from an address.

    Raises:
        NoAnswerError: there is none; also for what goes wrong with the connection in the block.
    """
    if not url.startswith(("https://", "http://")):
        raise NoAnswerError("an address without http or https", may_pass=False)
    try:
        # S310 warns of other schemes than http: they were refused above.
        answer = urllib.request.urlopen(_request(url, headers), timeout=TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _broken(error) from error
    with answer:
        yield answer


def _pieces(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while True:
            fault("net.read")
            # read1 gives what is there: of a broken connection nothing is lost that has come.
            piece = answer.read1(CHUNK_BYTES)
            if not piece:
                break
            yield piece
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _broken(error) from error
    if answer.length:
        raise NoAnswerError(f"the connection ended {answer.length} bytes early", may_pass=True)


def _broken(error: Exception) -> NoAnswerError:
    return NoAnswerError(str(error) or type(error).__name__, may_pass=True)


def _refusal(error: urllib.error.HTTPError) -> NoAnswerError:
    may_pass = error.code in (408, 416, 429) or error.code >= 500
    wait = error.headers["Retry-After"] or ""
    return NoAnswerError(
        f"HTTP {error.code} {error.reason}",
        may_pass=may_pass,
        status=error.code,
        wait_seconds=float(wait) if wait.isdecimal() else None,
    )


def _request(url: str, headers: Mapping[str, str]) -> urllib.request.Request:
    sent = {"User-Agent": "tunesmith", **headers}
    request = urllib.request.Request(url, headers=sent)  # noqa: S310
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    if token:
        # Not sent on after a redirect: the files themselves lie with other hosts.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
        request.add_unredirected_header("Cookie", f"m_session_id={token}")
    return request
