"""Grids of sums: the same bits in any order, and measured the same each time."""

import pytest
import torch

from teal_fast.benchmarks.shapes import random_model
from teal_fast.engine.grids import grid_constant, measure_grids
from teal_fast.tests.models import TINY


@pytest.mark.parametrize("addends", [7, 16, 112, 128])
def test_sums_on_a_grid_have_the_same_bits_in_any_order(addends):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(addends, 500, generator=generator) * torch.logspace(-3, 3, 500)
    constant = grid_constant(parts.abs().amax(0), addends)
    rounded = (parts + constant) - constant
    orders = [rounded[torch.randperm(addends, generator=generator)] for _ in range(20)]
    sums = [sum(order.unbind(0), torch.zeros(500)) for order in orders]
    assert all(torch.equal(found, sums[0]) for found in sums)
    plain = [sum(parts[torch.randperm(addends, generator=generator)].unbind(0), torch.zeros(500)) for _ in range(20)]
    assert any(not torch.equal(found, plain[0]) for found in plain)  # without grids the order shows
    held = parts.abs().amax(0)
    error = (sums[0].double() - parts.double().sum(0)).abs() / held.clamp(min=held.median().item())
    assert error.max() < addends * 2.0**-17  # a column that held little is taken as held as much as others


def test_grids_of_a_model():
    model = random_model(TINY | {"model_type": "qwen2"}, "cpu", torch.float32, std=0.1)
    grids, again = measure_grids(model, (7, 16, 120)), measure_grids(model, (7, 16, 120))
    assert len(grids) == len(model.layers)
    for one, other in zip(grids, again, strict=True):
        assert all(map(torch.equal, one, other))
        assert [len(constant) for constant in one] == [256, 128, 128]
        for constant in one:  # powers of two, times 1.5
            mantissa, _ = torch.frexp(constant / 1.5)
            assert (mantissa == 0.5).all()
