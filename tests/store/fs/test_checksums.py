import os
import subprocess
from pathlib import Path

import pytest

from kdpipe.store.fs import atomic_write, checksums
from kdpipe.store.fs.checksums import (
    SUMS,
    DamagedFileError,
    damages,
    read_intact_json,
    read_sums,
    record_sums,
    remove_with_sum,
    require_intact,
    write_with_sum,
)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_sums_are_those_that_sha256sum_checks(tmp_path):
    write_with_sum(tmp_path / "a.json", b"{", b"}")
    write_with_sum(tmp_path / "b c.bin", b"\x00\xff")
    write_with_sum(tmp_path / "a.json", b"{}\n")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=tmp_path, check=True)
    assert len(read_sums(tmp_path)) == 2


@pytest.mark.parametrize("name", ["a.json", SUMS])
def test_every_flipped_bit_is_found(tmp_path, name):
    write_with_sum(tmp_path / "a.json", b'{"accuracy": 0.5}')
    whole = (tmp_path / name).read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(flipped)
        assert list(damages(tmp_path)), bit
    (tmp_path / name).write_bytes(whole)
    assert list(damages(tmp_path)) == []


@pytest.mark.parametrize("num_renames", [1, 2, 3])
def test_a_writer_killed_at_any_moment_leaves_an_intact_file(tmp_path, monkeypatch, num_renames):
    file = tmp_path / "a.json"
    write_with_sum(file, b'{"v": 1}')
    left = [num_renames]

    def rename(self, target):
        left[0] -= 1
        if not left[0]:
            raise Killed
        os.rename(self, target)  # noqa: PTH104 - Path.replace is patched

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "replace", rename)
        write_with_sum(file, b'{"v": 2}')
    assert read_intact_json(file) == {"v": 1 if num_renames < 3 else 2}
    write_with_sum(file, b'{"v": 3}')
    assert read_intact_json(file) == {"v": 3}
    assert [len(known) for known in read_sums(tmp_path).values()] == [1]


def test_a_file_is_removed_after_its_sum(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    write_with_sum(file, b"state")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(Killed))
        remove_with_sum(file)
    assert list(damages(tmp_path)) == []
    remove_with_sum(file)
    assert not file.exists()


def test_damage_says_what_to_delete(tmp_path):
    for name in ("job.json", "model.onnx", "checkpoint.safetensors"):
        write_with_sum(tmp_path / name, name.encode())
        (tmp_path / name).write_bytes(b"other")
    advice = {damage.path.name: damage.advice for damage in damages(tmp_path)}
    assert f"delete the folder {tmp_path}" in advice["model.onnx"]
    assert "delete it and run" in advice["checkpoint.safetensors"]
    with pytest.raises(DamagedFileError, match=r"model\.onnx is damaged or was edited: its sha256 is d9298a10d1b0"):
        require_intact(tmp_path / "model.onnx")


def test_files_without_sums_pass_and_missing_ones_are_damage(tmp_path):
    (tmp_path / "mine.bin").write_bytes(b"mine")
    require_intact(tmp_path / "mine.bin")
    record_sums(tmp_path)
    (tmp_path / "mine.bin").unlink()
    assert ["missing" in damage.why for damage in damages(tmp_path)] == [True]
    assert read_intact_json(tmp_path / "mine.bin") is None


def test_equal_content_is_not_recorded_again(tmp_path, monkeypatch):
    write_with_sum(tmp_path / "a.json", b"{}")
    monkeypatch.setattr(checksums, "_write_sums", lambda *_: pytest.fail("written again"))
    write_with_sum(tmp_path / "a.json", b"{}")
    assert atomic_write.PARTIAL_SUFFIX not in "".join(path.name for path in tmp_path.iterdir())
