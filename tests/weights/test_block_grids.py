"""Rounding to block types: near the best that a search of everything finds, and no worse than gguf-py's own."""

from itertools import product

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from teal_fast.kernels.blocks import BLOCK_TYPES, dequantize_blocks
from teal_fast.weights.block_grids import BlockGrid

NAMES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
each_type = pytest.mark.parametrize("name", NAMES)
# Of normally distributed weights, the root mean square of errors as a share of theirs. llama.cpp's own rounding (commit
# of November 2026) has .0860, .0782, .0427, .0378, .00535, .0713, .0361 and .0177.
ERRORS = dict(zip(NAMES, (0.082, 0.0705, 0.0408, 0.0342, 0.0050, 0.0705, 0.0350, 0.0173), strict=True))


def draw(K=512, N=100, seed=0):
    return torch.randn(K, N, generator=torch.Generator().manual_seed(seed))


def rounded(name, weight, importance=None):
    grid = BlockGrid.fit(BLOCK_TYPES[name], weight, importance)
    return grid.dequantize(*grid.round(weight))


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@each_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_below_those_of_others(name, dtype):
    weight = draw(2048).to(dtype).float()
    assert off(rounded(name, weight.to(dtype)), weight) < ERRORS[name]
    if name[-1] != "K":
        theirs = gguf.quants.quantize(weight.t().numpy(), Type[name])
        assert ERRORS[name] < off(torch.from_numpy(gguf.quants.dequantize(theirs, Type[name]).copy()).t(), weight)


@each_type
def test_the_packed_weight_has_the_values_that_were_rounded_to(name):
    weight = draw()
    grid = BlockGrid.fit(BLOCK_TYPES[name], weight)
    (codes,) = grid.round(weight)
    values = grid.dequantize(codes)
    assert torch.equal(dequantize_blocks(grid.blocks(codes))[:, :100], values)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    assert torch.equal(grid.round(weight[order], order)[0], codes[order])
    assert torch.equal(grid.dequantize(codes[order], rows=order), values[order])


@each_type
def test_codes_are_the_nearest(name):
    weight = draw()
    grid = BlockGrid.fit(BLOCK_TYPES[name], weight)
    (codes,) = grid.round(weight)
    error = (grid.dequantize(codes) - weight).abs()
    top = 2 ** sum(BLOCK_TYPES[name].planes) - 1
    for by in (-1, 1):
        other = (codes.int() + by).clamp(0, top).to(torch.uint8)
        assert (error <= (grid.dequantize(other) - weight).abs() + 1e-6).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1"])
def test_scales_are_near_the_best_of_all(name):
    """Against a fine search of steps and, where there is one, of offsets."""
    kind, weight = BLOCK_TYPES[name], draw(32, 50, seed=3)
    top, found = 2 ** sum(kind.planes) - 1, (rounded(name, weight) - weight).square().sum(0)
    width = weight.amax(0) - weight.amin(0) if kind.minimum else 2 * weight.abs().amax(0)
    offsets = [weight.amin(0) + width * by for by in torch.linspace(-0.05, 0.1, 31)] if kind.minimum else [0]
    best = torch.full((50,), torch.inf)
    for factor, sign, offset in product(torch.linspace(0.7, 1.1, 161), (1,) if kind.minimum else (1, -1), offsets):
        step = sign * width * factor / top
        values = ((weight - offset) / step).round().clamp(-kind.zero, top - kind.zero) * step + offset
        best = torch.minimum(best, (values - weight).square().sum(0))
    assert found.sum() < (1.2 if name == "Q8_0" else 1.07) * best.sum() and (found < 2 * best).all()


@each_type
def test_values_of_the_type_come_back(name):
    """Of nested types nearly: other scales may be as good."""
    if name.endswith("K"):
        values, most = rounded(name, draw()), 0.01
    else:
        bytes = gguf.quants.quantize(draw().t().numpy(), Type[name])
        values, most = torch.from_numpy(gguf.quants.dequantize(bytes, Type[name]).copy()).t(), 1e-4
    assert off(rounded(name, values), values) < most


@each_type
def test_what_is_important_is_nearer(name):
    weight, importance = draw(), draw(512, 1, seed=2)[:, 0].mul(2).exp()
    importance[7] = 0

    def error(values):
        return (importance @ (values - weight).square()).sum()

    assert error(rounded(name, weight, importance)) < 0.95 * error(rounded(name, weight))
    torch.testing.assert_close(rounded(name, weight, torch.full((512,), 3.0)), rounded(name, weight), rtol=0, atol=0.2)
    assert rounded(name, weight, torch.zeros(512)).isfinite().all()


@each_type
@pytest.mark.parametrize("size", [1, 0.02, 1e3])
def test_zeros_and_constants(name, size):
    weight = draw() * size
    weight[:, 3], weight[256:288, 5], weight[:, 9] = 0, 0, size
    weight[32:64, 11] = -size
    found = rounded(name, weight)
    assert found.isfinite().all() and (found[:, 3] == 0).all()
    near = 2.0 ** -sum(BLOCK_TYPES[name].planes) * 2 * size
    torch.testing.assert_close(found[:, 9], weight[:, 9], rtol=0, atol=near)
    assert off(found, weight) < 1.3 * ERRORS[name]


def test_inputs_that_a_type_does_not_divide():
    with pytest.raises(ValueError, match="320 inputs are no multiple of 256, as Q4_K needs"):
        BlockGrid.fit(BLOCK_TYPES["Q4_K"], draw(320))
