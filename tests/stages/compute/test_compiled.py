"""What torch.compile makes equals eager within rounding, run by run in the same bytes, and its errors name the key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdpipe.stages.compute.compiled import compiled, require_compiler
from kdpipe.stages.errors import RecipeError

CPU = torch.device("cpu")


def steps_of(forward: object, model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits and gradients."""
    torch.manual_seed(1)
    logits = forward(images)  # type: ignore[operator]
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    return [logits, *gradients]


def test_compiled_equals_eager_within_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    images = torch.rand(8, 1, 8, 8)
    expected = steps_of(model, model, images)
    found = [steps_of(compiled(model, CPU, key="train.compile"), model, images) for _ in range(2)]
    for one, other, wanted in zip(*found, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)


def test_each_function_is_compiled_for_itself() -> None:
    """torch.compile would run the ninth function of the same code without compiling it, and says that in a log."""
    for number in range(torch._dynamo.config.recompile_limit + 2):
        torch._dynamo.utils.counters.clear()
        run = compiled(lambda given, number=number: given + number, CPU, key="k", backend="eager")
        assert run(torch.ones(1)).item() == 1 + number
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_each_shape_is_compiled_however_many_there_are() -> None:
    """torch.compile would refuse the ninth: halved batches and the last ones of shards can be more."""
    run = compiled(lambda given: given + 1, CPU, key="k", backend="eager")
    for size in range(1, torch._dynamo.config.recompile_limit + 3):
        torch._dynamo.utils.counters.clear()
        assert [run(torch.zeros(size)).sum().item() for _ in range(2)] == [size, size]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_cannot_be_compiled_is_refused_by_its_key() -> None:
    def waits(images: Tensor) -> Tensor:
        return images + 1 if images.sum() > 0 else images

    with pytest.raises(RecipeError, match=r"train\.compile = true: torch\.compile cannot compile this .*to false\."):
        compiled(waits, CPU, key="train.compile", backend="eager")(torch.ones(2))


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/such/g++"))
    with pytest.raises(RecipeError, match=r"cache\.compile = true: .*needs a C\+\+ compiler.*cache\.compile = false"):
        require_compiler(CPU, "cache.compile")
