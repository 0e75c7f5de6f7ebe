"""Remote files: identical bytes, or one clear sentence without secrets."""

import pickle
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.s3_server import SECRET, s3_environment, s3_server, upload_folder

from kdpipe.stages.errors import StoppedEarly
from kdpipe.store.errors import StoreError
from kdpipe.store.remote import watched
from kdpipe.store.remote.object_store import is_url, open_remote

FILES = {
    "zarr.json": b'{"node_type": "group"}',
    "logits/c/0/3/0": bytes(range(256)) * 9000,  # some MB: more than one chunk on its way
    "markers/c/1/0/0": b"",
}
PLACES = ["s3", "http", "file"]


ASKED: list[tuple[str, str, str | None]] = []
"""What the web server was asked in this test: (method, path, authorization)."""


class Handler(SimpleHTTPRequestHandler):
    """A web server of files, with paths that are busy, forbidden or redirected."""

    def parse_request(self) -> bool:
        known = super().parse_request()
        ASKED.append((self.command, self.path, self.headers["Authorization"]))
        return known

    def send_head(self):
        if self.path.startswith("/busy/") and len(ASKED) < 3:
            self.send_error(503)
        elif self.path.startswith("/private/"):
            self.send_error(403)
        elif self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
        else:
            self.path = self.path.removeprefix("/busy")
            return super().send_head()
        return None

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remote") / "a b"
    for key, content in FILES.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def web(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder.parent)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def urls(folder, endpoint, web):
    """The same files in every place, by scheme."""
    return {
        "s3": upload_folder(endpoint, "bucket", "some/prefix", folder),
        "http": f"http://{web}/a%20b",
        "file": folder.as_uri(),
    }


@pytest.fixture(autouse=True)
def s3_variables(endpoint, monkeypatch):
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    ASKED.clear()


def refused(wanted: str, call, *arguments) -> str:
    with pytest.raises(StoreError, match=wanted) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


@pytest.mark.parametrize("place", PLACES)
def test_reads_stored_bytes(urls, place):
    remote = open_remote(urls[place])
    assert {key: remote.read(key) for key in FILES} == FILES
    assert open_remote(urls[place] + "/").read("zarr.json") == FILES["zarr.json"]


@pytest.mark.parametrize("place", PLACES)
def test_an_absent_key_is_none(urls, place):
    remote = open_remote(urls[place])
    assert remote.read("logits/c/0/4/0") is None
    assert open_remote(urls[place] + "-not").read("zarr.json") is None


@pytest.mark.parametrize("place", PLACES)
def test_object_above_max_bytes_is_refused(urls, place):
    remote, size = open_remote(urls[place]), len(FILES["logits/c/0/3/0"])
    refused(
        f"logits/c/0/3/0 of .* has {size} bytes where at most {size - 1} are expected",
        remote.read,
        "logits/c/0/3/0",
        size - 1,
    )
    assert remote.read("logits/c/0/3/0", size) == FILES["logits/c/0/3/0"]


@pytest.mark.parametrize("place", PLACES)
def test_pickles_for_worker_processes(urls, place):
    assert pickle.loads(pickle.dumps(open_remote(urls[place]))).read("zarr.json") == FILES["zarr.json"]


def test_absent_bucket_differs_from_absent_key(endpoint):
    message = refused("NoSuchBucket", open_remote("s3://no-bucket/prefix").read, "zarr.json")
    assert message.startswith("cannot read 'zarr.json' of s3://no-bucket/prefix: ")
    assert "AWS_ACCESS_KEY_ID" in message


def test_no_permission_differs_from_absent_key(urls, web, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    refused("403 Forbidden; check .* AWS_", open_remote(urls["s3"]).read, "zarr.json")
    refused("HTTP 403 Forbidden; check ", open_remote(f"http://{web}/private").read, "zarr.json")


def test_dead_endpoint_is_reported_after_retries(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", dead)
    message = refused("s3://bucket/prefix: .* after 3 retries", open_remote("s3://bucket/prefix").read, "zarr.json")
    assert dead in message
    refused("Connection refused; check", open_remote(f"{dead}/x").read, "zarr.json")


def test_server_errors_are_retried(web):
    assert open_remote(f"http://{web}/busy/a%20b").read("zarr.json") == FILES["zarr.json"]
    assert len(ASKED) == 3


def test_obstore_is_wanted_for_buckets_alone(urls, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    message = refused("obstore", open_remote, "s3://bucket/prefix")
    assert message == "reading s3://bucket/prefix needs obstore: pip install 'kdpipe[remote]'"
    assert open_remote(urls["http"]).read("zarr.json") == FILES["zarr.json"]


def test_credentials_and_query_reach_server_but_no_message(web):
    remote = open_remote(f"http://me:p%40ss@{web}/a%20b?sig=hush")
    assert remote.read("zarr.json") == FILES["zarr.json"]
    assert ASKED == [("GET", "/a%20b/zarr.json?sig=hush", "Basic bWU6cEBzcw==")]
    remote = open_remote(f"http://me:p%40ss@{web}/private/x?sig=hush")
    message = refused(f"'zarr.json' of http://{web}/private/x: ", remote.read, "zarr.json")
    for secret in ("me:", "p%40ss", "p@ss", "hush"):
        assert secret not in message + repr(remote) + remote.url


def test_a_redirect_is_followed_without_the_password(web):
    assert open_remote(f"http://me:word@{web}/moved/a%20b").read("zarr.json") == FILES["zarr.json"]
    assert [authorization for *_, authorization in ASKED] == ["Basic bWU6d29yZA==", None]


def test_the_keys_of_the_environment_are_in_no_message(urls):
    message = refused("NoSuchBucket", open_remote("s3://no-bucket/x").read, "zarr.json")
    assert SECRET not in message + repr(open_remote(urls["s3"]))


@contextmanager
def one_answer(head: str, body: bytes = b"", times: int = 1):
    """Serve one request with these bytes, whatever was requested, and count what was sent."""
    sent = []

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(20)
        with connection:
            connection.recv(65536)
            connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
            for _ in range(times):
                try:
                    connection.sendall(body)
                except OSError:
                    return
                sent.append(len(body))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=answer, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x", sent
        thread.join(timeout=30)


CHUNK = b"10000\r\n" + b"x" * 65536 + b"\r\n"


@pytest.mark.parametrize("said", ["", "\nContent-Length: 5"])
def test_server_sending_too_much_cannot_fill_memory(said):
    head = f"HTTP/1.1 200 OK\nTransfer-Encoding: chunked{said}"
    with one_answer(head, CHUNK, times=4000) as (url, sent):
        refused("zarr.json of .* sends more than the", open_remote(url).read, "zarr.json", 10)
    assert sum(sent) < 64 * 2**20


def test_a_refusal_with_an_endless_body_is_not_read():
    with one_answer(f"HTTP/1.1 404 Not Found\nContent-Length: {10**13}", b"x" * 65536, times=4000) as (url, sent):
        assert open_remote(url).read("zarr.json") is None
    assert sum(sent) < 64 * 2**20


def test_half_an_object_is_an_error():
    with one_answer("HTTP/1.1 200 OK\nContent-Length: 50", b"half") as (url, _):
        refused("the connection ended after 4 of 50 bytes", open_remote(url).read, "zarr.json")


def test_object_of_unstated_size_is_read():
    with one_answer("HTTP/1.1 200 OK\nConnection: close", b"whole") as (url, _):
        assert open_remote(url).read("zarr.json") == b"whole"


@contextmanager
def trickling(head: bytes):
    """Serve one byte every 20 ms after `head`, for ever or until the client leaves."""
    leaving = threading.Event()

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            with suppress(OSError):
                connection.sendall(head)
                while not leaving.wait(0.02):
                    connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        leaving.set()
        thread.join(timeout=30)


HEADS = {
    "in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
    "in the headers": b"HTTP/1.1 200 OK\r\nX: ",
    "before it answers": b"",
}


@pytest.mark.parametrize("where", HEADS)
def test_a_server_that_trickles_is_left(monkeypatch, where):
    monkeypatch.setattr(watched, "WINDOW_S", 0.2)
    with trickling(HEADS[where]) as url:
        refused("the server sent .* bytes in 0.2 s, fewer than 1,024 a second", open_remote(url).read, "zarr.json")


@pytest.mark.parametrize("where", HEADS)
def test_a_stop_request_ends_a_download(where):
    checks = []

    def check() -> None:
        checks.append(None)
        if len(checks) > 2:
            raise StoppedEarly("at SIGTERM")

    with trickling(HEADS[where]) as url, pytest.raises(StoppedEarly):
        open_remote(url, check).read("zarr.json")


def test_a_negative_size_is_an_error():
    with one_answer("HTTP/1.1 200 OK\nContent-Length: -5") as (url, _):
        refused("'zarr.json' of", open_remote(url).read, "zarr.json")


def test_server_text_is_stripped_of_control_characters():
    with one_answer("HTTP/1.1 418 \x1b[2Jhttp://a:hush@b/?sig=hush" + "x" * 5000) as (url, _):
        message = refused("HTTP 418", open_remote(url).read, "zarr.json")
    assert message.isprintable()
    assert "hush" not in message
    assert len(message) < 800


def test_unreachable_server_is_reported():
    with one_answer("SSH-2.0-OpenSSH") as (url, _):
        refused("SSH-2.0-OpenSSH; check", open_remote(url).read, "zarr.json")


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("s4://bucket/x", "not 's4'; did you mean 's3'"),
        ("runs/a", "a folder on this machine is not a URL"),
        ("ftp://host/x", "starts with one of s3://"),
        ("s3://", "cannot be parsed"),
        ("http://host:port/x", "cannot be parsed"),
        ("http://[bad/x", "cannot be parsed"),
        ("http://me:hush/word@host/x", "percent-encode "),
        ("http://host/x?sig=hush word", "percent-encode "),
        ("s3://me:hush@bucket/x", "of s3://bucket/x carries a password"),
        ("http://...@host/x", "left out where it was written: give the whole"),
        ("s3://bucket/x?sig=hush", "of s3://bucket/x carries a password or a query"),
    ],
)
def test_invalid_address_is_reported_without_secrets(url, wanted):
    assert "hush" not in refused(wanted, open_remote, url)


def test_missing_account_is_reported(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    refused(
        "cannot open az://container/x: .*Account must be specified; check .* AZURE_STORAGE",
        open_remote,
        "az://container/x",
    )


def test_google_and_azure_addresses_are_taken(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    for url in ("gs://bucket/prefix", "az://container/prefix"):
        assert repr(open_remote(url)) == f"RemoteFolder(url='{url}')"


def test_only_a_string_with_a_scheme_is_a_url():
    assert [is_url(where) for where in ("s3://b/x", "file:///x", "HTTPS://h")] == [True] * 3
    assert [is_url(where) for where in ("runs/a", "/runs/a", "c:/x", "://x", Path("s3://b/x"))] == [False] * 5
