"""Links that lead out of a store are followed only where the user asks for it."""

from __future__ import annotations

import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdpipe as kd
from kdpipe.pipeline.main import app
from kdpipe.store import StoreError, open_store
from kdpipe.store.check.verify import verify_store
from kdpipe.store.errors import LinkedStoreError
from kdpipe.store.fs import safe_read


@pytest.fixture
def linked(made, tmp_path, monkeypatch) -> Path:
    """A store of links into a folder of blobs, as DVC and the Hugging Face hub make it."""
    monkeypatch.setattr(safe_read, "_followed", set())
    snapshot, blobs = tmp_path / "snapshot.zarr", tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in made.path.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(made.path)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


def test_a_store_of_links_is_refused_with_what_to_do(linked):
    for read in (open_store, verify_store, kd.open_store):
        with pytest.raises(LinkedStoreError, match="zarr.json is a link that .*--follow-links.*cp -RL .*snapshot.zarr"):
            read(linked)


def test_a_store_of_links_is_read_where_the_user_asks(linked, made):
    ids = made.samples.ids[:5]
    store = kd.open_store(linked, follow_links=True)
    assert (store.gather("logits", 1, ids) == made.contents["logits"][1][:5]).all()
    assert verify_store(linked).ok


@pytest.mark.parametrize("command", ["info", "verify"])
def test_the_command_line_follows_links_where_asked(linked, command):
    assert CliRunner().invoke(app, ["store", command, str(linked)]).exit_code == 1
    assert CliRunner().invoke(app, ["store", command, str(linked), "--follow-links"]).exit_code == 0


@pytest.mark.parametrize(
    ("kind", "wanted"), [("zip", "`unzip .*packed -d FOLDER`"), ("tar", "`mkdir FOLDER; tar -xf"), ("file", "name the")]
)
def test_a_packed_store_is_told_how_to_unpack(made, tmp_path, kind, wanted):
    packed = tmp_path / "packed"
    packed.write_bytes(b"text")
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(made.path / "zarr.json", "zarr.json")
    elif kind == "tar":
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(made.path, "a.zarr")
    with pytest.raises(StoreError, match=f"packed is a file, and a store is a folder: .*{wanted}"):
        kd.open_store(packed)
