"""Tests of latency measurement."""

import onnx
import pytest
from onnx import TensorProto, helper

from kdpipe.stages.errors import ModelError, StoppedEarly
from kdpipe.stages.evaluation import latency
from kdpipe.stages.evaluation.latency import WARM_UP_ROUNDS, Latency, measure_latency
from kdpipe.stages.runtime.cpu import cpu_features, cpu_name, num_cores

CPUINFO = """processor\t: 0
model name\t: Fast CPU 9000
flags\t\t: fpu avx2 avx512f avx512_vnni sse2
processor\t: 1
model name\t: Fast CPU 9000
flags\t\t: fpu avx2
"""


def network(folder, *, shape=("batch", 3, 8, 8), kind=TensorProto.FLOAT, num_inputs=1, name="model.onnx"):
    """Write an ONNX file that adds up its inputs."""
    inputs = [helper.make_tensor_value_info(f"images{number}", kind, shape) for number in range(num_inputs)]
    nodes = [helper.make_node("Sum", [value.name for value in inputs], ["logits"])]
    graph = helper.make_graph(nodes, "sum", inputs, [helper.make_tensor_value_info("logits", kind, shape)])
    path = folder / name
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def measure(paths, image_shape=None, batch_sizes=(1, 4), **options):
    options = {"num_rounds": 3, "num_threads": 1} | options
    return measure_latency(paths, image_shape, batch_sizes, **options)


def refusal(path, **options):
    """Return the error message for a file."""
    with pytest.raises(ModelError) as raised:
        measure({"one": path}, **options)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def test_each_file_is_measured_at_each_batch_size(tmp_path):
    small, large = network(tmp_path, name="small"), network(tmp_path, shape=(None, 1, 16, 16), name="large")
    measured = measure({"small": small, "large": large})
    assert {name: list(sizes) for name, sizes in measured.items()} == {"small": [1, 4], "large": [1, 4]}
    for sizes in measured.values():
        for found in sizes.values():
            assert 0 < found.p50_ms <= found.p95_ms
            assert found.to_json() == {"p50_ms": found.p50_ms, "p95_ms": found.p95_ms}


def test_summary_is_median_and_95th_percentile():
    found = Latency([float(number) for number in range(101)][::-1])
    assert (found.p50_ms, found.p95_ms) == (50.0, 95.0)


def test_files_take_turns_and_warm_up_is_not_counted(tmp_path, monkeypatch):
    order = []

    def run_ms(path, session, feed):
        order.append((path.name, *next(iter(feed.values())).shape))
        return float(len(order))

    monkeypatch.setattr(latency, "_run_ms", run_ms)
    paths = {name: network(tmp_path, name=name) for name in ("a", "b")}
    times = measure_latency(paths, (3, 8, 8), (1, 4), num_rounds=3, num_threads=1)
    turns = WARM_UP_ROUNDS + 3
    assert order == [(name, size, 3, 8, 8) for size in (1, 4) for _ in range(turns) for name in ("a", "b")]
    assert times["a"][1].rounds_ms == [float(2 * turn + 1) for turn in range(WARM_UP_ROUNDS, turns)]
    assert [len(latency.rounds_ms) for sizes in times.values() for latency in sizes.values()] == [3] * 4


def test_measurement_can_be_stopped_between_rounds(tmp_path):
    calls = []

    def stop():
        calls.append(None)
        if len(calls) == 5:
            raise StoppedEarly

    with pytest.raises(StoppedEarly):
        measure({"one": network(tmp_path)}, between_rounds=stop)
    assert len(calls) == 5


def test_fixed_batch_size_allows_no_other(tmp_path):
    path = network(tmp_path, shape=(4, 3, 8, 8))
    assert list(measure({"one": path}, batch_sizes=[4])["one"]) == [4]
    message = refusal(path, batch_sizes=[4, 8])
    assert "takes batches of 4 only, not of 4, 8" in message


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"num_inputs": 2}, "its input is images0 tensor(float) ['batch', 3, 8, 8], images1 "),
        ({"shape": ("batch", 10)}, "['batch', 10], expected one of images, float32"),
        ({"kind": TensorProto.DOUBLE}, "images0 tensor(double)"),
        ({"shape": ("batch", 3, "height", "width")}, "with fixed C, H, W"),
    ],
)
def test_file_without_image_input_is_an_error(tmp_path, made, message):
    assert message in refusal(network(tmp_path, **made))


def test_image_shape_must_match_the_file(tmp_path):
    assert measure({"one": network(tmp_path, shape=("batch", 3, "height", "width"))}, (3, 5, 7))["one"][1].p50_ms > 0
    assert "cannot run" in refusal(network(tmp_path, name="fixed"), image_shape=(3, 5, 7))


def test_invalid_onnx_file_is_an_error(tmp_path):
    assert "there is no ONNX file at" in refusal(tmp_path / "absent.onnx")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "text.onnx").write_text("hello")
    assert "onnxruntime cannot load" in refusal(tmp_path / "text.onnx")


def test_no_file_runs_if_one_is_invalid(tmp_path):
    rounds = []
    paths = {"good": network(tmp_path), "bad": tmp_path / "absent.onnx"}
    with pytest.raises(ModelError):
        measure(paths, between_rounds=lambda: rounds.append(None))
    assert not rounds


def test_failing_run_is_an_error(tmp_path):
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ("batch", 3, 8, 8))]
    shape = helper.make_node("Constant", [], ["shape"], value_ints=[5, 3])
    reshaped = helper.make_node("Reshape", ["images", "shape"], ["logits"])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("a", "b"))
    graph = helper.make_graph([shape, reshaped], "g", inputs, [output])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    assert "cannot run" in refusal(path) and "[1, 3, 8, 8]" in refusal(path)


def test_cpu_name_and_features(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    assert cpu_name(path) == "Fast CPU 9000"
    assert cpu_features(path) == ["avx2", "avx512f", "avx512_vnni"]
    path.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert cpu_features(path) == ["asimddp", "i8mm"]


def test_cpu_without_proc_has_a_name_and_no_features(tmp_path):
    assert cpu_name(tmp_path / "absent")
    assert cpu_features(tmp_path / "absent") == []
    assert num_cores() >= 1
