"""Quantization grids: codes are the nearest, scales have less error than absmax scales, zeros stay zero."""

import pytest
import torch

from teal_fast.weights.grids import Int4Grid, Int8Grid

EXACT = 1 + 1e-5  # fp32: a quotient and a product may be off by a last bit each
GROUP = 64


def draw(K=96, N=256, seed=0):
    """Heavy-tailed weights whose outputs and input channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(K, N, generator=generator)
    sizes = torch.randn(K, 1, generator=generator).exp() * torch.randn(N, generator=generator).exp()
    return normal * normal.abs() * sizes * 0.02


GRIDS = pytest.mark.parametrize("fit", [Int8Grid.fit, lambda weight: Int4Grid.fit(weight, GROUP)], ids=["int8", "int4"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_the_nearest_of_its_numbers(dtype):
    weight = draw().to(dtype)
    grid = Int8Grid.fit(weight)
    (codes,) = grid.round(weight.float())
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.min() >= -127
    steps = weight.float() / grid.scale
    inside = steps.abs() <= 127
    error = (grid.dequantize(codes) - weight.float()).abs() / grid.scale
    assert error[inside].max() <= 0.5 * EXACT and inside.float().mean() > 0.95
    assert torch.equal(codes[~inside], (127 * steps[~inside].sign()).to(torch.int8))


def test_int4_is_the_nearest_of_its_numbers():
    weight = draw()
    grid = Int4Grid.fit(weight, GROUP)
    values, scales = grid.round(weight)
    assert (values.dtype, values.shape) == (torch.uint8, weight.shape) and values.max() == 15 and values.min() == 0
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (96, 256 // GROUP))
    assert (scales > 0).any() and (scales < 0).any()  # the longer side gets the eighth step
    step = scales.float().repeat_interleave(GROUP, dim=1) * grid.scale
    steps = weight / step
    inside = (steps >= -8) & (steps <= 7)
    error = (grid.dequantize(values, scales) - weight) / step
    assert error[inside].abs().max() <= 0.5 * EXACT and inside.float().mean() > 0.95
    assert torch.equal(values[~inside], torch.where(steps[~inside] < 0, 0, 15).to(torch.uint8))


@pytest.mark.parametrize("K, N", [(1, 64), (96, 256), (2000, 1100)])  # the last in more than one part
def test_int8_scales_have_no_more_error_than_absmax_scales(K, N):
    weight = draw(K, N)
    plain = Int8Grid(weight.abs().amax(0) / 127)
    found = (Int8Grid.fit(weight).nearest(weight) - weight).square().sum(0)
    absmax = (plain.nearest(weight) - weight).square().sum(0)
    assert (found <= absmax * EXACT).all()


def test_int8_scales_clip_a_few_of_many_weights():
    weight = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(5))
    grids = Int8Grid.fit(weight), Int8Grid(weight.abs().amax(0) / 127)
    found, absmax = ((grid.nearest(weight) - weight).square().sum() for grid in grids)
    assert found < 0.95 * absmax


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


def test_int8_nearest_is_round_and_dequantize():
    weight = draw()
    grid = Int8Grid.fit(weight)
    assert torch.equal(grid.nearest(weight), grid.dequantize(*grid.round(weight)))


@pytest.mark.parametrize("steps", [7, 8])
def test_int4_scales_have_less_error_than_absmax_scales(steps):
    weight = draw()
    grid = Int4Grid.fit(weight, GROUP)
    groups = (weight / grid.scale).view(96, -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / steps).bfloat16().float()
    absmax = (groups / scale).round().clamp(-8, 7) * scale * grid.scale.view(-1, GROUP)
    errors = [
        (restored.view(groups.shape) - weight.view(groups.shape)).square().sum(-1)
        for restored in (grid.dequantize(*grid.round(weight)), absmax)
    ]
    assert errors[0].sum() < 0.9 * errors[1].sum()
    assert steps == 7 or (errors[0] <= errors[1] * EXACT).all()  # 8 is among the scales that are tried


def test_int4_outputs_of_any_size_share_a_group():
    weight = draw()
    grids = Int4Grid.fit(weight, GROUP), Int4Grid(torch.ones(256), GROUP)
    fitted, plain = ((grid.dequantize(*grid.round(weight)) - weight).square().sum(0) for grid in grids)
    size = weight.square().sum(0)
    assert (fitted / size).mean() < 0.2 * (plain / size).mean()


def test_int4_rounds_the_same_in_parts():
    weight = draw(K=2**20 // 256 + 5)  # more than one chunk of the search
    grid = Int4Grid.fit(weight, GROUP)
    for whole, rows in zip(grid.round(weight), grid.round(weight[-7:]), strict=True):
        assert torch.equal(whole[-7:], rows)


@GRIDS
@pytest.mark.parametrize("zeros", ["row", "column", "all"])
def test_zeros_stay_zero(fit, zeros):
    weight = draw()
    weight[{"row": (7,), "column": (slice(None), 5), "all": ()}[zeros]] = 0
    grid = fit(weight)
    restored = grid.dequantize(*grid.round(weight))
    assert restored.isfinite().all() and (restored[weight == 0] == 0).all()
    if zeros != "all":
        assert (restored - weight).norm() < 0.2 * weight.norm()
