"""Missing, damaged and foreign stores and files are refused by name."""

import json
import shutil

import numpy as np
import pytest

from kdpipe.store import FingerprintMismatch, StoreError, ensure_store, missing_units, open_store
from kdpipe.store.format.markers import marker_path
from kdpipe.store.format.shard import shard_path


def flip(path, at, bit=0):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def read_everything(path):
    store = open_store(path)
    for spec in store.manifest.arrays:
        for view in range(store.num_views):
            store.read_view(spec.name, view)


def edit(path, change):
    file = path / "zarr.json"
    record = json.loads(file.read_text())
    change(record["attributes"]["kdpipe"])
    file.write_text(json.dumps(record))


def test_no_store_says_which_command_makes_one(tmp_path):
    with pytest.raises(StoreError, match=r"no store at .*kdpipe cache-teacher"):
        open_store(tmp_path / "none.zarr")


def test_a_missing_unit_is_named_and_never_read_as_zeros(store_maker):
    made = store_maker(fill=False)
    made.fill(made.units[:-1])
    with pytest.raises(StoreError, match=f"not complete: {made.units[-1]} is missing"):
        open_store(made.path)
    assert missing_units(made.path, made.manifest) == [made.units[-1]]


def test_a_shard_without_its_marker_is_missing(made):
    marker_path(made.path, made.units[0]).unlink()
    assert missing_units(made.path, made.manifest) == [made.units[0]]


def test_every_flipped_bit_of_a_shard_is_found(made):
    rng = np.random.default_rng(11)
    for spec in made.manifest.arrays:
        for unit in made.units:
            file = shard_path(made.path, spec, unit)
            size = file.stat().st_size
            for at in [0, size - 1, size - 5, *rng.integers(0, size, 12)]:
                bit = int(rng.integers(8))
                flip(file, at, bit)
                with pytest.raises(StoreError, match="damaged"):
                    read_everything(made.path)
                flip(file, at, bit)
    read_everything(made.path)


@pytest.mark.parametrize("at", [0, 20, 60])
def test_a_flipped_bit_of_a_marker_is_found(made, at):
    flip(marker_path(made.path, made.units[1]), at, 6)
    with pytest.raises(StoreError):
        read_everything(made.path)


@pytest.mark.parametrize("name", ["ids", "labels", "pixels_crc32c"])
def test_a_flipped_bit_of_the_samples_is_found(made, name):
    flip(made.path / "samples" / name / "c" / "0", 100)
    with pytest.raises(StoreError, match="digests do not match"):
        open_store(made.path)


def test_a_torn_shard_is_found_when_the_store_is_opened(made):
    file = shard_path(made.path, made.manifest.arrays[0], made.units[0])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"damaged: it has [\d,]+ bytes, [\d,]+ were committed"):
        open_store(made.path)


def test_a_vanished_shard_is_found_when_the_store_is_opened(made):
    shard_path(made.path, made.manifest.arrays[1], made.units[2]).unlink()
    with pytest.raises(StoreError, match=r"features/layer2.0.*view.*cannot be read"):
        open_store(made.path)


def test_shards_of_another_store_are_refused(made, store_maker):
    other = store_maker("other.zarr", num_samples=2400)
    shutil.copy(marker_path(other.path, other.units[0]), marker_path(made.path, made.units[0]))
    with pytest.raises(StoreError, match="belongs to another store"):
        open_store(made.path)


def test_other_inputs_are_refused_pair_by_pair(made):
    teacher = {**made.manifest.identity.teacher, "weights_sha256": "b" * 64}
    with pytest.raises(FingerprintMismatch) as caught:
        open_store(made.path, {"teacher": teacher, "views": {"seed": 4}}, "Do this.")
    assert caught.value.differences == (("teacher.weights_sha256", "a" * 64, "b" * 64), ("views.seed", 3, 4))
    assert "stored 3, wanted 4" in str(caught.value)
    assert str(caught.value).endswith("Do this.")


def test_a_writer_with_another_precision_is_refused(made, store_maker):
    from dataclasses import replace

    specs = (replace(made.manifest.arrays[0], dtype="float32"), made.manifest.arrays[1])
    with pytest.raises(FingerprintMismatch, match=r"arrays.logits.dtype: stored 'float16', wanted 'float32'"):
        ensure_store(made.path, replace(made.manifest, arrays=specs), made.samples)


def test_an_edited_identity_is_found(made):
    edit(made.path, lambda record: record["teacher"].update(weights_sha256="b" * 64))
    with pytest.raises(StoreError, match="edited"):
        open_store(made.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(num_views=10**15),
        lambda record: record.update(segments=[]),
        lambda record: record["segments"][0].update(num_samples=-1),
        lambda record: record["segments"][0].update(num_samples=2**39),
        lambda record: record.update(unit_rows=0),
        lambda record: record.update(unit_rows="many"),
        lambda record: record["arrays"].update({"../../etc": {"row_shape": [1], "dtype": "float16"}}),
        lambda record: record["arrays"].update({"features/x": {"row_shape": [1], "dtype": "object"}}),
        lambda record: record["arrays"].update({"features/x": {"row_shape": [-1], "dtype": "float16"}}),
        lambda record: record.update(arrays=[]),
        lambda record: record.pop("views"),
    ],
)
def test_a_hostile_manifest_is_refused(made, change):
    edit(made.path, change)
    with pytest.raises(StoreError, match="damaged manifest"):
        open_store(made.path)


def test_another_schema_is_refused(made):
    edit(made.path, lambda record: record.update(schema_version=99))
    with pytest.raises(StoreError, match="schema 99, this kdpipe reads 3"):
        open_store(made.path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"attributes": []}', "[" * 100_000, "\udce4"])
def test_broken_metadata_is_refused(made, text):
    (made.path / "zarr.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StoreError):
        open_store(made.path)


def test_array_with_inconsistent_metadata_is_refused(made):
    file = made.path / "logits" / "zarr.json"
    file.write_text(file.read_text().replace('"little"', '"big"', 1))
    with pytest.raises(StoreError, match="does not match the store: codecs"):
        open_store(made.path)


def test_rows_that_are_not_finite_are_never_written(store_maker):
    from kdpipe.store import write_unit

    made = store_maker(fill=False)
    rows = {name: values.copy() for name, values in made.rows(made.units[0]).items()}
    rows["logits"][3, 4] = np.inf
    with pytest.raises(StoreError, match="NaN or infinity"):
        write_unit(made.path, made.manifest, made.units[0], rows)
    assert made.units[0] in missing_units(made.path, made.manifest)
