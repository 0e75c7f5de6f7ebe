"""The files of a target store that lies elsewhere: in a bucket (S3, Google, Azure), on a web server, or at a file URL.

Every key of a store is known by arithmetic, so nothing is listed and nothing is written here: a key is read whole, or
found absent. Buckets are read through obstore, an optional dependency (zarr's `ObjectStore` over it hands out whole
values asynchronously and never a size before the bytes, so it would save nothing). Web and file URLs are read with the
standard library: anybody's server may stand behind them, and obstore takes the body of an *error* into memory whole,
so that one hostile "404, 10 TB follow" ends the process.
"""

from __future__ import annotations

import base64
import difflib
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

from store.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

METADATA_BYTES = 16 * 2**20
"""What `RemoteFolder.read` takes at the most unless translate_os_errors: far above any zarr.json, far below the memory."""

_CHUNK_BYTES = 2**20
_STALL_S = 10
"""A server that sends nothing for so long is given up; a slow one that keeps sending is not."""
_RETRY_WAITS_S = (0.1, 0.2, 0.4)

_WEB_SCHEMES = ("https", "http", "file")
_ADVICE = {
    "s3": "AWS_ENDPOINT_URL, AWS_REGION and the keys in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or AWS_SKIP_SIGNATURE=true for a public bucket; ~/.aws is not read)",
    "gs": "the credentials in the environment (GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a "
    "public bucket)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and the key in the environment (AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true for a public container)",
    "https": "that the server is up and lets you in",
    "http": "that the server is up and lets you in",
    "file": "that this user may read it",
}
_ENDPOINT_NAMES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
)
_NO_BUCKET = re.compile("<Code>(NoSuchBucket|ContainerNotFound)</Code>")


@dataclass(frozen=True)
class _Object:
    """An object that is there: its size as the server tells it, or None, and its bytes, not yet asked for."""

    num_bytes: int | None
    chunks: Iterator[bytes]


_Open = Callable[[str, bool], AbstractContextManager[_Object | None]]
"""(key, head only) -> the object, or None where there is none, with its connection held until the block ends."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder elsewhere, made by `open_remote`. Threads may share it, and it pickles for worker processes.

    `url` is for people: user, password and query are left out of it, and of every message.
    """

    url: str
    _open: _Open = field(repr=False)

    def read(self, key: str, max_bytes: int = METADATA_BYTES) -> bytes | None:
        """All bytes of one object, or None where there is none.

        An object that is said to be larger than `most_bytes` is refused before its bytes are asked for, and one that
        sends more or fewer bytes than it said is refused as well. (S3 answers 403, not 404, for an absent key of a
        bucket that this user may not list: that is an error here.)

        Raises:
            StoreError: anything else than "here it is" or "there is none", or an object of another size.
        """
        with self._translate_os_errors(key), self._open(_checked(key), False) as found:
            if found is None:
                return None
            if found.num_bytes is not None and found.num_bytes > max_bytes:
                raise self._wrong_size(key, f"has {found.num_bytes} bytes where at most {max_bytes} belong")
            return self._whole(key, found, max_bytes)

    def num_bytes(self, key: str) -> int | None:
        """The size of one object without its bytes, or None where there is none; a bucket that is not there is none.

        Raises:
            StoreError: the server cannot be asked, refuses, or does not tell a size.
        """
        with self._translate_os_errors(key), self._open(_checked(key), True) as found:
            if found is not None and found.num_bytes is None:
                raise self._wrong_size(key, "has a size that the server does not tell")
            return None if found is None else found.num_bytes

    def _whole(self, key: str, found: _Object, max_bytes: int) -> bytes:
        """What was said about the size is not believed: the bytes are counted as they come."""
        bound = max_bytes if found.num_bytes is None else found.num_bytes
        chunks, received = [], 0
        for chunk in found.chunks:
            received += len(chunk)
            if received > bound:
                raise self._wrong_size(key, f"sends more than the {bound} bytes that belong to it")
            chunks.append(chunk)
        if found.num_bytes is not None and received < found.num_bytes:
            raise OSError(f"the connection ended after {received} of {found.num_bytes} bytes")
        return b"".join(chunks)

    def _wrong_size(self, key: str, fault: str) -> StoreError:
        return StoreError(f"{key} of {self.url} {fault}; it is not read: check that this is the store that you mean")

    @contextmanager
    def _translate_os_errors(self, key: str) -> Iterator[None]:
        """One sentence for whatever went wrong. `from None`: the errors below carry the URL with its secrets."""
        try:
            yield
        except _failures() as error:
            raise StoreError(f"cannot read {key!r} of {self.url}: {_cause(error)}; {_advice(self.url)}") from None


def is_url(where: str | Path) -> bool:
    """Whether `where` has a scheme, as in `s3://bucket/prefix`. A `Path` never has: it turns `//` into `/`."""
    return isinstance(where, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def open_remote(url: str) -> RemoteFolder:
    """The folder at `url`: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, https://, http:// or file://.

    Nothing is asked of the network yet. Credentials and endpoints of buckets come from the environment (AWS_*,
    GOOGLE_*, AZURE_*); an endpoint that starts with http:// is used as it is. A web URL may carry `user:password@`,
    sent as HTTP basic authentication, and a query, sent with every key.

    Raises:
        StoreError: not such a URL, or obstore is wanted and not installed.
    """
    parts = _parsed(url)
    parts = parts._replace(path=parts.path.rstrip("/"), fragment="")
    public = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.scheme in _WEB_SCHEMES:
        return RemoteFolder(public, _web_opener(parts))
    if "@" in parts.netloc or parts.query:
        raise StoreError(
            f"the address of {public} carries a password or a query, which buckets do not take; leave it out and check "
            f"{_ADVICE[parts.scheme]}"
        )
    return RemoteFolder(public, partial(_open_in_bucket, _bucket(public)))


def _parsed(url: str) -> SplitResult:
    """The parts of a URL that can be read. One that cannot be parsed is not printed: where is its password?"""
    scheme = url.partition("://")[0].lower()
    if not is_url(url) or scheme not in _ADVICE:
        near = difflib.get_close_matches(scheme, _ADVICE, n=1, cutoff=0.5)
        raise StoreError(
            f"a remote store's address starts with one of {', '.join(f'{known}://' for known in _ADVICE)}, not "
            f"{scheme[:20]!r}" + (f"; did you mean {near[0]}://?" if near else "; a folder on this machine is no URL")
        )
    try:
        parts = urlsplit(url)
        clear = parts.port != 0 and not re.search(r"\s", url)  # asked for, a port that is no number raises
    except ValueError:
        clear = False
    if not clear or not (parts.hostname or scheme == "file"):
        raise StoreError(
            f"this {scheme}:// address cannot be parsed; write {scheme}://host-or-bucket/path, and percent-encode "
            "spaces, and / and @ in a password"
        )
    return parts


def _checked(key: str) -> str:
    """The key, if it stays below its folder: relative, no `..`, no empty part."""
    if "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(f"{key!r} is no key of a store: keys are relative and without '..'; the store is damaged")
    return key


def _bucket(url: str) -> ObjectStore:
    """A bucket's obstore handle, with retries and waits that end within seconds on a dead endpoint.

    The whole answer may take an hour (obstore's own 30 s would cut a shard of 256 MiB on a slow link); a stall may not.
    """
    try:
        from obstore.store import from_url
    except ImportError:
        raise StoreError(f"reading {url} needs obstore: pip install 'kdpipe[remote]'") from None
    plain_http = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINT_NAMES)
    try:
        return from_url(
            url,
            client_options={
                "allow_http": plain_http,
                "connect_timeout": "3s",
                "read_timeout": f"{_STALL_S}s",
                "timeout": "1h",
            },
            retry_config={"max_retries": len(_RETRY_WAITS_S), "retry_timeout": timedelta(minutes=1)},
        )
    except _failures() as error:
        raise StoreError(f"cannot open {url}: {_cause(error)}; {_advice(url)}") from None


@contextmanager
def _open_in_bucket(bucket: ObjectStore, key: str, head: bool) -> Iterator[_Object | None]:
    yield _in_bucket(bucket, key, head)  # obstore lets go of the connection with the last reference


def _in_bucket(bucket: ObjectStore, key: str, head: bool) -> _Object | None:
    import obstore

    try:
        if head:
            return _Object(obstore.head(bucket, key)["size"], iter(()))
        found = obstore.get(bucket, key)
    except FileNotFoundError as error:
        if _NO_BUCKET.search(str(error)):
            raise
        return None
    return _Object(found.meta["size"], found.stream(_CHUNK_BYTES))


def _web_opener(parts: SplitResult) -> _Open:
    """urllib sends no `user:password@` by itself, so it is taken out of the URL and put in a header."""
    login, _, host = parts.netloc.rpartition("@")
    basic = f"Basic {base64.b64encode(unquote(login).encode()).decode()}" if login else None
    return partial(_open_on_web, parts._replace(netloc=host), basic)


@contextmanager
def _open_on_web(base: SplitResult, basic: str | None, key: str, head: bool) -> Iterator[_Object | None]:
    url = base._replace(path=f"{base.path}/{quote(key)}").geturl()
    request = Request(url, method="HEAD" if head else "GET")
    if basic:
        request.add_unredirected_header("Authorization", basic)  # a redirect may lead to somebody else's server
    response = _answer(request)
    if response is None:
        yield None
        return
    with response:
        size = response.headers["Content-Length"]
        yield _Object(None if size is None else int(size), iter(partial(response.read, _CHUNK_BYTES), b""))


def _answer(request: Request) -> HTTPResponse | None:
    """The server's answer, or None where there is nothing.

    It is asked again where the fault may pass: a connection lost, a server in trouble (5xx). The body of a refusal is
    not read.
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
    """What a transport may raise; obstore's own errors count once it has been imported."""
    errors: tuple[type[Exception], ...] = (OSError, ValueError, HTTPException)
    if sys.modules.get("obstore") is None:
        return errors
    from obstore.exceptions import BaseError

    return (*errors, BaseError)


def _cause(error: Exception) -> str:
    """What went wrong, in one printable line without the tags of an XML answer, without passwords and queries.

    Servers write part of it, so it is cut, and control characters do not reach a terminal.
    """
    text = str(getattr(error, "reason", None) or error).partition("\n\nDebug source:")[0]
    if (code := getattr(error, "code", None)) is not None:
        text = f"HTTP {code} {text}"
    text = re.sub(r"://[^/\s]*@", "://", re.sub(r"\?\S*", "", text))
    text = " ".join(re.sub(r"<[^<>]*>", " ", text).split())
    return "".join(letter for letter in text if letter.isprintable())[:400].rstrip(" :.") or type(error).__name__


def _advice(url: str) -> str:
    return f"check the address, the network, and {_ADVICE[url.partition('://')[0]]}"
