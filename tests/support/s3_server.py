"""A server of the S3 protocol on loopback, in a process of its own, shared by many tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import obstore
from obstore.store import S3Store

# Standard input ends when the tests do, however they end: the server never outlives them.
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
"""

SECRET = "wJalrXUtnFEMI"


@contextmanager
def s3_server() -> Iterator[str]:
    """Start moto on a free port and yield its endpoint, http://127.0.0.1:port."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            endpoint = process.stdout.readline().strip()
            assert endpoint, f"the S3 server ended with exit status {process.wait()} before it listened"
            yield endpoint
        finally:
            process.kill()


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return the variables that point a reader, in this process or another, to the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


def make_bucket(endpoint: str, bucket: str) -> None:
    """Create a bucket; creating it again in us-east-1 changes nothing."""
    urlopen(Request(f"{endpoint}/{bucket}", method="PUT"), timeout=60).close()


def upload_folder(endpoint: str, bucket: str, prefix: str, folder: Path) -> str:
    """Upload every file below `folder` to s3://bucket/prefix, creating the bucket if needed, and return that URL."""
    make_bucket(endpoint, bucket)
    target = S3Store(
        bucket,
        prefix=prefix,
        endpoint=endpoint,
        access_key_id="tester",
        secret_access_key=SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(target, path.relative_to(folder).as_posix(), path)
    return f"s3://{bucket}/{prefix}"
