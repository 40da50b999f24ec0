"""GPTQ against rounding to nearest, and the least-squares compensation of erroneous inputs."""

import pytest
import torch

from teal_fast.kernels.blocks import BLOCK_TYPES
from teal_fast.quantization.gptq import add_moments, compensate_inputs, factorize, gptq_round
from teal_fast.weights.block_grids import BlockGrid
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


def blocks(name):
    return lambda weight: BlockGrid.fit(BLOCK_TYPES[name], weight)


MANY = 10**9  # tokens: no more damping than is needed
INT4 = pytest.param(lambda weight: Int4Grid.fit(weight, GROUP), id="int4")
GRIDS = pytest.mark.parametrize(
    "fit", [pytest.param(Int8Grid.fit, id="int8"), INT4, pytest.param(blocks("Q5_0"), id="Q5_0")]
)
ANY_INPUTS = pytest.mark.parametrize("fit", [pytest.param(Int8Grid.fit, id="int8"), INT4])


def rounded(weight, grid, hessian, tokens=MANY):
    return gptq_round(weight, grid, factorize(hessian.clone(), tokens))


@pytest.mark.parametrize("K, panel", [(1, 64), (100, 64), (128, 64), (130, 1024)])
def test_moments_in_panels_and_their_factor(K, panel, monkeypatch):
    monkeypatch.setattr("teal_fast.quantization.gptq.PANEL", panel)
    x = torch.randn(300, K, generator=torch.Generator().manual_seed(8))
    hessian = torch.where(torch.ones(K, K).tril() == 1, 0.0, torch.nan)  # the upper triangle is not read
    add_moments(hessian, x[:100])
    add_moments(hessian, x[100:])
    order, lower = factorize(hessian, MANY)
    expected = x.t() @ x
    assert torch.equal(order, expected.diagonal().argsort())
    torch.testing.assert_close(lower @ lower.t(), expected[order][:, order], rtol=1e-4, atol=1e-2)
    assert (lower.triu(1) == 0).all()


def test_damping_is_of_each_channel_and_larger_the_fewer_the_tokens():
    hessian = moments()
    for tokens, share in ((96 * 10, 0.1), (96, 1.0), (32, 3.0)):
        order, lower = factorize(hessian.clone(), tokens)
        added = (lower @ lower.t() - hessian[order][:, order]).diagonal()
        torch.testing.assert_close(added, share * hessian.diagonal()[order], rtol=1e-3, atol=0)


@ANY_INPUTS
@pytest.mark.parametrize("K", [1, 128, 96, 300])  # rows are updated 128 at a time
def test_gptq_round_changes_outputs_less_than_rounding_to_nearest(fit, K):
    weight, hessian = draw(K), moments(max(K, 4))[:K, :K]
    grid = fit(weight)
    before = weight.clone(), hessian.clone()
    found = output_error(weight, hessian, grid, rounded(weight, grid, hessian))
    nearest = output_error(weight, hessian, grid, grid.round(weight))
    assert found < 0.7 * nearest or (K == 1 and found == nearest)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@GRIDS
def test_gptq_round_with_few_tokens_and_dead_channels(fit):
    weight, hessian = draw(), moments(tokens=5)
    hessian[:, 10], hessian[10] = 0, 0
    grid = fit(weight)
    codes = rounded(weight, grid, hessian)
    assert output_error(weight, hessian, grid, codes) < 0.5 * output_error(weight, hessian, grid, grid.round(weight))
    alone = grid.round(weight[10:11], torch.tensor([10]))
    assert all(torch.equal(a[10], b[0]) for a, b in zip(codes, alone, strict=True))
    nothing = rounded(weight, grid, torch.zeros_like(hessian))
    assert all(torch.equal(a, b) for a, b in zip(nothing, grid.round(weight), strict=True))


@ANY_INPUTS
def test_gptq_round_does_not_depend_on_the_order_of_channels(fit):
    weight, hessian = draw(), moments()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    grid = fit(weight)
    moved = rounded(weight[order], grid, hessian[order][:, order])
    assert all(torch.equal(a[order], b) for a, b in zip(rounded(weight, grid, hessian), moved, strict=True))


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_gptq_round_to_blocks(name):
    K = 512
    weight, hessian = draw(K), moments(K, tokens=2000)
    grid = BlockGrid.fit(BLOCK_TYPES[name], weight)
    nearest = output_error(weight, hessian, grid, grid.round(weight))
    codes = rounded(weight, grid, hessian)
    assert output_error(weight, hessian, grid, codes) < 0.7 * nearest
    assert torch.equal(rounded(grid.dequantize(*codes), grid, hessian)[0], codes[0])


def test_gptq_round_keeps_weights_that_lie_on_the_grid():
    generator = torch.Generator().manual_seed(4)
    int8 = Int8Grid(torch.rand(128, generator=generator) + 0.1)
    codes = torch.randint(-127, 128, (96, 128), generator=generator, dtype=torch.int8)
    assert torch.equal(rounded(int8.dequantize(codes), int8, moments())[0], codes)

    int4 = Int4Grid(2.0 ** torch.randint(-3, 4, (128,), generator=generator), GROUP)
    values = torch.randint(0, 16, (96, 128), generator=generator, dtype=torch.uint8)
    values[:, ::GROUP] = 0  # that is -8, without which a group's scale can't be told from its weights
    scales = (torch.rand(96, 2, generator=generator) + 0.1).bfloat16()
    found = rounded(int4.dequantize(values, scales), int4, moments())
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
    errors = [
        (x @ compensate_inputs(weight, factorize(hessian.clone(), tokens), residual) - y).norm()
        for tokens in (MANY, 400)
    ]
    assert errors[0] < 0.1 * errors[1] and errors[1] < 0.5 * (x @ weight - y).norm()


def test_compensation_moves_little_when_tokens_are_few():
    weight = draw()
    x, y, hessian, residual = draw_targets(weight, 5)
    hessian[:, 10], hessian[10], residual[10] = 0, 0, 0
    found = compensate_inputs(weight, factorize(hessian.clone(), 5), residual)
    assert torch.equal(found[10], weight[10])  # a channel that is never there
    assert (found - weight).norm() < 0.1 * weight.norm()
    assert (x @ found - y).norm() < 0.6 * (x @ weight - y).norm()


def test_without_residual_nothing_moves():
    weight = draw().bfloat16()
    found = compensate_inputs(weight, factorize(moments(), 400), torch.zeros(96, 256))
    assert torch.equal(found, weight.float())
    assert torch.equal(
        compensate_inputs(weight, factorize(torch.zeros(96, 96), 400), torch.zeros(96, 256)), weight.float()
    )
