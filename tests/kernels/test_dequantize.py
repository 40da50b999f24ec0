import pytest
import torch

import teal_fast.kernels.dequantize
from teal_fast.kernels.backend import INTERPRETED, triton
from teal_fast.kernels.dequantize import _widen_cpu, _widen_cuda, widen, widen_reference
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.kernels.compacted import DEVICE
from teal_fast.tests.kernels.quantized import quantized

# Whole numbers times bf16 are exact, so that Triton rounds once, as the reference does; its interpreter cuts bf16 off,
# by up to one last place. C++ takes the product of both scales first: two roundings of fp32.
TWO_ROUNDINGS, LAST_PLACE = 2**-23, 2**-7
# one block of columns and less, ragged both ways, groups of each size, more groups than a line of scales holds
SIZES = [(5, 64, 0), (100, 208, 0), (33, 16, 0), (7, 64, 64), (40, 1152, 64), (33, 384, 128), (65, 576, 192)]
everywhere = pytest.mark.parametrize("impl", ["triton", *RUNNABLE, "op"], indirect=True)


@pytest.fixture
def impl(request, monkeypatch):
    """An implementation by its name."""
    if request.param == "op":
        return torch.ops.teal.widen
    if request.param == "triton":
        return _widen_cuda if triton else pytest.skip("no Triton here")
    if DEVICE == "cuda":
        pytest.skip("runs on the CPU")
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.dequantize, "library", lambda: native)
    return _widen_cpu


@pytest.mark.parametrize("K, N, group", SIZES)
def test_reference(K, N, group):
    weight = quantized(K, N, group)
    found = widen_reference(*weight[:3], torch.float32)
    torch.testing.assert_close(found, weight.dense(), rtol=TWO_ROUNDINGS, atol=0)


@pytest.mark.parametrize("K, N, group", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@everywhere
def test_matches_reference(impl, dtype, K, N, group):
    rows, scale, *_ = quantized(K, N, group)
    found, expected = (function(rows, scale, group, dtype) for function in (impl, widen_reference))
    assert found.dtype == dtype and found.is_contiguous()
    rtol = TWO_ROUNDINGS if impl is not _widen_cuda and dtype == torch.float32 else 0
    rtol = LAST_PLACE if impl is _widen_cuda and INTERPRETED and dtype == torch.bfloat16 else rtol
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("group", [0, 128])
@everywhere
def test_nan_of_a_scale_stays_in_its_place(impl, group):
    rows, scale, *_ = quantized(35, 384, group)
    scale[100] = torch.nan
    expected = torch.zeros(35, 384, dtype=torch.bool, device=DEVICE)
    expected[:, 100] = True
    if group:
        rows[3, 384 // 2 + 2 : 384 // 2 + 4] = 255  # the second group's scale
        expected[3, 128:256] = True
    assert torch.equal(impl(rows, scale, group, torch.float32).isnan(), expected)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("instructions", RUNNABLE)
@pytest.mark.skipif(DEVICE == "cuda", reason="runs on the CPU")
def test_cpp_takes_any_number_of_threads(monkeypatch, instructions, group, set_threads):
    monkeypatch.setattr(teal_fast.kernels.dequantize, "library", lambda: compiled(instructions))
    rows, scale, *_ = quantized(7, 128, group)
    results = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        results.append(widen(rows, scale, group))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(group, dtype):
    rows, scale, *_ = quantized(35, 384, group)
    torch.library.opcheck(torch.ops.teal.widen, (rows, scale, group, dtype))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r, s: (r.float(), s, 0), "widen takes rows"),
        (lambda r, s: (r.short(), s, 0), "widen takes rows"),
        (lambda r, s: (r, s[:-1], 0), "widen takes rows"),
        (lambda r, s: (r, s.bfloat16(), 0), "widen takes rows"),
        (lambda r, s: (r[:, :40].contiguous(), s[:40], 0), "whole sixteens"),
        (lambda r, s: (r.view(torch.uint8), s, 64), "widen takes rows"),
        (lambda r, s: (r.view(torch.uint8), s, 0), "groups of 0"),
        (lambda r, s: (r.t().contiguous().t(), s, 0), "contiguous"),
        (lambda r, s: (r, s.repeat_interleave(2)[::2], 0), "contiguous"),
    ],
)
def test_rejects_bad_input(change, said):
    rows, scale, *_ = quantized(35, 128, 0)
    with pytest.raises(ValueError, match=said):
        widen(*change(rows, scale))
