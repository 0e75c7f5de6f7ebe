"""Untrusted stores are read correctly or refused in a sentence; none hangs, leaves its folder, or takes much memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.many_stores import grow
from support.untrusted_store import WISHES, outcome

from kdpipe.store.format.identity import sha256_of
from kdpipe.store.format.markers import CHECKSUM, _text
from kdpipe.store.format.schema import MARKER_BYTES

Record = dict[str, Any]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {name: grow(folder / f"{name}.zarr", wish) for name, wish in WISHES.items()}


@pytest.fixture
def path(originals, tmp_path) -> Path:
    return shutil.copytree(originals["dense"], tmp_path / "a.zarr")


def sign(record: Record, fingerprint: bool = True) -> Record:
    """Return the manifest with matching digests, as an attacker can make them."""
    if fingerprint:
        record["fingerprint"] = sha256_of({key: record.get(key) for key in ("teacher", "data", "views")})
    record.pop("sha256", None)
    return {**record, "sha256": sha256_of(record)}


def edit(path: Path, change: Callable[[Record], object]) -> None:
    """Change the manifest and sign it, and with it the markers."""
    group = json.loads((path / "zarr.json").read_text())
    record = group["attributes"]["kdpipe"]
    before = record["fingerprint"]
    change(record)
    group["attributes"]["kdpipe"] = signed = sign(record)
    if before != signed["fingerprint"]:
        signed["segments"][-1]["fingerprint"] = signed["fingerprint"]
        group["attributes"]["kdpipe"] = sign(signed)
        for file in (path / "markers").rglob("0"):
            if file.is_file():
                edit_marker(file, lambda marker: marker.update(fingerprint=signed["fingerprint"]))
    (path / "zarr.json").write_text(json.dumps(group, indent=2))


def edit_marker(file: Path, change: Callable[[Record], object]) -> None:
    """Change a marker and sign it."""
    record = {key: value for key, value in json.loads(file.read_bytes()).items() if key != CHECKSUM}
    change(record)
    file.write_bytes(_text(record).ljust(MARKER_BYTES))


def test_untouched_and_reformatted_stores_read_correctly(originals, path):
    assert {outcome(one) for one in originals.values()} == {""}
    edit(path, lambda record: None)
    assert outcome(path) == ""


HUGE = 2**39
MANIFESTS: dict[str, Callable[[Record], object]] = {
    "views beyond count": lambda r: r.update(num_views=HUGE),
    "views that overflow": lambda r: r.update(num_views=2**64),
    "views below none": lambda r: r.update(num_views=-1),
    "views half": lambda r: r.update(num_views=1.5),
    "views of truth": lambda r: r.update(num_views=True),
    "a million views": lambda r: (r.update(num_views=2**19), r["finished"].update(num_views=2**19)),
    "units of many rows": lambda r: r.update(unit_rows=2**28),
    "units of absurdly many rows": lambda r: r.update(unit_rows=2**70),
    "units of one row": lambda r: r.update(unit_rows=1),
    "a segment too large": lambda r: r["segments"][0].update(num_samples=2**33),
    "a segment that is large": lambda r: r["segments"][0].update(num_samples=10**8),
    "many segments": lambda r: r.update(segments=[{"num_samples": 1, "fingerprint": "a"}] * 20_000),
    "a segment that is a text": lambda r: r.update(segments="900"),
    "a segment without fingerprint": lambda r: r.update(segments=[{"num_samples": 512}, {"num_samples": 388}]),
    "one more segment": lambda r: r["segments"].append({"num_samples": 5, "fingerprint": "a"}),
    "many arrays": lambda r: r["arrays"].update(
        {f"features/x{number}": {"row_shape": [1], "dtype": "float16"} for number in range(20_000)}
    ),
    "rows too large": lambda r: r["arrays"]["logits"].update(row_shape=[2**38]),
    "rows that overflow": lambda r: r["arrays"]["logits"].update(row_shape=[2**32, 2**32]),
    "rows of a hundred sides": lambda r: r["arrays"]["logits"].update(row_shape=[1] * 100),
    "rows of no sides": lambda r: r["arrays"]["logits"].update(row_shape=[]),
    "rows of nothing": lambda r: r["arrays"]["logits"].update(row_shape=[0]),
    "rows that are an object": lambda r: r["arrays"]["logits"].update(row_shape={"8": 8}),
    "another type": lambda r: r["arrays"]["logits"].update(dtype="uint16"),
    "a wider type": lambda r: r["arrays"]["logits"].update(dtype="float32"),
    "a foreign type": lambda r: r["arrays"]["logits"].update(dtype="O"),
    "a type that is a list": lambda r: r["arrays"]["logits"].update(dtype=["float16"]),
    "a name that climbs out": lambda r: r["arrays"].update({"features/../../../x": r["arrays"]["logits"]}),
    "a name from the root": lambda r: r["arrays"].update({"/etc/passwd": r["arrays"]["logits"]}),
    "a name of dots": lambda r: r["arrays"].update({"features/..": r["arrays"]["logits"]}),
    "a name with a line": lambda r: r["arrays"].update({"features/a\nb": r["arrays"]["logits"]}),
    "a name that ends in a line": lambda r: r["arrays"].update({"features/a\n": r["arrays"]["logits"]}),
    "no logits": lambda r: r["arrays"].pop("logits"),
    "no arrays": lambda r: r.update(arrays={}),
    "arrays as a list": lambda r: r.update(arrays=["logits"]),
    "top-k that is none": lambda r: r.update(top_k={"num_classes": 20, "k": 8, "temperatures": [1.0]}),
    "top-k of nonsense": lambda r: r.update(top_k={"num_classes": "x", "k": None, "temperatures": [1e300]}),
    "top-k as a list": lambda r: r.update(top_k=[20, 8]),
    "a codec for none": lambda r: r.update(codec={"name": "zstd", "level": 5}),
    "a foreign codec": lambda r: r.update(codec={"name": "gzip", "level": 5}),
    "a codec with a list for a name": lambda r: r.update(codec={"name": ["zstd"], "level": 5}),
    "a codec of another level": lambda r: r.update(codec={"name": "zstd", "level": 10**30}),
    "a codec as a text": lambda r: r.update(codec="zstd"),
    "finished too much": lambda r: r["finished"].update(num_views=3),
    "finished nothing": lambda r: r.update(finished=None),
    "finished as a list": lambda r: r.update(finished=[]),
    "finished without arrays": lambda r: r["finished"].update(arrays=[]),
    "finished other arrays": lambda r: r["finished"].update(arrays=["features/x"]),
    "finished an array twice": lambda r: r["finished"].update(arrays=["logits", "logits"]),
    "finished with no logits": lambda r: r["finished"].update(arrays=["features/layer2.0"]),
    "finished arrays as a number": lambda r: r["finished"].update(arrays=7),
    "fidelity as a number": lambda r: r["finished"].update(fidelity=7),
    "classes as a number": lambda r: r["data"].update(classes=7),
    "classes of objects": lambda r: r["data"].update(classes=[{}, None]),
    "classes as an object": lambda r: r["data"].update(classes={"a": 1}),
    "classes as a text": lambda r: r["data"].update(classes="abc"),
    "digests of nonsense": lambda r: r["data"].update(ids_and_labels_sha256=[1]),
    "no data": lambda r: r.update(data={}),
    "data as a list": lambda r: r.update(data=[]),
    "versions as a list": lambda r: r.update(versions=["1"]),
    "rounded nonsense": lambda r: r.update(rounded={"logits": -1}),
    "rounded to absurdity": lambda r: r.update(rounded={"logits": 10**6}),
    "a schema as a list": lambda r: r.update(schema_version=[2]),
}
HARMLESS = {"finished with no logits", "finished an array twice", "rounded to absurdity"}
"""What may open, as long as the numbers are right."""


@pytest.mark.parametrize("name", MANIFESTS)
def test_inconsistent_manifest_is_refused(path, name):
    edit(path, MANIFESTS[name])
    message = outcome(path)
    assert message or name in HARMLESS


@pytest.mark.parametrize("kind", ["top-k", "zstd", "blosc"])
@pytest.mark.parametrize("what", [None, {}, [], 7, "x", {"num_classes": 21, "k": 8, "temperatures": [1, 2, 4, 8]}])
def test_inconsistent_encoding_is_refused(originals, tmp_path, kind, what):
    path = shutil.copytree(originals[kind], tmp_path / "a.zarr")
    edit(path, lambda record: record.update({"top_k" if kind == "top-k" else "codec": what}))
    message = outcome(path)
    # Another number of classes fits the same bytes: nothing in a store contradicts it.
    assert message or (kind == "top-k" and isinstance(what, dict) and what)


def text_with(path: Path, old: str, new: str, count: int = 1) -> Callable[[], None]:
    def change() -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, count))

    return change


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"endian": "little"', '"endian": "big"'),
        ('"name": "bytes"', '"name": "gzip"'),
        ('"codecs": [\n', '"codecs": [{"name": "transpose", "configuration": {"order": [2, 1, 0]}},\n'),
        ('"fill_value": "NaN"', '"fill_value": 0'),
        ('"fill_value": "NaN"', '"fill_value": NaN'),
        ('"data_type": "float16"', '"data_type": "bfloat16"'),
        ('"shape": [', '"shape": [1e999, '),
        ('"node_type": "array"', '"node_type": "group"'),
        ('"separator": "/"', '"separator": "."'),
        ('"index_location": "end"', '"index_location": "start"'),
        ('"zarr_format": 3', '"zarr_format": 2'),
        ('"storage_transformers": []', '"storage_transformers": [{"name": "x"}]'),
        ('"zarr_format": 3', '"zarr_format": 3, "zarr_format": 4'),
    ],
)
def test_array_metadata_that_change_numbers_are_refused(path, old, new):
    text_with(path / "logits" / "zarr.json", old, new)()
    assert "does not match the store" in outcome(path) or "not the metadata" in outcome(path)


GROUPS = {
    "NaN": lambda text: text.replace('"num_views": 2', '"num_views": NaN', 1),
    "Infinity": lambda text: text.replace('"num_views": 2', '"num_views": Infinity', 1),
    "a key twice": lambda text: text.replace('"num_views": 2', '"num_views": 2, "num_views": 1', 1),
    "a long number": lambda text: text.replace('"num_views": 2', '"num_views": ' + "9" * 10_000, 1),
    "no end": lambda text: text[:-1],
    "more behind": lambda text: text + "{}",
    "deep lists": lambda text: text.replace('"num_views": 2', '"num_views": ' + "[" * 50_000 + "]" * 50_000, 1),
    "deep objects": lambda text: '{"a":' * 100_000,
    "deep provenance": lambda text: text.replace('"seed": 3', '"seed": ' + "[" * 900 + "]" * 900, 1),
    "a text": lambda text: '"store"',
    "nothing": lambda text: "",
    "null": lambda text: "null",
    "lone surrogates": lambda text: text.replace('"made"', '"\\ud800"', 1),
}


@pytest.mark.parametrize("name", GROUPS)
def test_non_canonical_json_is_refused(path, name):
    file = path / "zarr.json"
    file.write_text(GROUPS[name](file.read_text()))
    assert outcome(path)


@pytest.mark.parametrize("raw", [b"\xff\xfe{}", b"\x00" * 100, "{}".encode("utf-16"), b"\xef\xbb\xbf{}"])
@pytest.mark.parametrize("key", ["zarr.json", "logits/zarr.json"])
def test_metadata_in_another_encoding_is_refused(path, key, raw):
    (path / key).write_bytes(raw)
    assert outcome(path)


MARKER_CHANGES: dict[str, Callable[[Record], object]] = {
    "bytes that overflow": lambda r: r["files"]["logits"].update(bytes=2**70),
    "bytes as a text": lambda r: r["files"]["logits"].update(bytes="100"),
    "fewer bytes": lambda r: r["files"]["logits"].update(bytes=0),
    "a checksum too large": lambda r: r["files"]["logits"].update(crc32c=2**32),
    "another checksum": lambda r: r["files"]["logits"].update(crc32c=1),
    "files as a list": lambda r: r.update(files=[]),
    "no files": lambda r: r.update(files={}),
    "no fidelity": lambda r: r.pop("fidelity"),
    "other rows": lambda r: r.update(rows=1),
    "rows as a list": lambda r: r.update(rows=[512]),
    "rows without end": lambda r: r.update(rows="9" * 5000),
    "another fingerprint": lambda r: r.update(fingerprint="a" * 64),
    "a fingerprint with lines": lambda r: r.update(fingerprint="a\n" * 64),
}


@pytest.mark.parametrize("kind", ["dense", "zstd"])
@pytest.mark.parametrize("name", MARKER_CHANGES)
def test_inconsistent_marker_is_refused(originals, tmp_path, kind, name):
    path = shutil.copytree(originals[kind], tmp_path / "a.zarr")
    edit_marker(path / "markers/c/0/1/0", MARKER_CHANGES[name])
    assert outcome(path)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 1500)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["logits", "float16", "float32", "zstd", "features/layer2.0", "../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Yield (container, key) of every nested value."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in inner] + [place for _, one in inner for place in places(one)]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(list(WISHES)), signed=st.booleans())
def test_any_value_in_a_manifest_is_right_or_refused(originals, data, kind, signed):
    file = originals[kind] / "zarr.json"
    before = file.read_bytes()
    group = json.loads(before)
    record = group["attributes"]["kdpipe"]
    container, key = data.draw(st.sampled_from(places(record)), label="place")
    if data.draw(st.booleans()) and isinstance(container, dict):
        del container[key]
    else:
        container[key] = data.draw(values, label="value")
    group["attributes"]["kdpipe"] = sign(record, fingerprint=signed)
    try:
        file.write_text(json.dumps(group))
        outcome(originals[kind])
    finally:
        file.write_bytes(before)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(list(WISHES)))
def test_any_value_in_array_metadata_is_right_or_refused(originals, data, kind):
    file = originals[kind] / data.draw(st.sampled_from(["features/layer2.0", "samples/ids", "markers"])) / "zarr.json"
    before = file.read_bytes()
    record = json.loads(before)
    container, key = data.draw(st.sampled_from(places(record)))
    container[key] = data.draw(values)
    try:
        file.write_text(json.dumps(record))
        outcome(originals[kind])
    finally:
        file.write_bytes(before)
