"""torch.compile: functions on batches of one size, compiled with CUDA graphs on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.runtime.memory import is_out_of_memory

T = TypeVar("T")

MAX_ERROR = 0.01
"""The largest relative error of a compiled gradient in float32."""

NEGLIGIBLE = 0.01
"""The share of the norm of all gradients below which the errors of a parameter's gradient do not matter."""


def compiled(
    function: Callable[..., T], device: torch.device, *, key: str, backend: str = "inductor"
) -> Callable[..., T]:
    """Return a function compiled as one graph, which draws the random numbers that it draws without that.

    Each shape of its arguments is compiled by itself, so that results depend on nothing that ran before. On CUDA it
    runs as a CUDA graph: its results are overwritten by the next step, which `begin_step` announces.

    Args:
        function: The function, of tensors, and of objects whose own tensors have the same shapes each time.
        device: The device of the tensors.
        key: The recipe key that asks for it, for messages.
        backend: torch.compile's backend.

    Raises:
        RecipeError: By the returned function, if it cannot be compiled.
    """
    options: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": device.type == "cuda"}
    compile_ = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    by_shape: dict[Any, Any] = {}  # torch limits how many shapes a function may have

    def run(*arguments: Any) -> T:
        shapes = tuple(one.shape for one in arguments if isinstance(one, Tensor))
        try:
            if shapes not in by_shape:
                own_options = options if backend == "inductor" else None
                by_shape[shapes] = compile_(_with_own_code(function), options=own_options)
            return by_shape[shapes](*arguments)  # type: ignore[no-any-return]
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            raise RecipeError(
                f"{key} = true: torch.compile cannot compile this ({cause(error)}): set it to false."
            ) from error

    return run


def begin_step(device: torch.device) -> None:
    """Announce that results of compiled functions of the step before are no longer needed."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


@cache
def require_compiler(device: torch.device, key: str) -> None:
    """Compile a sum. Raises RecipeError, naming the recipe key that asks for it, if there is no working compiler."""
    try:
        compiled(lambda ones: ones + 1, device, key=key)(torch.ones(8, device=device))
    except RecipeError as error:
        needs = "triton and a C compiler, such as gcc" if device.type == "cuda" else "a C++ compiler, such as g++"
        raise RecipeError(
            f"{key} = true: torch.compile does not work here, it needs {needs} ({cause(error.__cause__ or error)}): "
            f"install it, or set {key} = false."
        ) from error


def require_traceable(model: nn.Module, images: Tensor, key: str) -> None:
    """Trace a network as torch.compile will. Raises RecipeError, naming the recipe key, if it is not one graph."""
    with torch.no_grad():
        compiled(model, images.device, key=key, backend="eager")(images)


@torch.no_grad()
def require_equal_gradients(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, key: str) -> None:
    """Compare the gradients of a compiled step in float32 with those computed without torch.compile, by parameter.

    torch.compile (2.15) gives wrong gradients, without an error, where a forward pass reads a buffer and overwrites it
    later. Gradients far smaller than the others are rounding errors, as of biases before a batch norm.

    Raises:
        RecipeError: They differ by more than rounding.
    """
    norms = torch.stack([one.float().norm() for one in expected.values()])
    errors = torch.stack([(gradients[name].float() - one.float()).norm() for name, one in expected.items()])
    relative = errors / norms.clamp_min(NEGLIGIBLE * norms.norm())
    if relative.max() > MAX_ERROR:
        worst = list(expected)[int(relative.argmax())]
        raise RecipeError(
            f"{key} = true: the compiled gradient of {worst} differs by {float(relative.max()):.2g} of its norm from "
            "that without torch.compile, as where a forward pass reads a buffer and overwrites it: set it to false."
        )


def _with_own_code(function: Callable[..., T]) -> Callable[..., T]:
    """Return the function with a code object of its own: what is compiled is kept, and limited in number, by code."""

    def call(*arguments: Any) -> T:
        return function(*arguments)

    code = call.__code__.replace()
    return FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)
