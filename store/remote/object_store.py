"""Read the files of a remote target store: in a bucket (S3, Google, Azure), on a web server, or at a file URL.

Keys of a store are known by arithmetic, so nothing is listed and nothing is written: a key is read whole, or is absent.
Buckets are read through obstore, an optional dependency (zarr's `ObjectStore` over it returns whole values
asynchronously and no size before the bytes, so it would save nothing). Web and file URLs use the standard library:
the server is untrusted, and obstore reads the body of an *error* into memory whole, so that one hostile "404, 10 TB
follow" ends the process.
"""

from __future__ import annotations

import base64
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import Request, urlopen

from kdpipe.store.errors import StoreError, did_you_mean
from kdpipe.store.format.schema import METADATA_BYTES
from kdpipe.store.redact import is_redacted
from kdpipe.store.remote.watched import watched

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_CHUNK_BYTES = 2**20
_BUCKET_CHUNK_BYTES = 2**14
"""Small, as obstore waits for a whole chunk, and what has arrived distinguishes a slow server from a stalled one."""

_STALL_S = 10
"""Timeout for a server that sends nothing; for one that sends next to nothing see `watched`."""
_RETRY_WAITS_S = (0.1, 0.2, 0.4)

_WEB_SCHEMES = ("https", "http", "file")
_ADVICE = {
    "s3": "AWS_ENDPOINT_URL, AWS_REGION and the keys in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or AWS_SKIP_SIGNATURE=true for a public bucket; ~/.aws is not read)",
    "gs": "the credentials in the environment (GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a "
    "public bucket)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and the key in the environment (AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true for a public container)",
    **dict.fromkeys(("https", "http", "file"), "that the server is up and lets this user read"),
}
_ENDPOINT_NAMES = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    *("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "GOOGLE_BASE_URL"),
)
_NO_BUCKET = re.compile("<Code>(NoSuchBucket|ContainerNotFound)</Code>")


@dataclass(frozen=True)
class _Object:
    """An existing object: its size as stated by the server, or None, and its bytes, not yet requested."""

    num_bytes: int | None
    chunks: Iterator[bytes]


def _go_on() -> None:
    pass


@dataclass(frozen=True)
class RemoteFolder:
    """A remote folder, made by `open_remote`. Thread-safe, and picklable for worker processes.

    `url` is for messages: user, password and query are omitted from it, and from every message. `_open` returns an
    object by key, None if absent; its connection is open inside the context. `_check` is called while a server is
    waited for, and may raise.
    """

    url: str
    _open: Callable[[str], AbstractContextManager[_Object | None]] = field(repr=False)
    _check: Callable[[], None] = field(repr=False, default=_go_on)

    def read(self, key: str, max_bytes: int = METADATA_BYTES) -> bytes | None:
        """Return all bytes of one object, or None where there is none (S3 answers 403 if listing is forbidden).

        An object whose stated size exceeds `max_bytes` is refused before its bytes are requested; so is one that sends
        more or fewer bytes than stated. Raises StoreError there, and where the server fails or refuses.
        """

        def download(count: Callable[[int], None]) -> bytes | None:
            with self._open(key) as found:
                return None if found is None else self._whole(key, found, max_bytes, count)

        try:
            return watched(download, self._check)
        except _failures() as error:  # `from None`: they contain the URL with its secrets
            raise StoreError(f"cannot read {key!r} of {self.url}: {_cause(error)}; {_advice(self.url)}") from None

    def _whole(self, key: str, found: _Object, max_bytes: int, count: Callable[[int], None]) -> bytes:
        """Read an object, counting the bytes as they arrive instead of trusting the stated size."""
        if found.num_bytes is not None and found.num_bytes > max_bytes:
            raise self._wrong_size(key, f"has {found.num_bytes} bytes where at most {max_bytes} are expected")
        bound = max_bytes if found.num_bytes is None else found.num_bytes
        chunks, received = [], 0
        for chunk in found.chunks:
            count(len(chunk))
            received += len(chunk)
            if received > bound:
                raise self._wrong_size(key, f"sends more than the expected {bound} bytes")
            chunks.append(chunk)
        if found.num_bytes is not None and received < found.num_bytes:
            raise OSError(f"the connection ended after {received} of {found.num_bytes} bytes")
        return b"".join(chunks)

    def _wrong_size(self, key: str, fault: str) -> StoreError:
        return StoreError(f"{key} of {self.url} {fault}; it is not read: check that the address is right")


def is_url(where: str | Path) -> bool:
    """Return whether `where` has a scheme, as in `s3://bucket/prefix`. A `Path` never has: it turns `//` into `/`."""
    return isinstance(where, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def open_remote(url: str, check: Callable[[], None] = _go_on) -> RemoteFolder:
    """Return the folder at `url`: s3://bucket/prefix, gs://, az://container/prefix, https://, http:// or file://.

    Nothing is requested yet. Credentials and endpoints of buckets come from the environment (AWS_*, GOOGLE_*, AZURE_*).
    A web URL may have `user:password@`, sent as HTTP basic authentication, and a query, sent with every key. `check` is
    called while a server is waited for, and may raise, to stop. Raises StoreError if the URL is invalid, or obstore is
    needed and not installed.
    """
    if is_redacted(url):
        raise StoreError(
            f"the password or the query of {url} was left out where it was written: give the whole address, in the "
            "recipe, by --set student.stores or in the variable KDPIPE_STUDENT__STORES."
        )
    parts = _parsed(url)
    parts = parts._replace(path=parts.path.rstrip("/"), fragment="")
    public = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.scheme in _WEB_SCHEMES:
        return RemoteFolder(public, partial(_open_on_web, parts), check)
    if "@" in parts.netloc or parts.query:
        raise StoreError(
            f"the address of {public} carries a password or a query, which buckets do not take; leave it out and check "
            f"{_ADVICE[parts.scheme]}"
        )
    return RemoteFolder(public, partial(_open_in_bucket, _bucket(public)), check)


def _parsed(url: str) -> SplitResult:
    """Parse a URL. An invalid one is not printed, as it may contain a password."""
    scheme = url.partition("://")[0].lower()
    if not is_url(url) or scheme not in _ADVICE:
        hint = did_you_mean(scheme, _ADVICE, otherwise="a folder on this machine is not a URL")
        raise StoreError(
            f"a remote store's address starts with one of {', '.join(f'{known}://' for known in _ADVICE)}, not "
            f"{scheme[:20]!r}; {hint}"
        )
    try:
        parts = urlsplit(url)
        clear = parts.port != 0 and not re.search(r"\s", url)  # reading an invalid port raises
    except ValueError:
        clear = False
    if not clear or not (parts.hostname or scheme == "file"):
        raise StoreError(
            f"this {scheme}:// address cannot be parsed; write {scheme}://host-or-bucket/path, and percent-encode "
            "spaces, and / and @ in a password"
        )
    return parts


def _bucket(url: str) -> ObjectStore:
    """Return a bucket's obstore handle, with retries and timeouts that end within seconds on a dead endpoint.

    The whole answer may take an hour (obstore's own 30 s would cut a shard of 256 MiB on a slow link); a stall may not.
    """
    try:
        from obstore.store import from_url
    except ImportError:
        raise StoreError(f"reading {url} needs obstore: pip install 'kdpipe[remote]'") from None
    plain_http = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINT_NAMES)
    stall = f"{_STALL_S}s"
    try:
        return from_url(
            url,
            client_options={"allow_http": plain_http, "connect_timeout": "3s", "read_timeout": stall, "timeout": "1h"},
            retry_config={"max_retries": len(_RETRY_WAITS_S), "retry_timeout": timedelta(minutes=1)},
        )
    except _failures() as error:
        raise StoreError(f"cannot open {url}: {_cause(error)}; {_advice(url)}") from None


@contextmanager
def _open_in_bucket(bucket: ObjectStore, key: str) -> Iterator[_Object | None]:
    import obstore

    try:
        found = obstore.get(bucket, key)  # obstore closes the connection with the last reference
    except FileNotFoundError as error:
        if _NO_BUCKET.search(str(error)):
            raise
        yield None
    else:
        yield _Object(found.meta["size"], found.stream(_BUCKET_CHUNK_BYTES))


@contextmanager
def _open_on_web(base: SplitResult, key: str) -> Iterator[_Object | None]:
    """Open one file of a web folder. urllib ignores `user:password@`, so it is moved from the URL to a header."""
    login, _, host = base.netloc.rpartition("@")
    request = Request(base._replace(netloc=host, path=f"{base.path}/{quote(key)}").geturl())
    if login:
        basic = f"Basic {base64.b64encode(unquote(login).encode()).decode()}"
        request.add_unredirected_header("Authorization", basic)  # a redirect may lead to another server
    response = _answer(request)
    if response is None:
        yield None
        return
    with response:
        size = response.headers["Content-Length"]
        yield _Object(None if size is None else _num_bytes(size), iter(partial(response.read1, _CHUNK_BYTES), b""))


def _num_bytes(size: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", size):
        raise ValueError(f"its Content-Length is {size[:40]!r}")
    return int(size)


def _answer(request: Request) -> HTTPResponse | None:
    """Return the server's answer, or None where there is no such object.

    Passing faults are retried: a lost connection, a server error (5xx). The body of an error is not read.
    """
    for wait_s in (*_RETRY_WAITS_S, None):
        try:
            response: HTTPResponse = urlopen(request, timeout=_STALL_S)
        except OSError as error:
            cause, code = getattr(error, "reason", error), getattr(error, "code", 0)
            if isinstance(error, HTTPError):
                error.close()
            if code in (404, 410) or isinstance(cause, FileNotFoundError):
                return None
            if wait_s is None or not (code >= 500 or isinstance(cause, ConnectionError)):
                raise
            time.sleep(wait_s)
        else:
            return response
    raise AssertionError("the last try returns or raises")


def _failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of the transports; obstore's own once it has been imported."""
    errors: tuple[type[Exception], ...] = (OSError, ValueError, HTTPException)
    if sys.modules.get("obstore") is None:
        return errors
    from obstore.exceptions import BaseError

    return (*errors, BaseError)


def _cause(error: Exception) -> str:
    """Return the cause as one printable line without XML tags, passwords and queries.

    Parts of it come from the server, so it is cut, and control characters are removed.
    """
    text = str(getattr(error, "reason", None) or error).partition("\n\nDebug source:")[0]
    if (code := getattr(error, "code", None)) is not None:
        text = f"HTTP {code} {text}"
    text = re.sub(r"://[^/\s]*@", "://", re.sub(r"\?\S*", "", text))
    text = " ".join(re.sub(r"<[^<>]*>", " ", text).split())
    return "".join(letter for letter in text if letter.isprintable())[:400].rstrip(" :.") or type(error).__name__


def _advice(url: str) -> str:
    return f"check the address, the network, and {_ADVICE[url.partition('://')[0]]}"
