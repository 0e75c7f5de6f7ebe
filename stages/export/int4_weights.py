"""Weights of 4 bits in exported files: two in a byte, unpacked to 8 bits once, when the file is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx

DOMAIN = "kdpipe"
INT4_OPSET = 21
"""The first opset with 4-bit integers."""


class PackedInt4(nn.Module):
    """Integers from -8 to 7, of any shape, two in a byte; a call returns them as int8.

    Attributes:
        packed: uint8 [ceil(N / 2)], the earlier integer in the lower half, in two's complement, as ONNX stores INT4.
        shape: Of the integers, N in all.
    """

    packed: Tensor

    def __init__(self, integers: Tensor) -> None:
        super().__init__()
        self.shape = integers.shape
        nibbles = (integers.flatten().to(torch.int16) & 15).to(torch.uint8)
        nibbles = torch.cat([nibbles, nibbles.new_zeros(len(nibbles) % 2)])
        self.register_buffer("packed", nibbles[0::2] | (nibbles[1::2] << 4))

    def forward(self) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            symbolic: Tensor = torch.onnx.ops.symbolic(
                f"{DOMAIN}::Int4", (self.packed,), dtype=torch.int8, shape=self.shape, version=1
            )
            return symbolic
        nibbles = torch.stack([self.packed & 15, self.packed >> 4], dim=1).flatten()[: self.shape.numel()]
        return (nibbles.to(torch.int8) ^ 8).sub(8).view(self.shape)


def has_int4(model: nn.Module) -> bool:
    """Return whether a model in export form has weights of 4 bits in its convolutions or linear layers."""
    return any(isinstance(module, PackedInt4) for module in model.modules())


def store_int4(proto: onnx.ModelProto) -> None:
    """Turn the packed weights of an exported model into INT4 initializers, each read through a Cast to INT8.

    onnxruntime folds the Cast when it loads the file, and then computes what an INT8 file computes, with the same
    kernels. DequantizeLinear would take INT4 itself, but onnxruntime has no integer kernel behind that: a chain of
    convolutions took five times as long.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.value_info}
    for node in graph.node:
        if node.domain == DOMAIN:
            packed = constants[node.input[0]]
            content = numpy_helper.to_array(packed).tobytes()
            dims = shapes[node.output[0]]
            packed.CopyFrom(helper.make_tensor(packed.name, TensorProto.INT4, dims, content, raw=True))
            cast = helper.make_node("Cast", node.input, node.output, name=node.name, to=TensorProto.INT8)
            node.CopyFrom(cast)
    stale = set(constants)
    kept = [value for value in graph.value_info if value.name not in stale]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    imports = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
