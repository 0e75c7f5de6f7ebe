"""Tests of which network of a compression is recommended, and why."""

import pytest

from kdpipe.stages.compress.artifacts.ranking import ranked, reason

UNPRUNED_INT8_IS_BEST = {
    "student": {"accuracy": 0.478, "onnx_bytes": 400},
    "pruned": {"accuracy": 0.405, "onnx_bytes": 200},
    "int8-unpruned": {"accuracy": 0.480, "onnx_bytes": 100},
    "int8": {"accuracy": 0.402, "onnx_bytes": 50},
}


@pytest.mark.parametrize(
    ("networks", "order", "because"),
    [
        (
            UNPRUNED_INT8_IS_BEST,
            ["int8-unpruned", "student", "pruned", "int8"],
            "no other network reaches 99 % of its 48.00 % with a smaller file",
        ),
        (
            {"student": {"accuracy": 0.9, "onnx_bytes": 400}, "int8": {"accuracy": 0.892, "onnx_bytes": 50}},
            ["int8", "student"],
            "its file is the smallest of those that reach 99 % of the best accuracy (90.00 %, student)",
        ),
        (
            {
                "student": {"accuracy": 0.8, "validation_accuracy": 0.9, "onnx_bytes": 400},
                "int8": {"accuracy": 0.9, "validation_accuracy": 0.8, "onnx_bytes": 50},
            },
            ["student", "int8"],
            "no other network reaches 99 % of its 90.00 % on the validation images with a smaller file",
        ),
        ({"student": {"accuracy": 0.0, "onnx_bytes": 400}}, ["student"], "it is the only one"),
    ],
)
def test_smallest_accurate_network_is_recommended(networks, order, because):
    assert ranked(networks) == order
    assert reason(networks) == because
