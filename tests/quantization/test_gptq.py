"""GPTQ against rounding to nearest, and the least-squares compensation of erroneous inputs."""

import pytest
import torch

from teal_fast.quantization.gptq import compensate_inputs, gptq_round
from teal_fast.weights.grids import Int4Grid, Int8Grid

GROUP = 64


def draw(K=96, N=256, seed=0):
    """Heavy-tailed weights whose outputs and input channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(K, N, generator=generator)
    sizes = torch.randn(K, 1, generator=generator).exp() * torch.randn(N, generator=generator).exp()
    return normal * normal.abs() * sizes * 0.02


def moments(K=96, tokens=400, seed=1):
    """Second moments [K, K] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, K // 4, generator=generator) @ torch.randn(K // 4, K, generator=generator)
    x = mixed + torch.randn(tokens, K, generator=generator)
    return x.t() @ x


def output_error(weight, hessian, grid, codes):
    error = grid.dequantize(*codes) - weight
    return (error * (hessian @ error)).sum().item()  # tr(E^T H E)


GRIDS = pytest.mark.parametrize("fit", [Int8Grid.fit, lambda weight: Int4Grid.fit(weight, GROUP)], ids=["int8", "int4"])


@GRIDS
@pytest.mark.parametrize("K", [1, 64, 96, 130])  # rows are updated 64 at a time
def test_gptq_round_changes_outputs_less_than_rounding_to_nearest(fit, K):
    weight, hessian = draw(K), moments(max(K, 4))[:K, :K]
    grid = fit(weight)
    before = weight.clone(), hessian.clone()
    found = output_error(weight, hessian, grid, gptq_round(weight, grid, hessian))
    nearest = output_error(weight, hessian, grid, grid.round(weight))
    assert found < 0.7 * nearest or (K == 1 and found == nearest)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@GRIDS
def test_gptq_round_with_few_tokens_and_dead_channels(fit):
    weight, hessian = draw(), moments(tokens=5)
    hessian[:, 10], hessian[10] = 0, 0
    grid = fit(weight)
    codes = gptq_round(weight, grid, hessian)
    assert output_error(weight, hessian, grid, codes) < 0.5 * output_error(weight, hessian, grid, grid.round(weight))
    assert all(torch.equal(a[10], b[0]) for a, b in zip(codes, grid.round(weight[10:11]), strict=True))
    nothing = gptq_round(weight, grid, torch.zeros_like(hessian))
    assert all(torch.equal(a, b) for a, b in zip(nothing, grid.round(weight), strict=True))


@GRIDS
def test_gptq_round_does_not_depend_on_the_order_of_channels(fit):
    weight, hessian = draw(), moments()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    grid = fit(weight)
    moved = gptq_round(weight[order], grid, hessian[order][:, order])
    assert all(torch.equal(a[order], b) for a, b in zip(gptq_round(weight, grid, hessian), moved, strict=True))


def test_gptq_round_keeps_weights_that_lie_on_the_grid():
    generator = torch.Generator().manual_seed(4)
    int8 = Int8Grid(torch.rand(128, generator=generator) + 0.1)
    codes = torch.randint(-127, 128, (96, 128), generator=generator, dtype=torch.int8)
    assert torch.equal(gptq_round(int8.dequantize(codes), int8, moments())[0], codes)

    int4 = Int4Grid(2.0 ** torch.randint(-3, 4, (128,), generator=generator), GROUP)
    values = torch.randint(0, 16, (96, 128), generator=generator, dtype=torch.uint8)
    values[:, ::GROUP] = 0  # that is -8, without which a group's scale can't be told from its weights
    scales = (torch.rand(96, 2, generator=generator) + 0.1).bfloat16()
    found = gptq_round(int4.dequantize(values, scales), int4, moments())
    assert torch.equal(found[0], values) and torch.equal(found[1], scales)


def draw_targets(weight, tokens, K=96):
    """Inputs x, target outputs y near x weight, the Hessian x.T x and the residual x.T (y - x weight)."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(tokens, K, generator=generator) @ torch.randn(K, K, generator=generator)
    moved = weight * (1 + 0.1 * torch.randn(weight.shape, generator=generator))
    y = x @ moved
    return x, y, x.t() @ x, x.t() @ (y - x @ weight)


def test_compensated_weights_give_the_target_outputs():
    weight = draw()
    x, y, hessian, residual = draw_targets(weight, 400)
    before = hessian.clone()
    found = compensate_inputs(weight, hessian, residual)
    assert (x @ found - y).norm() < 0.1 * (x @ weight - y).norm()
    assert torch.equal(hessian, before)


def test_compensation_moves_little_when_tokens_are_few():
    weight = draw()
    x, y, hessian, residual = draw_targets(weight, 5)
    hessian[:, 10], hessian[10], residual[10] = 0, 0, 0
    found = compensate_inputs(weight, hessian, residual)
    assert torch.equal(found[10], weight[10])  # a channel that is never there
    assert (found - weight).norm() < 0.1 * weight.norm()
    assert (x @ found - y).norm() < 0.6 * (x @ weight - y).norm()


def test_without_residual_nothing_moves():
    weight = draw().bfloat16()
    found = compensate_inputs(weight, moments(), torch.zeros(96, 256))
    assert torch.equal(found, weight.float())
    assert torch.equal(compensate_inputs(weight, torch.zeros(96, 96), torch.zeros(96, 256)), weight.float())
