"""Products with blocks: the dequantized weight's up to the rounding of x; exactly those of the same whole numbers."""

import functools

import pytest
import torch
from torch import Tensor

import teal_fast.kernels.block_gemv
from teal_fast.files.gguf_blocks import PARSERS, to_blocks
from teal_fast.kernels.block_gemv import _block_gemv, block_gemv, block_gemv_reference
from teal_fast.kernels.block_operand import tensors_of
from teal_fast.kernels.block_planes import BLOCK
from teal_fast.kernels.blocks import SUPER, Blocks, codes_of, dequantize_blocks
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.gguf_models import random_tensor

SPLITS = 4
K = 3 * SUPER  # 24 blocks: splits end amid a SUPER
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=RUNNABLE)
def cpp(request, monkeypatch):
    """The kernels of an instruction set."""
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.block_gemv, "library", lambda: native)
    return request.param


widest = pytest.mark.parametrize("cpp", RUNNABLE[-1:], indirect=True)


@functools.cache
def made(name: str, N: int, K: int = K) -> tuple[Blocks, int]:
    return to_blocks(torch.from_numpy(random_tensor(name, N, K, N)), name, K), N


@functools.cache
def inputs(K: int = K, sparsity: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and a threshold for each channel; the block of the third 32 inputs keeps nothing, but for sparsity 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(K, generator=generator)
    threshold = torch.full((K,), x.abs().quantile(sparsity).item() if sparsity else -1.0)
    if sparsity:
        threshold[2 * BLOCK : 3 * BLOCK] = 10
        threshold[5 * BLOCK + 3] = x[5 * BLOCK + 3].abs()  # on the threshold: skipped
    return x, threshold


def rounded(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [K / BLOCK, BLOCK] and the scale of each block, as csrc/block_gemv.h says."""
    kept = x.masked_fill(x.abs() <= threshold, 0).view(-1, BLOCK)
    most = kept.abs().amax(1, keepdim=True)
    return (kept * (127 / most).nan_to_num(0, 0, 0)).round(), most / 127


def whole_numbers(x: Tensor, threshold: Tensor, blocks: Blocks, N: int) -> Tensor:
    """The same sums, scaled and added in the same order, in plain PyTorch."""
    kind, (factor, scale) = blocks.kind, rounded(x, threshold)
    values = torch.tensor(kind.table)[codes_of(blocks).int()] if kind.table else codes_of(blocks).int() - kind.zero
    products = (values * factor.flatten()[:, None].int()).view(-1, kind.scale_block, blocks.N)
    sums = products.sum(1).float()  # [K / scale_block, N]
    apart = SUPER // BLOCK
    count, y = len(scale), []
    for split in range(SPLITS):
        found = torch.zeros(blocks.N)
        first, last = count * split // SPLITS, count * (split + 1) // SPLITS
        while first < last:
            end = min(last, (first // apart + 1) * apart)
            inner, offset = torch.zeros(blocks.N), torch.zeros(blocks.N)
            for b in range(first, end):
                for s in range(b * BLOCK // kind.scale_block, (b + 1) * BLOCK // kind.scale_block):
                    inner += sums[s] * (blocks.scale[s].float() * scale[b])
                if blocks.minimum is not None:
                    to = offset if kind.nested else inner
                    to += blocks.minimum[b].float() * (scale[b] * factor[b].sum())
            if kind.nested:
                inner = inner * blocks.super_scale[first // apart].float()
                if blocks.minimum is not None:
                    inner -= offset * blocks.super_minimum[first // apart].float()
            found, first = found + inner, end
        y.append(found)
    return (y[0] + y[1] + y[2] + y[3])[:N]


@pytest.mark.parametrize("N", [64, 192, 320, 100, 1300])
@pytest.mark.parametrize("name", PARSERS)
def test_bits_of_the_same_whole_numbers(cpp, name, N):
    part = made(name, N)
    for sparsity in (0, 0.5, 0.9):
        x, threshold = inputs(K, sparsity)
        assert torch.equal(block_gemv(x, [part], threshold), whole_numbers(x, threshold, *part))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PARSERS)
def test_near_the_dequantized_weight(cpp, name, dtype):
    """Each x is off by at most half of what its block's largest is divided into."""
    part = made(name, 320)
    x, threshold = inputs()
    x, bias = x.to(dtype), torch.linspace(-2, 2, 320).to(dtype)
    weight = dequantize_blocks(part[0])[:, :320].double()
    kept = x.double().masked_fill(x.float().abs() <= threshold, 0)
    off = (kept != 0) * kept.view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK) / 254
    exact = kept @ weight + bias.double()
    limit = off @ weight.abs() + exact.abs() * torch.finfo(dtype).eps + 1e-3
    found = block_gemv(x, [part], threshold, bias)
    assert found.dtype == dtype and ((found - exact).abs() <= limit).all()
    assert ((found - exact).norm() < 0.02 * exact.norm()).all()
    assert ((block_gemv_reference(x, [part], threshold, bias) - exact).abs() <= limit).all()


PARTS = [("Q4_K", 100), ("Q6_K", 64), ("Q5_0", 30), ("Q8_0", 192)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_stand_beside_each_other_with_the_same_bits_on_any_number_of_threads(cpp, dtype, set_threads):
    parts, (x, threshold) = [made(*part) for part in PARTS], inputs()
    x = x.to(dtype)
    expected = torch.cat([whole_numbers(x.float(), threshold, *part) for part in parts]).to(dtype)
    for threads in (1, 2, 3, 4, 8):
        set_threads(threads)
        assert torch.equal(block_gemv(x, parts, threshold), expected)


@pytest.mark.parametrize("name", PARSERS)
def test_nothing_kept(cpp, name):
    part, (x, threshold) = made(name, 192), inputs()
    bias = torch.linspace(-2, 2, 192)
    block_gemv(torch.full_like(x, torch.nan), [part], threshold)  # leaves NaN in the kernel's own memory
    assert block_gemv(x, [part], torch.full_like(threshold, 100)).tolist() == [0] * 192
    assert torch.equal(block_gemv(x, [part], torch.full_like(threshold, 100), bias), bias)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "Q4_1"])
def test_nan_and_infinity_reach_y(cpp, name, value):
    part, (x, threshold) = made(name, 192), inputs()
    for k in (0, 31, 700):
        x = x.clone()
        x[k] = value
        assert block_gemv(x, [part], threshold).isnan().all()
    dropped = torch.full_like(threshold, torch.inf)
    found = block_gemv(x, [part], dropped)
    assert found.isnan().all() if value != value else not found.any()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
@widest
def test_sizes_at_the_ends_of_fp32(cpp, size):
    part, (x, threshold) = made("Q4_K", 192), inputs()
    x, exact = x * size, (x * size).double() @ dequantize_blocks(made("Q4_K", 192)[0]).double()
    found = block_gemv(x, [part], torch.full_like(threshold, -1))
    assert found.isfinite().all() and (found - exact).norm() <= 0.02 * exact.norm() + 1e-30


@pytest.mark.parametrize("name", PARSERS)
def test_rows_of_dropped_channels_are_not_read(cpp, name):
    """… by what the result would be: other codes there, and other scales in a block without a kept channel."""
    blocks, N = made(name, 192)
    x, threshold = inputs()
    expected = block_gemv(x, [(blocks, N)], threshold)
    scale = blocks.scale.clone()
    per = BLOCK // blocks.kind.scale_block
    scale[2 * per : 3 * per] = 100
    planes = tuple(plane.clone() for plane in blocks.planes)
    for plane in planes:
        plane[2] = 255
    assert torch.equal(block_gemv(x, [(blocks._replace(planes=planes, scale=scale), N)], threshold), expected)


def test_opcheck():
    blocks, N = made("Q4_K", 192)
    arguments = (*inputs(), tensors_of(blocks), [5], [N], None)
    torch.library.opcheck(_block_gemv, arguments)


def test_bad_input_is_refused():
    part, (x, threshold) = made("Q4_K", 192), inputs()
    for given in (
        (x[:-1], [part], threshold),
        (x, [part], threshold.double()),
        (x.int(), [part], threshold),
        (x, [(part[0], 100)], threshold),
        (x, [part], threshold, torch.zeros(191)),
        (x, [part], threshold, torch.zeros(192).half()),
        (x, [part, made("Q4_K", 64, SUPER)], threshold),
    ):
        with pytest.raises(ValueError, match=r"block_gemv takes contiguous x \[K\].*, got \["):
            block_gemv(*given)
