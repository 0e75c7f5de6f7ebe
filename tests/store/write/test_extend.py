"""A store is extended in place: existing files are kept, and readers see the old part until the new is finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.made_store import folder_bytes
from support.many_stores import LOGITS, Wish, commit, fill, first_difference, grow, truth

import kdpipe.store.fs.atomic_write
from kdpipe.store import (
    Codec,
    FingerprintMismatch,
    Samples,
    StoreError,
    ensure_store,
    finish_store,
    missing_units,
    open_store,
    read_store_manifest,
)

SMALL = Wish(LOGITS["float16"], num_views=2, num_samples=700, num_layers=0)
"""Two units a view, of which the second is a partial one."""

LARGE = replace(SMALL, num_views=3, num_samples=1300, num_layers=2)

GROWTHS = {
    "views": replace(SMALL, num_views=4),
    "samples": replace(SMALL, num_samples=1300),
    "a single sample": replace(SMALL, num_samples=701),
    "a layer": replace(SMALL, num_layers=1),
    "all at once": LARGE,
}


@pytest.fixture
def path(tmp_path) -> Path:
    return grow(tmp_path / "a.zarr", SMALL)


def data_files(path: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return shards and markers, each with its bytes, inode and time of change."""
    stats = {key: (path / key).stat() for key in folder_bytes(path) if "/c/" in key and not key.startswith("samples")}
    return {key: ((path / key).read_bytes(), stat.st_ino, stat.st_mtime_ns) for key, stat in stats.items()}


def shards(path: Path) -> dict[str, tuple[bytes, int, int]]:
    return {key: file for key, file in data_files(path).items() if not key.startswith("markers")}


def ids_of(wish: Wish):
    return wish.samples.ids


@pytest.mark.parametrize("wish", GROWTHS.values(), ids=GROWTHS)
@pytest.mark.parametrize("codec", [None, Codec("zstd", 1)])
@pytest.mark.parametrize("logits", LOGITS)
def test_what_was_there_is_not_written_again(tmp_path, wish, codec, logits):
    form = replace(LOGITS[logits], codec=codec)
    wish = replace(wish, form=form)
    path = grow(tmp_path / "a.zarr", replace(SMALL, form=form))
    before = shards(path)
    grow(path, wish)
    after = shards(path)
    assert {key: after[key] for key in before} == before
    assert len(after) > len(before)
    grown = open_store(path)
    own = {spec.name.partition("/")[2] for spec in form.logits if not spec.name.startswith("logits")}
    num_layers = wish.num_layers + len(own)
    assert (grown.num_views, grown.num_samples, len(grown.layers)) == (wish.num_views, wish.num_samples, num_layers)
    assert sorted(grown.samples.ids) == sorted(ids_of(wish))
    assert first_difference(grown) is None


def test_new_samples_lie_among_the_old_ones(path):
    old, new = ids_of(SMALL), ids_of(LARGE)[700:]
    assert ((old.min() < new) & (new < old.max())).sum() > 500
    grow(path, LARGE)
    mixed = np.stack([old[:600], new], axis=1).reshape(-1)
    for spec in LARGE.specs:
        assert np.array_equal(open_store(path).gather(spec.name, 2, mixed), truth(spec, 2, mixed))


def test_order_of_data_set_does_not_matter(path):
    order = np.random.default_rng(2).permutation(1300)
    samples = LARGE.samples.take(order)
    fill(path, ensure_store(path, LARGE.manifest, samples))
    assert first_difference(open_store(path)) is None


def test_partial_last_unit_is_not_rewritten(path):
    partial = SMALL.manifest.layout.units()[1]
    assert partial.num_rows < SMALL.form.unit_rows
    grow(path, GROWTHS["samples"])
    units = read_store_manifest(path).layout.units([0])
    assert units[1] == partial
    assert units[2].start == 1024, "the next segment does not begin with a unit of its own"
    assert len(open_store(path).read_unit("logits", partial)) == 188


@pytest.mark.parametrize("wish", GROWTHS.values(), ids=GROWTHS)
def test_earlier_reader_is_unaffected_by_an_extension(path, wish):
    mapped, memory, cold = open_store(path), open_store(path).streamed(1), open_store(path)
    readers = {"mapped": mapped, "memory": memory, "cold": cold}
    ids = ids_of(SMALL)
    expected = truth(SMALL.specs[0], 1, ids)

    def check():
        for name, reader in readers.items():
            if name != "cold":
                assert np.array_equal(reader.gather("logits", 1, ids), expected), name
            assert (reader.num_views, reader.num_samples) == (2, 700)

    check()
    manifest = ensure_store(path, wish.manifest, wish.samples)
    for unit in manifest.layout.units():
        check()
        commit(path, manifest, unit)
    finish_store(path)
    check()
    assert np.array_equal(cold.gather("logits", 1, ids), expected)
    assert first_difference(cold) is None
    with pytest.raises(StoreError, match="no targets for 1 of the 1"):
        mapped.gather("logits", 1, ids_of(LARGE)[-1:])


@pytest.mark.parametrize("wish", GROWTHS.values(), ids=GROWTHS)
def test_reader_during_extension_sees_finished_part(path, wish):
    manifest = ensure_store(path, wish.manifest, wish.samples)
    for unit in manifest.layout.units():
        middle = open_store(path)
        assert (middle.num_views, middle.num_samples, middle.layers) == (2, 700, ())
        assert first_difference(middle) is None
        commit(path, manifest, unit)
    finish_store(path)
    assert first_difference(open_store(path)) is None


def test_what_is_still_being_added_is_named(path):
    ensure_store(path, LARGE.manifest, LARGE.samples)
    middle = open_store(path)
    new_id = ids_of(LARGE)[-1:]
    ids = ids_of(SMALL)[:3]
    for way in (middle, middle.streamed(1)):
        with pytest.raises(StoreError, match=r"has views 0 to 1, not 2\. It is being extended to 3: run"):
            way.gather("logits", 2, ids)
        with pytest.raises(StoreError, match=r"features/layer2\.0 is still being added\. Run"):
            way.gather("features/layer2.0", 0, ids)
        with pytest.raises(StoreError, match=rf"no targets for 1 of the 1 samples, for example ids \[{new_id[0]}\]"):
            way.gather("logits", 0, new_id)


class Killed(BaseException):
    """The end of a job: nothing after it is done, and nothing is cleaned up."""


def killing_at(monkeypatch: pytest.MonkeyPatch, number: int, torn: bool) -> list[Path]:
    """Kill the job at its file number `number`; torn: half of its temporary file is left behind."""
    real, written = kdpipe.store.fs.atomic_write.write_atomically, []

    def write(file: Path, *parts: bytes | memoryview) -> None:
        if len(written) == number:
            if torn:
                raw = b"".join(parts)
                file.with_name(f".{file.name}.deadbeef.partial").write_bytes(raw[: len(raw) // 2])
            raise Killed
        written.append(file)
        real(file, *parts)

    for module in ("fs.atomic_write", "write.writer", "format.markers", "write.extend", "format.zarr_metadata"):
        monkeypatch.setattr(f"kdpipe.store.{module}.write_atomically", write)
    return written


def count_files(job: Callable[[], object]) -> int:
    with pytest.MonkeyPatch.context() as counting:
        written = killing_at(counting, -1, torn=False)
        job()
    return len(written)


@pytest.mark.parametrize("torn", [0, 1])
@pytest.mark.parametrize("wish", [GROWTHS["samples"], GROWTHS["a layer"]], ids=["samples", "a layer"])
def test_job_killed_between_any_two_files_resumes(tmp_path, wish, torn, monkeypatch):
    """Every second file is half written when the job is killed."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # a kill takes nothing from the page cache
    undisturbed = grow(tmp_path / "undisturbed.zarr", SMALL, wish)
    num_files = count_files(lambda: grow(tmp_path / "counted.zarr", SMALL, wish))
    small = tmp_path / "small.zarr"
    num_before = count_files(lambda: grow(small, SMALL))
    assert num_files - num_before > 10
    for number in range(num_files - num_before):
        path = shutil.copytree(small, tmp_path / f"{number}.zarr")
        with pytest.MonkeyPatch.context() as killing:
            killing_at(killing, number, torn=number % 2 == torn)
            with pytest.raises(Killed):
                grow(path, wish)
        middle = open_store(path)
        assert (middle.num_views, middle.num_samples) == (2, 700)
        assert first_difference(middle) is None
        grow(path, wish)
        assert folder_bytes(path) == folder_bytes(undisturbed), f"killed at file {number}"


def test_repeatedly_killed_job_completes(tmp_path):
    """Each run writes the sample files again, and then gets a few files further."""
    undisturbed = grow(tmp_path / "undisturbed.zarr", SMALL, LARGE)
    path, num_kills = grow(tmp_path / "a.zarr", SMALL), 0
    while open_store(path).num_views < 3 and num_kills < 50:
        with pytest.MonkeyPatch.context() as killing:
            killing_at(killing, 6, torn=bool(num_kills % 2))
            try:
                grow(path, LARGE)
            except Killed:
                num_kills += 1
        assert first_difference(open_store(path)) is None
    assert num_kills > 4
    assert folder_bytes(path) == folder_bytes(undisturbed)


@pytest.mark.parametrize("what", ["labels", "pixels_crc32c"])
@pytest.mark.parametrize("wish", [SMALL, LARGE], ids=["as large", "larger"])
def test_known_sample_with_other_label_or_pixels_is_refused(path, wish, what):
    samples = wish.samples
    column = getattr(samples, what).copy()
    column[5] += 1
    before = data_files(path)
    with pytest.raises(FingerprintMismatch, match=f"{what} of sample {samples.ids[5]}: stored .*In all, 1 of"):
        ensure_store(path, wish.manifest, replace(samples, **{what: column}))
    assert data_files(path) == before
    assert read_store_manifest(path).layout == SMALL.manifest.layout


def test_another_data_set_is_refused(path):
    others = Samples(np.arange(700) + 20_000, np.zeros(700, np.int64), np.zeros(700, np.uint32))
    with pytest.raises(FingerprintMismatch, match=r"data\.ids_and_labels_sha256"):
        ensure_store(path, SMALL.manifest, others)
    half_other = SMALL.samples.take(np.arange(350)).followed_by(others.take(np.arange(350)))
    with pytest.raises(FingerprintMismatch, match=r"data\.ids_and_labels_sha256"):
        ensure_store(path, SMALL.manifest, half_other)


@pytest.mark.parametrize(
    "other",
    [replace(SMALL, form=LOGITS["float32"]), replace(SMALL, form=replace(SMALL.form, codec=Codec()))],
    ids=["precision", "codec"],
)
def test_another_encoding_is_refused(path, other):
    before = folder_bytes(path)
    with pytest.raises(FingerprintMismatch):
        ensure_store(path, replace(other.manifest, identity=SMALL.manifest.identity), SMALL.samples)
    assert folder_bytes(path) == before


@pytest.mark.parametrize(
    "less",
    [replace(LARGE, num_views=1), replace(LARGE, num_samples=100), replace(LARGE, num_layers=0), SMALL, LARGE],
    ids=["views", "samples", "layers", "all", "the same"],
)
def test_wanting_less_changes_nothing(path, less):
    grow(path, LARGE)
    before = {key: (file.read_bytes(), file.stat().st_mtime_ns) for key, file in _files(path)}
    manifest = ensure_store(path, less.manifest, less.samples)
    assert not finish_store(path)
    assert manifest == read_store_manifest(path)
    assert {key: (file.read_bytes(), file.stat().st_mtime_ns) for key, file in _files(path)} == before


def _files(path: Path):
    return [(key, path / key) for key in folder_bytes(path)]


def test_units_written_before_growth_are_kept(path):
    """A store that is extended before its first filling is done keeps its units."""
    other = path.with_name("b.zarr")
    manifest = ensure_store(other, SMALL.manifest, SMALL.samples)
    commit(other, manifest, manifest.layout.units()[0])
    grown = ensure_store(other, LARGE.manifest, LARGE.samples)
    missing = missing_units(other, grown)
    assert len(missing) == len(grown.layout.units())  # each lacks the new layers
    with pytest.raises(StoreError, match="not complete"):
        open_store(other)
    before = shards(other)
    fill(other, grown)
    assert {key: shards(other)[key] for key in before} == before
    assert first_difference(open_store(other)) is None
