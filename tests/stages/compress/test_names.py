"""One name for each network, in progress and tables alike."""

import pytest

from kdpipe.pipeline.report.networks import network_entries
from kdpipe.stages.compress.names import compressed_name, network_name
from kdpipe.stages.compress.targets import SCHEMES


@pytest.mark.parametrize(
    ("kind", "pruned", "unpruned"),
    [
        ("pruned", "pruned", "pruned"),
        ("pruned-alone", "pruned, hard labels", "pruned, hard labels"),
        ("int8", "pruned + INT8", "INT8"),
        ("int4-alone", "pruned + INT4, hard labels", "INT4, hard labels"),
        ("int8-ptq", "INT8, calibrated", "INT8, calibrated"),
        ("int8-unpruned", "INT8", "INT8"),
        ("int8-unpruned-alone", "INT8, hard labels", "INT8, hard labels"),
    ],
)
def test_name_follows_from_kind_and_chain(kind, pruned, unpruned):
    assert (network_name(kind, prunes=True), network_name(kind, prunes=False)) == (pruned, unpruned)


@pytest.mark.parametrize("steps", [["prune"], ["quantize"], ["prune", "quantize"]])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tables_have_these_names_and_no_name_twice(tmp_path, steps, scheme):
    compress = {"steps": steps, "baselines": True, "quantize": {"scheme": scheme}}
    entries = network_entries({"student": {"seeds": [0]}, "compress": compress}, tmp_path)[3:]
    names = {entry.kind: entry.name for entry in entries}
    assert names == {kind: network_name(kind, prunes="prune" in steps) for kind in names}
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize(
    ("student", "name"),
    [
        (None, "compressed"),
        ("elsewhere/external.safetensors", "compressed-external"),
        ("run/students/cohort-2-seed0/model.safetensors", "compressed-cohort-2-seed0"),
        ("model.safetensors", "compressed-model"),
    ],
)
def test_folder_is_named_after_the_student(student, name):
    assert compressed_name(student) == name
