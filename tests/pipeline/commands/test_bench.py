"""`kdpipe bench`: latency of ONNX files, as a table and as JSON, and errors."""

import json
from importlib.metadata import version

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.kdpipe_process import kdpipe_here
from support.tiny_nets import EXAMPLE, build

from kdpipe.pipeline.commands.bench import file_bytes
from kdpipe.stages.export.executorch_program import export_executorch
from kdpipe.stages.runtime.cpu import cpu_name, num_cores


def network(*, num_inputs=1, batch="batch", weights=None):
    """An ONNX file that adds up its inputs, and weights if there are some."""
    shape = (batch, 3, 8, 8)
    inputs = [
        helper.make_tensor_value_info(f"images{number}", TensorProto.FLOAT, shape) for number in range(num_inputs)
    ]
    constants = [] if weights is None else [numpy_helper.from_array(weights, "weights")]
    names = [value.name for value in (*inputs, *constants)]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)]
    graph = helper.make_graph([helper.make_node("Sum", names, ["logits"])], "sum", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def path(tmp_path):
    onnx.save(network(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def document(*arguments):
    ended = kdpipe_here("bench", *arguments, "--json")
    assert ended.exit_code == 0, ended.stderr
    return json.loads(ended.stdout)


def test_defaults_are_batch_1_and_64_on_all_cores(path):
    found = document(path, "--rounds", 3)
    assert (found["command"], found["cpu"], found["num_threads"]) == ("bench", cpu_name(), num_cores())
    assert (found["num_rounds"], found["runtimes"]) == (3, {"onnxruntime": version("onnxruntime")})
    (file,) = found["files"]
    assert (file["path"], file["bytes"]) == (str(path), path.stat().st_size)
    assert [latency["batch_size"] for latency in file["latency"]] == [1, 64]
    assert all(0 < latency["p50_ms"] <= latency["p95_ms"] for latency in file["latency"])
    assert file["time_against_first"] == 1


def test_options_apply_and_files_are_compared_to_the_first(path):
    found = document(path, path, "--batch-size", 2, "--batch-size", 5, "--batch-size", 2, "--threads", 1, "--rounds", 3)
    assert found["num_threads"] == 1
    first, second = found["files"]
    assert [latency["batch_size"] for latency in second["latency"]] == [2, 5]
    assert second["images_per_s"] == pytest.approx(5000 / second["latency"][1]["p50_ms"])
    times = [file["latency"][1]["p50_ms"] for file in (first, second)]
    assert second["time_against_first"] == pytest.approx(times[1] / times[0])


def test_the_table_has_the_cpu_and_a_row_per_file(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    onnx.save(network(), "b[red]\x1b.onnx")
    ended = kdpipe_here("bench", path.name, "b[red]\x1b.onnx", "--rounds", 3, "--threads", 1)
    assert ended.exit_code == 0
    assert cpu_name() in ended.stdout and "threads: 1" in ended.stdout
    assert [line.split()[0] for line in ended.stdout.splitlines() if ".onnx" in line] == ["model.onnx", "b[red]?.onnx"]
    for header in ("batch 1, ms", "batch 64, ms", "images/s", "time / first"):
        assert header in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 120


def test_external_weights_count(tmp_path):
    weights = numpy_helper.to_array(helper.make_tensor("w", TensorProto.FLOAT, (3, 8, 8), [0.5] * 192))
    onnx.save(
        network(weights=weights),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.data",
        size_threshold=0,
    )
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "model.data")]
    assert file_bytes(tmp_path / "model.onnx") == sum(sizes) > sizes[0]


@pytest.mark.parametrize("name", ["absent.onnx", "folder", "text.onnx", "two.onnx", "fixed.onnx"])
def test_a_file_that_cannot_be_measured_is_one_sentence(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.onnx").write_text("hello")
    onnx.save(network(num_inputs=2), tmp_path / "two.onnx")
    onnx.save(network(batch=3), tmp_path / "fixed.onnx")
    ended = kdpipe_here("bench", tmp_path / name)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr.startswith("kdpipe: error: ") and str(tmp_path / name) in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("wrong", [("--rounds", 0), ("--batch-size", 0), ("--threads", 0), ("--threads", "many")])
def test_numbers_out_of_range_are_usage_errors(path, wrong):
    ended = kdpipe_here("bench", path, *wrong)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert wrong[0] in ended.stderr


def test_bench_without_a_file_is_a_usage_error():
    assert kdpipe_here("bench").exit_code == 2


def test_programs_are_measured_beside_onnx_files(path, tmp_path):
    pytest.importorskip("executorch", reason="ExecuTorch is an extra: pip install 'kdpipe[executorch]'")
    export_executorch(build("plain").eval(), EXAMPLE, tmp_path / "model.pte")
    found = document(path, tmp_path / "model.pte", "--batch-size", 2, "--threads", 1, "--rounds", 3)
    assert found["runtimes"] == {name: version(name) for name in ("onnxruntime", "executorch")}
    assert found["files"][1]["bytes"] == (tmp_path / "model.pte").stat().st_size
    assert found["files"][1]["runtime"] == "executorch"


def test_programs_without_executorch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("kdpipe.stages.runtime.versions.find_spec", lambda name: None)
    ended = kdpipe_here("bench", tmp_path / "model.pte")
    assert ended.exit_code == 1
    assert "model.pte needs executorch, which is not installed: pip install 'kdpipe[executorch]'." in ended.stderr
