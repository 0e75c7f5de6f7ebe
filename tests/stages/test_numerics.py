"""L2-normalized rows, and rows of zeros."""

import pytest
import torch
from support.loss_inputs import drawn

from kdpipe.stages.numerics import normalize_rows


def test_rows_have_norm_one_and_keep_their_direction():
    rows = drawn(3, 5, 4, seed=1)
    units = normalize_rows(rows)
    assert units.norm(dim=-1) == pytest.approx(torch.ones(3, 5).double())
    assert torch.allclose(units * rows.norm(dim=-1, keepdim=True), rows)


def test_zero_row_stays_zero_with_zero_gradient():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    units = normalize_rows(rows)
    (units * torch.tensor([1.0, 2.0])).sum().backward()
    assert units.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
    assert rows.grad[0].tolist() == [0.0, 0.0]
    assert rows.grad[1].abs().sum() > 0
