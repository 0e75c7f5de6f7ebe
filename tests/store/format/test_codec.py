"""Archives: lossless, readable by any Zarr reader, and safe to open when untrusted."""

import tracemalloc
import warnings
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Zstd
from support.made_store import make_store

from kdpipe.store import ArraySpec, Codec, StoreError, open_store
from kdpipe.store.format.codec import codec_from_json
from kdpipe.store.format.shard import decode_shard, encode_shard, shard_path, shard_shape

CODECS = [Codec("zstd", 3), Codec("blosc", 3)]
SPEC = ArraySpec("logits", (5,), "float16")
SHAPE = shard_shape(SPEC, 32)

both = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def unpacked(codec, raw, num_bytes):
    out = bytearray(num_bytes)
    codec.decode_into(raw, memoryview(out), "chunk 7")
    return bytes(out)


def with_crc(packed):
    return bytes(packed) + google_crc32c.value(bytes(packed)).to_bytes(4, "little")


def blosc_header(num_bytes, packed_bytes, flags=0x82):
    sizes = (num_bytes, min(num_bytes, 2**18), packed_bytes)
    return bytes([2, 1, flags, 2]) + b"".join(size.to_bytes(4, "little") for size in sizes)


def zstd_header(num_bytes):
    """Return the magic number, a single-segment descriptor with an 8-byte size, and that size (RFC 8878)."""
    return b"\x28\xb5\x2f\xfd\xe0" + num_bytes.to_bytes(8, "little")


@both
@settings(max_examples=60, deadline=None)
@given(chunk=st.binary(min_size=1, max_size=3000), repeats=st.integers(1, 50), item_bytes=st.sampled_from([1, 2, 4]))
def test_any_bytes_come_back(codec, chunk, repeats, item_bytes):
    packed = codec.encode(chunk * repeats, item_bytes)
    assert unpacked(codec, packed, len(chunk) * repeats) == chunk * repeats


@both
def test_plain_zarr_reads_every_array_of_an_archive(tmp_path, codec):
    specs = (ArraySpec("logits", (10,), "float16"), ArraySpec("features/layer2.0", (3, 5), "float32"))
    made = make_store(tmp_path / "a.zarr", codec=codec, specs=specs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # zarr-python warns of anything outside the v3 specification
        group = zarr.open_group(made.path, mode="r")
        for name, expected in made.contents.items():
            assert np.array_equal(group[name][:], expected)
        assert np.array_equal(group["samples/ids"][:], made.samples.ids)
    store = open_store(made.path)
    assert store.read_mode("logits").mode == "memory"
    for name, expected in made.contents.items():
        assert np.array_equal(store.read_view(name, 1), expected[1])
        assert np.array_equal(store.gather(name, 0, made.samples.ids[[7, 2000, 7]]), expected[0][[7, 2000, 7]])


@both
def test_every_flipped_bit_of_an_archives_shard_is_found(tmp_path, codec):
    made = make_store(tmp_path / "a.zarr", num_views=1, num_samples=15, codec=codec, specs=(SPEC,))
    store, unit = open_store(made.path), made.units[0]
    file = shard_path(made.path, SPEC, unit)
    whole = file.read_bytes()
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged"):
            store.read_unit("logits", unit)
    file.write_bytes(whole)
    assert np.array_equal(store.read_unit("logits", unit), made.contents["logits"][0])


@both
def test_no_flipped_bit_changes_rows_without_marker_checksum(codec):
    rows = np.random.default_rng(0).normal(size=(27, 5)).astype(np.float16)
    whole = b"".join(encode_shard(rows, SHAPE, codec))
    num_harmless = 0
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert np.array_equal(decode_shard(bytes(damaged), SHAPE, 27, codec, "it"), rows)
            num_harmless += 1  # Zstandard's frame header has a bit that no reader may interpret
        except StoreError:
            pass
    assert num_harmless <= (0 if codec.name == "blosc" else SHAPE.num_present(27))


@both
def test_a_shard_cut_short_anywhere_is_refused(codec):
    rows = np.random.default_rng(0).normal(size=(27, 5)).astype(np.float16)
    whole = b"".join(encode_shard(rows, SHAPE, codec))
    for length in range(len(whole)):
        with pytest.raises(StoreError, match="^it (is|does)"):
            decode_shard(whole[:length], SHAPE, 27, codec, "it")


@both
def test_a_chunk_cut_short_anywhere_is_refused(codec):
    chunk = np.random.default_rng(0).normal(size=300).astype(np.float16).tobytes()
    packed = codec.encode(chunk, 2) if codec.name == "zstd" else codec.encode(chunk, 2)[:-4]
    for length in range(len(packed)):
        cut = packed[:length] if codec.name == "zstd" else with_crc(packed[:length])
        with pytest.raises(StoreError, match="chunk 7 is damaged"):
            unpacked(codec, cut, len(chunk))


@both
@pytest.mark.parametrize("num_bytes", [0, 999, 1001, 2**26])
def test_chunk_of_wrong_size_is_refused_before_decompression(codec, num_bytes):
    packed = codec.encode(bytes(num_bytes), 2)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match="instead of 1,000" if num_bytes else "damaged"):
            unpacked(codec, packed, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claimed", [2**26, 2**31, 2**40, 2**63, 2**64 - 1, 2**64 - 2])
def test_a_zstandard_frame_that_claims_to_be_huge_is_refused(claimed):
    with pytest.raises(StoreError, match=f"holds {claimed:,} bytes instead of 1,000"):
        unpacked(Codec("zstd"), zstd_header(claimed) + b"\x01\x00\x00", 1000)


@pytest.mark.parametrize("claimed", [2**26, 2**31 - 1, 2**32 - 1])
def test_a_blosc_chunk_that_claims_to_be_huge_is_refused(claimed):
    header = blosc_header(claimed, 80)
    with pytest.raises(StoreError, match=f"holds {claimed:,} bytes instead of 1,000"):
        unpacked(Codec("blosc"), with_crc(header + bytes(64)), 1000)


def test_blosc_chunk_longer_than_its_bytes_is_refused():
    """Blosc trusts the size in its header and reads beyond the buffer: this killed the process."""
    num_bytes = 2**26
    with pytest.raises(StoreError, match="another length than it has"):
        unpacked(Codec("blosc"), with_crc(blosc_header(num_bytes, num_bytes + 16) + bytes(64)), num_bytes)


@pytest.mark.parametrize("size", [900, 1100])
def test_zstandard_frame_with_false_header_is_refused(size):
    frame = bytearray(Zstd(level=3, checksum=True).encode(np.random.default_rng(0).bytes(size)))
    assert frame[4] >> 6 == 1  # its size stands in two bytes, less 256
    frame[5:7] = (1000 - 256).to_bytes(2, "little")
    with pytest.raises(StoreError, match="chunk 7 is damaged"):
        unpacked(Codec("zstd"), bytes(frame), 1000)


def test_a_zstandard_frame_without_a_size_is_refused():
    one_raw_block = (3 << 3 | 1).to_bytes(3, "little") + b"abc"
    with pytest.raises(StoreError, match="does not state its size"):
        unpacked(Codec("zstd"), b"\x28\xb5\x2f\xfd\x00\x58" + one_raw_block, 3)


@both
@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200), data=st.data())
def test_arbitrary_bytes_are_refused(codec, raw, data):
    if codec.name == "blosc":
        length = data.draw(st.sampled_from([len(raw) + 16, 1016]))
        raw = with_crc(blosc_header(1000, length, data.draw(st.integers(0, 255))) + raw)
    else:
        raw = zstd_header(1000) + raw
    try:
        assert len(unpacked(codec, raw, 1000)) == 1000
    except StoreError as error:
        assert str(error).startswith("chunk 7 is damaged")


@pytest.mark.parametrize(
    "record", [{"name": "lzma", "level": 5}, {"name": "zstd", "level": 0}, {"name": "zstd"}, "zstd"]
)
def test_unknown_codec_is_refused(record):
    with pytest.raises(ValueError, match="codec"):
        codec_from_json(record)


@both
def test_a_codec_survives_its_manifest(codec):
    assert codec_from_json(codec.to_json()) == codec
    assert codec_from_json(replace(codec, level=9).to_json()) != codec
