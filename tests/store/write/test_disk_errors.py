"""A disk that is full, read-only or gone: one sentence, nothing committed, and a rerun continues."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.made_store import folder_bytes
from support.many_stores import LOGITS, Wish, commit, fill, first_difference, grow, truth, work
from support.paths import PYTHONPATH

import kdpipe.store.write.writer
from kdpipe.store import KdpipeError, StoreError, claim, ensure_store, missing_units, open_store, write_unit
from kdpipe.store.format.markers import marker_path
from kdpipe.store.format.shard import shard_path

WISH = Wish(LOGITS["float32"], num_layers=0)


@pytest.fixture(scope="session")
def _mounting():
    """Skip where this user may not mount a file system."""
    tried = (
        subprocess.run(
            ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"], capture_output=True, check=False
        )
        if shutil.which("unshare")
        else None
    )
    if tried is None or tried.returncode:
        pytest.skip("needs `unshare -Urm` and a tmpfs of its own: user namespaces are not allowed here")


def on_tmpfs(folder: Path, script: str, size: str = "1m") -> list[str]:
    """Run a script with the variable `disk`, the Path of a file system of `size`; return the lines that it prints."""
    head = f"import os, re, subprocess, sys\nfrom pathlib import Path\ndisk = Path({str(folder)!r})\n"
    prepare = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    run = subprocess.run(
        [
            "unshare",
            "-Urm",
            "sh",
            "-c",
            prepare,
            "sh",
            size,
            str(folder),
            sys.executable,
            "-c",
            head + IMPORTS + script,
        ],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


IMPORTS = """
from support.many_stores import LOGITS, Wish, commit, fill, first_difference, grow, work
from kdpipe.store import KdpipeError, StoreError, claim, ensure_store, missing_units, open_store
wish, path = Wish(LOGITS["float32"], num_layers=0), disk / "a.zarr"

def remount(options):
    subprocess.run(["mount", "-o", "remount," + options, str(disk)], check=True)

def fill_up(bytes_left):
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(disk / "ballast", "wb") as file:
        file.write(bytes(free - bytes_left))

def refusal(job):
    try:
        job()
    except KdpipeError as error:
        assert "\\n" not in str(error)
        return str(error)
    raise AssertionError("nothing was refused")
"""

FULL = r"""
manifest = ensure_store(path, wish.manifest, wish.samples)
units = manifest.layout.units()
commit(path, manifest, units[0])
fill_up(BYTES_LEFT)
print(refusal(lambda: work(path, wish)))
print(len(missing_units(path, manifest)), len(units))
print([one.name for one in path.rglob("*.partial")])
remount("size=2m")
work(path, wish)
print(first_difference(open_store(path)))
"""


@pytest.mark.usefixtures("_mounting")
def test_full_disk_keeps_commits_and_rerun_continues(tmp_path):
    message, missing, partial, difference = on_tmpfs(tmp_path, FULL.replace("BYTES_LEFT", "30_000"))
    found = re.search(
        r"cannot write .*: the disk is full; ([\d,]+) bytes are needed there and ([\d,]+) are free", message
    )
    assert found, message
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    assert 0 < free < needed
    assert "make room, and run the same command again" in message
    num_missing, num_units = map(int, missing.split())
    assert 0 < num_missing < num_units
    assert partial == "[]"
    assert difference == "None"


@pytest.mark.usefixtures("_mounting")
@pytest.mark.parametrize("bytes_left", [0, 4096, 12_288, 16_384, 20_480, 24_576, 28_672, 36_864, 45_056])
def test_full_disk_anywhere_is_one_sentence_and_rerun_completes(tmp_path, bytes_left):
    """In the lock, the claim, the shard, its marker, or the manifest."""
    message, _, partial, difference = on_tmpfs(tmp_path, FULL.replace("BYTES_LEFT", str(bytes_left)))
    assert "the disk is full" in message or "No space left on device" in message
    assert (partial, difference) == ("[]", "None")


@pytest.mark.usefixtures("_mounting")
def test_read_only_disk_is_named_and_store_still_reads(tmp_path):
    script = r"""
manifest = ensure_store(path, wish.manifest, wish.samples)
remount("ro")
print(refusal(lambda: commit(path, manifest, manifest.layout.units()[0])))
print(refusal(lambda: claim(path, "v0-s0")))
remount("rw")
work(path, wish)
remount("ro")
print(first_difference(open_store(path)))
print(refusal(lambda: work(path, Wish(LOGITS["float32"], num_views=3, num_layers=0))))
"""
    writing, claiming, difference, growing = on_tmpfs(tmp_path, script)
    assert "the file system is read-only" in writing
    assert "cannot be used: the file system is read-only" in claiming
    assert difference == "None"
    assert "read-only" in growing.lower()


@pytest.mark.usefixtures("_mounting")
def test_store_larger_than_disk_is_not_started(tmp_path):
    script = r"""
print(refusal(lambda: ensure_store(path, wish.manifest, wish.samples)))
print([one.name for one in disk.iterdir() if not one.name.endswith(".lock")])
"""
    message, left = on_tmpfs(tmp_path, script, size="64k")
    assert "the disk is full" in message
    assert left == "[]"


WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.ESTALE: "the file system is gone",
    errno.EIO: "the disk reports an error",
}
ADVICE = {errno.EROFS: "have it mounted for writing", errno.EIO: "dmesg", errno.ESTALE: "mounted again"}


@pytest.fixture
def begun(tmp_path):
    path = tmp_path / "a.zarr"
    manifest = ensure_store(path, WISH.manifest, WISH.samples)
    commit(path, manifest, manifest.layout.units()[0])
    return path, manifest


def refuse(monkeypatch, number: int, code: int) -> None:
    """Let the fsync number `number` from now on fail."""
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)


@pytest.mark.parametrize(("code", "words"), WORDS.items(), ids=[errno.errorcode[code] for code in WORDS])
def test_disk_errors_are_plain_sentences(begun, monkeypatch, code, words):
    path, manifest = begun
    unit = manifest.layout.units()[1]
    with monkeypatch.context() as refusing:
        refuse(refusing, 1, code)
        with pytest.raises(StoreError, match=rf"cannot write .*/logits/.*: {words}; [\d,]+ bytes are needed") as caught:
            commit(path, manifest, unit)
    assert "\n" not in str(caught.value)
    assert ("make room" in str(caught.value)) == (code == errno.ENOSPC)
    assert ADVICE.get(code, "run the same command again") in str(caught.value)
    assert unit in missing_units(path, manifest)
    fill(path, manifest)
    assert first_difference(open_store(path)) is None


def test_any_refused_write_is_one_sentence_and_rerun_completes(tmp_path, monkeypatch):
    """Every seventh fsync of a job that extends a store fails once: of a file, or of its folder."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    small, large = WISH, Wish(WISH.form, num_views=3, num_samples=1600, num_layers=1)
    expected = folder_bytes(grow(tmp_path / "undisturbed.zarr", small, large))
    first = grow(tmp_path / "first.zarr", small)
    number, finished = 0, False
    while not finished:
        number += 7
        path = shutil.copytree(first, tmp_path / f"{number}.zarr")
        with monkeypatch.context() as refusing:
            refuse(refusing, number, errno.ENOSPC)
            try:
                work(path, large)
                finished = True
            except KdpipeError as error:
                assert "\n" not in str(error)
        assert first_difference(open_store(path)) is None
        work(path, large)
        assert folder_bytes(path) == expected, f"refused at fsync {number}"
        shutil.rmtree(path)
    assert number > 50


def test_vanished_mount_is_refused_and_not_recreated(begun, tmp_path):
    path, manifest = begun
    aside = path.rename(tmp_path / "aside")
    path.mkdir()
    with pytest.raises(StoreError, match="the store is gone; was its file system unmounted"):
        commit_known(path, manifest)
    assert list(path.iterdir()) == []
    path.rmdir()
    with pytest.raises(StoreError, match="the store is gone; was its file system unmounted"):
        commit_known(path, manifest)
    assert not path.exists()
    aside.rename(path)
    fill(path, manifest)
    assert first_difference(open_store(path)) is None


def commit_known(path, manifest):
    """Commit a unit whose rows were computed before the disk failed."""
    unit, spec = manifest.layout.units()[1], manifest.arrays[0]
    write_unit(path, manifest, unit, {spec.name: truth(spec, unit.view, WISH.samples.ids[unit.start : unit.stop])})


def test_a_mount_that_vanishes_before_the_marker_commits_nothing(begun, monkeypatch, tmp_path):
    path, manifest = begun
    real = kdpipe.store.write.writer._write

    def write_and_unmount(*arguments):
        real(*arguments)
        path.rename(tmp_path / "aside")
        path.mkdir()

    monkeypatch.setattr(kdpipe.store.write.writer, "_write", write_and_unmount)
    with pytest.raises(StoreError, match="was its file system unmounted"):
        commit_known(path, manifest)
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("where", ["folder in place of the shard", "folder in place of the marker"])
def test_a_folder_where_a_file_belongs_is_named(begun, where):
    path, manifest = begun
    unit = manifest.layout.units()[1]
    target = marker_path(path, unit) if "marker" in where else shard_path(path, manifest.arrays[0], unit)
    (target / "inside").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot write .*Is a directory|marker .* cannot be read"):
        commit_known(path, manifest)


def test_a_claim_on_a_full_disk_is_one_sentence(begun, monkeypatch):
    path, _ = begun

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(KdpipeError, match=r"lock file .* cannot be used: the disk is full; make room"):
        claim(path, "v0-s0")
    monkeypatch.undo()
    acquired = claim(path, "v0-s0")
    acquired.release()
