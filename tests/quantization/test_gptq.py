"""Grids of whole numbers: how near they come to weights; rounding that makes up for its errors."""

import pytest
import torch

from teal_fast.quantization.gptq import feed_back, make_up
from teal_fast.weights.grids import Int4Grid, Int8Grid

EXACT = 1 + 1e-5  # fp32: a quotient and a product may be off by a last bit each
GROUP = 64


def draw(K=96, N=256, seed=0):
    """Heavy-tailed weights whose outputs and input channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(K, N, generator=generator)
    sizes = torch.randn(K, 1, generator=generator).exp() * torch.randn(N, generator=generator).exp()
    return normal * normal.abs() * sizes * 0.02


def moments(K=96, tokens=400, seed=1):
    """Second moments [K, K] of inputs that go along with one another."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, K // 4, generator=generator) @ torch.randn(K // 4, K, generator=generator)
    x = mixed + torch.randn(tokens, K, generator=generator)
    return x.t() @ x


def output_error(weight, hessian, grid, codes):
    error = grid.restore(*codes) - weight
    return (error * (hessian @ error)).sum().item()  # tr(E^T H E)


GRIDS = pytest.mark.parametrize("fit", [Int8Grid.fit, lambda weight: Int4Grid.fit(weight, GROUP)], ids=["int8", "int4"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_the_nearest_of_its_numbers(dtype):
    weight = draw().to(dtype)
    grid = Int8Grid.fit(weight)
    (codes,) = grid.round(weight.float())
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.min() >= -127
    steps = weight.float() / grid.scale
    inside = steps.abs() <= 127
    error = (grid.restore(codes) - weight.float()).abs() / grid.scale
    assert error[inside].max() <= 0.5 * EXACT and inside.float().mean() > 0.95
    assert torch.equal(codes[~inside], (127 * steps[~inside].sign()).to(torch.int8))


def test_int4_is_the_nearest_of_its_numbers():
    weight = draw()
    grid = Int4Grid.fit(weight, GROUP)
    values, scales = grid.round(weight)
    assert (values.dtype, values.shape) == (torch.uint8, weight.shape) and values.max() == 15 and values.min() == 0
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (96, 256 // GROUP))
    assert (scales > 0).any() and (scales < 0).any()  # the side that has 8 numbers is the longer one
    step = scales.float().repeat_interleave(GROUP, dim=1) * grid.scale
    steps = weight / step
    inside = (steps >= -8) & (steps <= 7)
    error = (grid.restore(values, scales) - weight) / step
    assert error[inside].abs().max() <= 0.5 * EXACT and inside.float().mean() > 0.95
    assert torch.equal(values[~inside], torch.where(steps[~inside] < 0, 0, 15).to(torch.uint8))


@pytest.mark.parametrize("K, N", [(1, 64), (96, 256), (2000, 1100)])  # the last in more than one part
def test_int8_scales_have_less_error_than_those_that_reach_the_largest(K, N):
    weight = draw(K, N)
    plain = Int8Grid(weight.abs().amax(0) / 127)
    found = (Int8Grid.fit(weight).nearest(weight) - weight).square().sum(0)
    largest = (plain.nearest(weight) - weight).square().sum(0)
    assert (found <= largest * EXACT).all()


def test_int8_scales_leave_out_a_few_of_many_weights():
    weight = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(5))
    grids = Int8Grid.fit(weight), Int8Grid(weight.abs().amax(0) / 127)
    found, largest = ((grid.nearest(weight) - weight).square().sum() for grid in grids)
    assert found < 0.95 * largest


def test_int8_importance():
    weight, importance = draw(), torch.randn(96, generator=torch.Generator().manual_seed(2)).mul(2).exp()
    errors = [
        importance @ (grid.nearest(weight) - weight).square()
        for grid in (
            Int8Grid.fit(weight, importance),
            Int8Grid.fit(weight),
            Int8Grid(weight.abs().amax(0) / 127),
        )
    ]
    for other in errors[1:]:
        assert (errors[0] <= other * EXACT).all() and errors[0].sum() < 0.99 * other.sum()


def test_int8_nearest_is_round_and_restore():
    weight = draw()
    grid = Int8Grid.fit(weight)
    assert torch.equal(grid.nearest(weight), grid.restore(*grid.round(weight)))


@pytest.mark.parametrize("reach", [7, 8])
def test_int4_scales_have_less_error_than_those_that_reach_the_largest(reach):
    weight = draw()
    grid = Int4Grid.fit(weight, GROUP)
    groups = (weight / grid.scale).view(96, -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / reach).bfloat16().float()
    largest = (groups / scale).round().clamp(-8, 7) * scale * grid.scale.view(-1, GROUP)
    errors = [
        (restored.view(groups.shape) - weight.view(groups.shape)).square().sum(-1)
        for restored in (grid.restore(*grid.round(weight)), largest)
    ]
    assert errors[0].sum() < 0.9 * errors[1].sum()
    assert reach == 7 or (errors[0] <= errors[1] * EXACT).all()  # 8 is one of those that are tried


def test_int4_outputs_of_any_size_share_a_group():
    weight = draw()
    grids = Int4Grid.fit(weight, GROUP), Int4Grid(torch.ones(256), GROUP)
    fitted, plain = ((grid.restore(*grid.round(weight)) - weight).square().sum(0) for grid in grids)
    size = weight.square().sum(0)
    assert (fitted / size).mean() < 0.2 * (plain / size).mean()


def test_int4_rounds_the_same_in_parts():
    weight = draw(K=2**20 // 256 + 5)  # more than what is searched at a time
    grid = Int4Grid.fit(weight, GROUP)
    for whole, rows in zip(grid.round(weight), grid.round(weight[-7:]), strict=True):
        assert torch.equal(whole[-7:], rows)


@GRIDS
@pytest.mark.parametrize("zeros", ["row", "column", "all"])
def test_zeros_stay_zero(fit, zeros):
    weight = draw()
    weight[{"row": (7,), "column": (slice(None), 5), "all": ()}[zeros]] = 0
    grid = fit(weight)
    restored = grid.restore(*grid.round(weight))
    assert restored.isfinite().all() and (restored[weight == 0] == 0).all()
    if zeros != "all":
        assert (restored - weight).norm() < 0.2 * weight.norm()


@GRIDS
@pytest.mark.parametrize("K", [1, 64, 96, 130])  # rows are updated 64 at a time
def test_feed_back_changes_outputs_less_than_rounding_to_nearest(fit, K):
    weight, hessian = draw(K), moments(max(K, 4))[:K, :K]
    grid = fit(weight)
    before = weight.clone(), hessian.clone()
    found = output_error(weight, hessian, grid, feed_back(weight, grid, hessian))
    nearest = output_error(weight, hessian, grid, grid.round(weight))
    assert found < 0.7 * nearest or (K == 1 and found == nearest)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@GRIDS
def test_feed_back_when_few_tokens_or_dead_channels_tell_little(fit):
    weight, hessian = draw(), moments(tokens=5)
    hessian[:, 10], hessian[10] = 0, 0
    grid = fit(weight)
    codes = feed_back(weight, grid, hessian)
    assert output_error(weight, hessian, grid, codes) < 0.5 * output_error(weight, hessian, grid, grid.round(weight))
    assert all(torch.equal(a[10], b[0]) for a, b in zip(codes, grid.round(weight[10:11]), strict=True))
    nothing = feed_back(weight, grid, torch.zeros_like(hessian))
    assert all(torch.equal(a, b) for a, b in zip(nothing, grid.round(weight), strict=True))


@GRIDS
def test_feed_back_does_not_depend_on_the_order_of_channels(fit):
    weight, hessian = draw(), moments()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    grid = fit(weight)
    moved = feed_back(weight[order], grid, hessian[order][:, order])
    assert all(torch.equal(a[order], b) for a, b in zip(feed_back(weight, grid, hessian), moved, strict=True))


def test_feed_back_leaves_weights_on_the_grid_alone():
    generator = torch.Generator().manual_seed(4)
    int8 = Int8Grid(torch.rand(128, generator=generator) + 0.1)
    codes = torch.randint(-127, 128, (96, 128), generator=generator, dtype=torch.int8)
    assert torch.equal(feed_back(int8.restore(codes), int8, moments())[0], codes)

    int4 = Int4Grid(2.0 ** torch.randint(-3, 4, (128,), generator=generator), GROUP)
    values = torch.randint(0, 16, (96, 128), generator=generator, dtype=torch.uint8)
    values[:, ::GROUP] = 0  # that is -8, without which a group's scale can't be told from its weights
    scales = (torch.rand(96, 2, generator=generator) + 0.1).bfloat16()
    found = feed_back(int4.restore(values, scales), int4, moments())
    assert torch.equal(found[0], values) and torch.equal(found[1], scales)


def outputs_wanted(weight, tokens, K=96):
    """Inputs, outputs that are near weight's for them, second moments, and what the outputs lack by input channel."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(tokens, K, generator=generator) @ torch.randn(K, K, generator=generator)
    moved = weight * (1 + 0.1 * torch.randn(weight.shape, generator=generator))
    y = x @ moved
    return x, y, x.t() @ x, x.t() @ (y - x @ weight)


def test_make_up_gives_what_outputs_lack():
    weight = draw()
    x, y, hessian, missing = outputs_wanted(weight, 400)
    before = hessian.clone()
    found = make_up(weight, hessian, missing)
    assert (x @ found - y).norm() < 0.1 * (x @ weight - y).norm()
    assert torch.equal(hessian, before)


def test_make_up_is_careful_where_tokens_tell_little():
    weight = draw()
    x, y, hessian, missing = outputs_wanted(weight, 5)
    hessian[:, 10], hessian[10], missing[10] = 0, 0, 0
    found = make_up(weight, hessian, missing)
    assert torch.equal(found[10], weight[10])  # a channel that is never there
    assert (found - weight).norm() < 0.1 * weight.norm()
    assert (x @ found - y).norm() < 0.6 * (x @ weight - y).norm()


def test_make_up_leaves_weights_alone_that_lack_nothing():
    weight = draw().bfloat16()
    found = make_up(weight, moments(), torch.zeros(96, 256))
    assert torch.equal(found, weight.float())
    assert torch.equal(make_up(weight, torch.zeros(96, 96), torch.zeros(96, 256)), weight.float())
