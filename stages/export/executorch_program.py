"""ExecuTorch: write a network as a program (.pte) for XNNPACK, and run such programs on the CPU.

An INT8 network keeps its grids. XNNPACK's activations are signed with a zero point: the unsigned integers less 128,
which stand for the same values. Weights are signed, one scale per output channel, already. What XNNPACK does otherwise:

- It has 32-bit biases, but reads float ones and rounds them to steps of input scale times weight scale. These are
  written as the values of the integers, and so become the same integers again.
- A layer in integers writes integers. One whose output stays float (the classifier) computes in float32, with the
  rounded weights, which then take four bytes each.
- Inputs of a concatenation are on the grid of its output: they are rounded to that first, which gives the same values.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch

# Registers torch.ops.quantized_decomposed.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.exportable import export_form, quiet
from kdpipe.stages.export.onnx_session import INPUT
from kdpipe.stages.runtime.versions import require_library
from kdpipe.store.fs.checksums import write_with_sum

if TYPE_CHECKING:
    import numpy as np

MAX_BATCH = 64
"""The most images of one call: ExecuTorch needs a bound. It reserves no memory for inputs and outputs."""

METADATA = "metadata"
"""The method of a program that returns its metadata, a JSON object of strings."""

ATEN, QUANTIZED = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = QUANTIZED.quantize_per_tensor.default, QUANTIZED.dequantize_per_tensor.default
RECTIFIERS = (ATEN.relu.default, ATEN.relu_.default, ATEN.hardtanh.default, ATEN.hardtanh_.default)
UNSIGNED_TO_SIGNED = 128


def export_executorch(
    model: nn.Module, example: Tensor, path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `model`, in eval mode, as a program for XNNPACK, byte-identical for equal networks; it stays unchanged.

    The program maps images [batch, C, H, W], float32, to logits [batch, num_classes], for up to `MAX_BATCH` images; for
    one at a time, where XNNPACK fixes the batch size (it does in slices, those of shufflenets).

    Args:
        model: A float network, or an INT8 one from `prepare_qat`, calibrated.
        example: Normalized images [B, C, H, W], of which only the shape counts.
        path: The file.
        metadata: Names and texts, which the program's method `metadata` returns as JSON.

    Raises:
        ModelError: If ExecuTorch is absent, or the model cannot be exported.
    """
    _require(path.name)
    network = export_form(model).requires_grad_(False)
    try:
        with quiet(), _same_log_handlers(), torch.no_grad():
            about = json.dumps(dict(sorted((metadata or {}).items())))
            content = _lowered(network, example, about, MAX_BATCH)
            if not _runs_on_one(content, example):
                content = _lowered(network, example, about, 1)
    except Exception as error:
        raise ModelError(f"ExecuTorch cannot make {path.name} of the model: {cause(error)}") from error
    try:
        write_with_sum(path, content)
    except OSError as error:
        raise ModelError(f"the program {path} cannot be written: {error.strerror or cause(error)}.") from error


def _lowered(model: nn.Module, example: Tensor, metadata: str, max_batch: int) -> bytes:
    """Return the bytes of a program for up to `max_batch` images.

    It is traced at the largest batch: torch guards on fewer than 16 images where it chooses a kernel, and ExecuTorch
    would take that for the bound.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    images = torch.zeros(max_batch, *example.shape[1:])
    sizes = ({0: Dim("batch", min=1, max=max_batch)},) if max_batch > 1 else None
    program = torch.export.export(model, (images,), dynamic_shapes=sizes)
    for rewrite in (_sign_activations, _requantize_joined, _dequantize_constants, _part_dequantizers):
        rewrite(program)
    program.graph_module.recompile()
    edge = to_edge_transform_and_lower(
        program,
        transform_passes=[_state_sizes],
        partitioner=[XnnpackPartitioner()],
        constant_methods={METADATA: metadata},
    )
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    content: bytes = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer
    return content


def _runs_on_one(content: bytes, example: Tensor) -> bool:
    """Return whether a program runs on a single image."""
    from executorch.runtime import Runtime

    try:
        with _quiet_runtime():
            program = Runtime.get().load_program(content)
            program.load_method("forward").execute([torch.zeros(1, *example.shape[1:])])
    except RuntimeError:
        return False
    return True


def _sign_activations(program: ExportedProgram) -> None:
    """Shift unsigned activations to the signed integers of the same values."""
    for node in program.graph.nodes:
        if node.target in (QUANTIZE, DEQUANTIZE) and node.args[-1] is torch.uint8:
            source, scale, zero, low, high, _ = node.args
            shifted = (value - UNSIGNED_TO_SIGNED for value in (zero, low, high))
            node.args = (source, scale, *shifted, torch.int8)


def _requantize_joined(program: ExportedProgram) -> None:
    """Round the inputs of a rounded concatenation to the grid of its output, as XNNPACK wants them."""
    for node in list(program.graph.nodes):
        if node.target is not ATEN.cat.default or not _is_rounded(node):
            continue
        grid = _only_reader(node).args[1:]  # type: ignore[union-attr]
        for source in dict.fromkeys(node.args[0]):
            if source.target is not DEQUANTIZE or source.args[1:] == grid:
                continue
            with program.graph.inserting_before(node):
                rounded = program.graph.call_function(QUANTIZE, (source, *grid))
                again = program.graph.call_function(DEQUANTIZE, (rounded, *grid))
            rounded.meta["val"] = source.args[0].meta["val"]
            again.meta["val"] = source.meta["val"]
            node.replace_input_with(source, again)


def _dequantize_constants(program: ExportedProgram) -> None:
    """Write biases, and the weights of layers with float outputs, as float numbers."""
    buffers = program.graph_signature.inputs_to_buffers
    for node in list(program.graph.nodes):
        if node.target is not QUANTIZED.dequantize_per_channel.default:
            continue
        if node.args[-1] is torch.int32 or not all(_is_rounded(layer) for layer in node.users):
            stored = node.args[0]
            name = buffers[stored.name]
            if program.state_dict[name].dtype is not torch.float32:
                arguments = [
                    program.state_dict[buffers[given.name]] if isinstance(given, fx.Node) else given
                    for given in node.args
                ]
                program.state_dict[name] = node.target(*arguments)
                stored.meta["val"] = stored.meta["val"].to(torch.float32)
            node.replace_all_uses_with(stored)
            program.graph.erase_node(node)


def _part_dequantizers(program: ExportedProgram) -> None:
    """Give every reader of rounded values a dequantization of its own: XNNPACK fuses no shared one."""
    for node in list(program.graph.nodes):
        for reader in list(node.users)[1:] if node.target is DEQUANTIZE else ():
            with program.graph.inserting_before(reader):
                reader.replace_input_with(node, program.graph.node_copy(node))


def _is_rounded(node: fx.Node) -> bool:
    """Return whether the values of a node are only read rounded, after a rectifier or not."""
    reader = _only_reader(node)
    if reader is not None and reader.target in RECTIFIERS:
        reader = _only_reader(reader)
    return reader is not None and reader.target is QUANTIZE


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _state_sizes(graph_module: fx.GraphModule) -> PassResult:
    """Write what depends on the batch as XNNPACK reads it, in ExecuTorch's edge dialect.

    Views get -1 for the batch, means over maps keep their sides until a view removes them, and parts of a split become
    slices.
    """
    from executorch.exir.dialects._ops import ops

    graph, edge = graph_module.graph, ops.edge.aten
    for node in list(graph.nodes):
        if node.target is edge.mean.dim and _averages_maps(node):
            source, sides = node.args[:2]
            with graph.inserting_before(node):
                kept = graph.call_function(node.target, (source, sides, True))
                kept.meta["val"] = node.meta["val"][..., None, None]
                view = graph.call_function(edge.view_copy.default, (kept, list(node.meta["val"].shape)))
            view.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(view)
            graph.erase_node(node)
        elif node.target is edge.split_with_sizes_copy.default:
            _slice(graph, node, edge.slice_copy.Tensor)
    for node in graph.nodes:
        if node.target is edge.view_copy.default:
            sides = [side if isinstance(side, int) else -1 for side in node.meta["val"].shape]
            if sides.count(-1) == 1:
                node.args = (node.args[0], sides)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return PassResult(graph_module, True)


def _averages_maps(node: fx.Node) -> bool:
    """Return whether a mean is over the sides of maps [B, C, H, W], which it removes."""
    arguments: Any = node.args
    source, sides, *keeps = arguments
    is_map = len(source.meta["val"].shape) == 4 and sorted(side % 4 for side in sides) == [2, 3]
    return is_map and not any(keeps) and not node.kwargs


def _slice(graph: fx.Graph, split: fx.Node, slice_copy: Any) -> None:
    """Replace the parts of a split by slices."""
    arguments: Any = split.args
    source, sizes, *axis = arguments
    for part in list(split.users):
        number: Any = part.args[1]
        start = sum(sizes[:number])
        with graph.inserting_before(part):
            cut = graph.call_function(slice_copy, (source, *(axis or [0]), start, start + sizes[number]))
        cut.meta["val"] = part.meta["val"]
        part.replace_all_uses_with(cut)
        graph.erase_node(part)


class ExecutorchSession:
    """A loaded program, with the part of onnxruntime's interface that `Session` has.

    More images than it takes at once are run in several calls.
    """

    live: ClassVar[WeakSet[ExecutorchSession]] = WeakSet()

    program: Any
    method: Any

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        _require(path.name)
        if not path.is_file():
            raise ModelError(f"there is no ExecuTorch program at {path}.")
        self.path = path
        with _quiet_runtime():
            _set_threads(num_threads)
        self._load()
        found = self.method.metadata.input_tensor_meta(0)
        self.max_batch, *self.image_shape = found.sizes()
        ExecutorchSession.live.add(self)

    def _load(self) -> None:
        from executorch.runtime import Runtime

        try:
            with _quiet_runtime() as said:
                self.program = Runtime.get().load_program(self.path.read_bytes())  # it owns the bytes
                self.method = self.program.load_method("forward")
        except (RuntimeError, KeyError, OSError) as error:
            reason = next((line.partition("] ")[2] for line in said if "] " in line), cause(error))
            raise ModelError(f"ExecuTorch cannot load {self.path}: {reason}") from error

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return the input; its batch, of any size, is None."""
        return [SimpleNamespace(name=INPUT, type="tensor(float)", shape=[None, *self.image_shape])]

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return copies of the outputs."""
        if self.method is None:
            self._load()
        images = torch.from_numpy(feed[INPUT]).contiguous()
        parts = [images[start : start + self.max_batch] for start in range(0, len(images), self.max_batch)]
        logits = [self.method.execute([part])[0].clone() for part in parts]
        return [torch.cat(logits).numpy()]


def _set_threads(num_threads: int | None) -> None:
    """Set the number of threads, one for all programs of the process.

    A loaded program points to the threads that it was loaded with: those in use are loaded again at their next run.
    """
    from executorch.extension.pybindings import portable_lib

    if num_threads and portable_lib._threadpool_get_thread_count() != num_threads:
        for session in ExecutorchSession.live:
            session.method = session.program = None
        portable_lib._unsafe_reset_threadpool(num_threads)


def _require(needed_by: str) -> None:
    """Raise ModelError unless ExecuTorch is installed, and built for this torch."""
    require_library("executorch", needed_by)
    try:
        with quiet(), _same_log_handlers():
            import executorch.runtime  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"{needed_by} needs executorch, which does not run beside torch {torch.__version__}: {cause(error)}"
        ) from error


@contextlib.contextmanager
def _same_log_handlers() -> Iterator[None]:
    """Undo `logging.basicConfig`, which ExecuTorch's modules call when they are imported."""
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


@contextlib.contextmanager
def _quiet_runtime() -> Iterator[list[str]]:
    """Keep what the runtime's C++ writes to stderr, and fill a list with its lines at the end."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as kept, contextlib.redirect_stderr(io.StringIO()) as python:  # some goes to Python's
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            kept.seek(0)
            said = (kept.read().decode(errors="replace") + python.getvalue()).splitlines()
            lines += [line for line in said if "cpuinfo" not in line]
