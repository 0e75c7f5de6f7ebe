"""Tests of ExecuTorch's programs: they give the network's answers in INT8, and are the same each time."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, build, images

from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.latency import measure_latency
from kdpipe.stages.export.executorch_program import MAX_BATCH, METADATA, ExecutorchSession, export_executorch
from kdpipe.stages.export.onnx_check import check_onnx
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.openvino_ir import SignalStack
from kdpipe.stages.export.runtimes import open_file

pytest.importorskip("executorch", reason="ExecuTorch is an extra: pip install 'kdpipe[executorch]'")

pytestmark = pytest.mark.slow


LARGEST = {"float": 1e-5, "int8": 0.02}
"""The differences of logits allowed: sums near the middle of two integers round to either."""


def quantized(name, exclude=()):
    prepared = prepare_qat(build(name).eval(), EXAMPLE, exclude=exclude)
    calibrate(prepared, [images(60, seed=seed)[0] for seed in range(3)])
    return prepared.eval()


def delegates(path):
    """Return the number of parts that XNNPACK runs, and the operators of ExecuTorch's own between them."""
    from executorch.exir._serialize import _deserialize_pte_binary

    plans = _deserialize_pte_binary(path.read_bytes()).program.execution_plan
    (plan,) = [plan for plan in plans if plan.name == "forward"]
    return len(plan.delegates), [operator.name for operator in plan.operators]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a calibrated INT8 network, its float source, and the folder with the programs of both."""
    folder = tmp_path_factory.mktemp("executorch")
    networks = {"float": build("residual").eval(), "int8": quantized("residual")}
    for kind, network in networks.items():
        export_executorch(network, EXAMPLE, folder / f"{kind}.pte", metadata={"class_names": '["a"]'})
    return networks, folder


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_program_computes_what_torch_does_on_any_batch_size(made, kind):
    networks, folder = made
    whole, labels = images(MAX_BATCH + 138, seed=50)
    batches = [(whole[:-1], labels[:-1]), (whole[-1:], labels[-1:])]
    found = check_onnx(folder / f"{kind}.pte", networks[kind], batches)
    assert found.agreement >= 0.99
    assert found.max_logit_difference < LARGEST[kind]


@pytest.mark.parametrize("name", ["depthwise", "preactivation", "plain", "branching"])
def test_other_networks_run_whole_in_xnnpack(tmp_path, name):
    for kind, network in {"float": build(name).eval(), "int8": quantized(name)}.items():
        path = tmp_path / f"{kind}.pte"
        export_executorch(network, EXAMPLE, path)
        whole, labels = images(70, seed=50)
        found = check_onnx(path, network, [(whole, labels), (whole[:3], labels[:3])])
        assert found.max_logit_difference < LARGEST[kind]
        assert delegates(path) == (2 if (kind, name) == ("int8", "branching") else 1, [])


def test_layers_kept_in_float_stay_float(tmp_path):
    network = quantized("residual", exclude=["layer1.0"])
    export_executorch(network, EXAMPLE, tmp_path / "model.pte")
    assert check_onnx(tmp_path / "model.pte", network, [images(70, seed=50)]).max_logit_difference < LARGEST["int8"]


def test_integers_take_a_byte_each(made):
    _, folder = made
    assert (folder / "int8.pte").stat().st_size < 0.5 * (folder / "float.pte").stat().st_size


def test_program_is_the_same_each_time_and_has_the_metadata(made, tmp_path):
    _, folder = made
    again = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_executorch_program import EXAMPLE, export_executorch, quantized
export_executorch(quantized("residual"), EXAMPLE, Path(sys.argv[2]), metadata={"class_names": '["a"]'})
"""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    subprocess.run(
        [sys.executable, "-c", again, str(Path(__file__).parent), str(tmp_path / "again.pte")],
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    content = (folder / "int8.pte").read_bytes()
    assert (tmp_path / "again.pte").read_bytes() == content
    assert str(folder).encode() not in content and bytes(Path.cwd()) not in content
    from executorch.runtime import Runtime

    (found,) = Runtime.get().load_program(content).load_method(METADATA).execute([])
    assert json.loads(found) == {"class_names": '["a"]'}


def test_onnx_and_program_are_timed_in_turn(made):
    networks, folder = made
    export_onnx(networks["int8"], EXAMPLE, folder / "int8.onnx", metadata={})
    paths = {"onnx": folder / "int8.onnx", "program": folder / "int8.pte"}
    found = measure_latency(paths, None, (1, 3), num_rounds=3, num_threads=1)
    assert all(found[name][size].p50_ms > 0 for name in paths for size in (1, 3))


def test_open_programs_survive_another_number_of_threads(made):
    _, folder = made
    feed = {"images": images(5, seed=1)[0].numpy()}
    one = open_file(folder / "int8.pte", 1)
    (before,) = one.run(None, feed)
    two = open_file(folder / "int8.pte", 2)
    assert (two.run(None, feed)[0] == before).all()
    assert (one.run(None, feed)[0] == before).all()
    assert {one, two} <= set(ExecutorchSession.live)


def test_missing_or_broken_program_is_one_sentence(made, tmp_path):
    with pytest.raises(ModelError, match="there is no ExecuTorch program at"):
        open_file(tmp_path / "absent.pte")
    (tmp_path / "text.pte").write_text("hello")
    with pytest.raises(ModelError, match="ExecuTorch cannot load") as raised:
        open_file(tmp_path / "text.pte")
    assert "\n" not in str(raised.value)

    class Branch(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(ModelError, match="ExecuTorch cannot make model.pte") as raised:
        export_executorch(Branch(), EXAMPLE, tmp_path / "model.pte")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "model.pte").exists()


def test_results_are_copies(made):
    _, folder = made
    session = open_file(folder / "float.pte")
    (first,) = session.run(["logits"], {"images": np.zeros((2, *IMAGE_SHAPE), np.float32)})
    kept = first.copy()
    session.run(["logits"], {"images": np.ones((2, *IMAGE_SHAPE), np.float32)})
    assert (first == kept).all()


def test_nothing_is_written_to_stderr(made, capfd):
    open_file(made[1] / "int8.pte", 1).run(None, {"images": np.zeros((2, *IMAGE_SHAPE), np.float32)})
    assert capfd.readouterr().err == ""


def test_signals_are_handled_while_programs_are_loaded_and_after(made):
    """A forked child would not have the runtime's threads: a new process loads them."""
    script = """
import os, signal, sys
import numpy as np
from pathlib import Path
from kdpipe.stages.export.runtimes import open_file
seen = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: seen.append(number))
feed = {"images": np.zeros((2, 3, 8, 8), np.float32)}
programs = [open_file(Path(path), 2) for path in sys.argv[1:]]
for program in programs:
    program.run(None, feed)
os.kill(os.getpid(), signal.SIGUSR1)
while programs:
    programs.pop(0)
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(0 if len(seen) == 2 else 1)
"""
    paths = [str(made[1] / f"{kind}.pte") for kind in ("float", "int8")]
    found = subprocess.run(
        [sys.executable, "-c", script, *paths], check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert found.returncode == 0


def test_the_threads_signal_stack_stays(made):
    libc, before, after = ctypes.CDLL(None), SignalStack(), SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    session = open_file(made[1] / "int8.pte", 1)
    session.run(None, {"images": np.zeros((2, *IMAGE_SHAPE), np.float32)})
    libc.sigaltstack(None, ctypes.byref(after))
    assert (before.memory, before.flags, before.size) == (after.memory, after.flags, after.size)
    assert signal.getsignal(signal.SIGTERM) is not None
