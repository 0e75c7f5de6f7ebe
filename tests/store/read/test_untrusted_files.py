"""Pipes, devices, links and huge files in a store are refused; none hangs, or leads out of its folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.many_stores import grow
from support.untrusted_store import WISHES, outcome

from kdpipe.store.format.samples import COLUMNS


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return grow(tmp_path_factory.mktemp("original") / "dense.zarr", WISHES["dense"])


@pytest.fixture
def path(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "a.zarr")


KEYS = [
    "zarr.json",
    "logits/zarr.json",
    "logits/c/1/0/0",
    "markers/c/0/1/0",
    *[f"samples/{name}/c/0" for name in COLUMNS],
]


@pytest.mark.parametrize("key", KEYS)
def test_a_file_of_a_gigabyte_is_not_read(path, key):
    os.truncate(path / key, 2**30)
    assert outcome(path)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("what", ["pipe", "folder", "device", "link to nothing", "link to itself", "link out", "gone"])
def test_non_files_are_refused(path, tmp_path, key, what):
    file = path / key
    outside = tmp_path / "outside"
    file.rename(outside)
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        (file / "inside").mkdir(parents=True)
    elif what == "device":
        file.symlink_to("/dev/zero")
    elif what == "link to nothing":
        file.symlink_to("nothing")
    elif what == "link to itself":
        file.symlink_to(file)
    elif what == "link out":
        file.symlink_to(outside)
    message = outcome(path)
    assert message
    assert what != "link out" or "leads out of the store" in message


@pytest.mark.parametrize("key", ["zarr.json", "logits/c/1/0/0", "markers/c/0/1/0", "samples/ids/c/0"])
def test_a_link_that_stays_within_the_store_is_followed(path, key):
    (path / key).rename(path / "moved")
    (path / key).symlink_to(path / "moved")
    assert outcome(path) == ""


def test_linked_store_is_opened(path, tmp_path):
    (tmp_path / "link.zarr").symlink_to(path)
    assert outcome(tmp_path / "link.zarr") == ""


@pytest.mark.parametrize("folder", ["logits", "logits/c/1", "markers", "samples"])
def test_a_folder_that_leads_out_is_not_followed(path, tmp_path, folder):
    (path / folder).rename(tmp_path / "outside")
    (path / folder).symlink_to(tmp_path / "outside")
    assert "leads out of the store" in outcome(path)
