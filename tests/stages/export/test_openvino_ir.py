"""Tests of OpenVINO's IR: it gives the network's answers, and is the same each time."""

import os
import signal

import numpy as np
import pytest
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, build, images

from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.latency import measure_latency
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.openvino_ir import export_openvino
from kdpipe.stages.export.runtimes import open_file

openvino = pytest.importorskip("openvino", reason="OpenVINO is an extra: pip install 'kdpipe[openvino]'")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a calibrated INT8 network, its float source, and the folder with the IR of both."""
    folder, model = tmp_path_factory.mktemp("openvino"), build("residual").eval()
    prepared = prepare_qat(model, EXAMPLE)
    calibrate(prepared, [images(60, seed=seed)[0] for seed in range(3)])
    networks = {"float": model, "int8": prepared.eval()}
    for kind, network in networks.items():
        export_onnx(network, EXAMPLE, folder / f"{kind}.onnx", metadata={"class_names": '["a"]'})
        export_openvino(folder / f"{kind}.onnx", folder / f"{kind}.xml")
    return networks, folder


@pytest.mark.parametrize(("kind", "least"), [("float", 1.0), ("int8", 0.98)])
def test_ir_agrees_with_torch_on_any_batch_size(made, kind, least):
    networks, folder = made
    whole, labels = images(201, seed=50)
    batches = [(whole[:200], labels[:200]), (whole[200:], labels[200:])]
    assert check_onnx(folder / f"{kind}.xml", networks[kind], batches).agreement >= least


def test_ir_computes_in_integers(made):
    _, folder = made
    network = open_file(folder / "int8.xml").network
    kinds = [
        (info["layerType"].astype(str), info["runtimePrecision"].astype(str))
        for info in (operation.get_rt_info() for operation in network.get_runtime_model().get_ops())
    ]
    assert {precision for layer, precision in kinds if layer == "Convolution"} <= {"u8", "i8"}


def test_ir_is_the_same_each_time_and_has_the_metadata(made, tmp_path):
    _, folder = made
    export_openvino(folder / "int8.onnx", tmp_path / "again.xml")
    for suffix in (".xml", ".bin"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (folder / f"int8{suffix}").read_bytes()
    assert str(folder).encode() not in (folder / "int8.xml").read_bytes()
    network = openvino.Core().read_model(str(folder / "int8.xml"))
    assert network.get_rt_info(["kdpipe", "class_names"]).astype(str) == '["a"]'


def test_onnx_and_ir_are_timed_in_turn(made):
    _, folder = made
    paths = {"onnx": folder / "int8.onnx", "ir": folder / "int8.xml"}
    found = measure_latency(paths, None, (1, 3), num_rounds=3, num_threads=1)
    assert all(found[name][size].p50_ms > 0 for name in paths for size in (1, 3))


def test_missing_or_broken_ir_is_one_sentence(made, tmp_path):
    with pytest.raises(ModelError, match="there is no OpenVINO IR at"):
        open_file(tmp_path / "absent.xml")
    (tmp_path / "text.xml").write_text("hello")
    with pytest.raises(ModelError, match="OpenVINO cannot load") as raised:
        open_file(tmp_path / "text.xml")
    assert "\n" not in str(raised.value)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match="OpenVINO cannot convert"):
        export_openvino(tmp_path / "text.onnx", tmp_path / "model.xml")
    assert not list(tmp_path.glob("model.*"))


def test_results_are_copies(made):
    _, folder = made
    session = open_file(folder / "float.xml")
    (first,) = session.run(["logits"], {"images": np.zeros((2, *IMAGE_SHAPE), np.float32)})
    kept = first.copy()
    session.run(["logits"], {"images": np.ones((2, *IMAGE_SHAPE), np.float32)})
    assert (first == kept).all()


def test_signals_are_handled_after_networks_are_freed(made):
    child = os.fork()
    if child == 0:
        seen = []
        signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
        networks = [open_file(made[1] / f"{kind}.xml") for kind in ("float", "int8")]
        while networks:
            networks.pop(0)
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0 if seen else 1)
    assert os.waitpid(child, 0)[1] == 0
