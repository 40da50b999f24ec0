import pytest
import torch

import teal_fast.kernels.dequantize
from teal_fast.kernels.backend import INTERPRETED, triton
from teal_fast.kernels.dequantize import _dequantize_cpu, _dequantize_cuda, dequantize, dequantize_reference
from teal_fast.kernels.packed import PackedWeight
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.kernels.compacted import DEVICE, pairwise
from teal_fast.tests.kernels.quantized import quantized

# Whole numbers times bf16 are exact, so that Triton rounds once, as the reference does; its interpreter cuts bf16 off,
# by up to one last place. C++ takes the product of both scales first: two roundings of fp32.
TWO_ROUNDINGS, LAST_PLACE = 2**-23, 2**-7
# one block of columns and less, ragged both ways, groups of each size, more groups than a line of scales holds
SIZES = [(5, 64, 0), (100, 208, 0), (33, 16, 0), (7, 64, 64), (40, 1152, 64), (33, 384, 128), (65, 576, 192)]
IMPLEMENTATIONS = ["triton", *RUNNABLE]
everywhere = pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)


@pytest.fixture
def impl(request, monkeypatch):
    """An implementation by its name."""
    if request.param == "triton":
        return _dequantize_cuda if triton else pytest.skip("no Triton here")
    if DEVICE == "cuda":
        pytest.skip("runs on the CPU")
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.dequantize, "library", lambda: native)
    return lambda weight, begin, end, dtype: _dequantize_cpu(*weight, begin, end, dtype)


@pytest.mark.parametrize("K, N, group", [(100, 208, 0), (40, 1152, 64), (65, 576, 192)])
def test_reference(K, N, group):
    weight = quantized(K, N, group)
    torch.testing.assert_close(
        dequantize_reference(weight.weight, 0, N, torch.float32), weight.dense(), rtol=TWO_ROUNDINGS, atol=0
    )


@pytest.mark.parametrize(
    "impl, size, dtype",
    pairwise(IMPLEMENTATIONS, SIZES, [torch.float32, torch.bfloat16, torch.float16]),
    indirect=["impl"],
    ids=str,
)
def test_matches_reference(impl, dtype, size):
    weight = quantized(*size).weight
    found, expected = impl(weight, 0, weight.N, dtype), dequantize_reference(weight, 0, weight.N, dtype)
    assert found.dtype == dtype and found.is_contiguous()
    rtol = 0
    if impl is not _dequantize_cuda:  # C++
        assert torch.equal(found, impl(weight, 0, weight.N, torch.float32).to(dtype))
        rtol = TWO_ROUNDINGS if dtype == torch.float32 else torch.finfo(dtype).eps
    elif INTERPRETED and dtype == torch.bfloat16:
        rtol = LAST_PLACE
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "size, begin, end",
    [((100, 208, 0), 32, 96), ((100, 208, 0), 192, 208), ((40, 1152, 64), 32, 736), ((33, 384, 128), 320, 384)],
    ids=str,
)
@everywhere
def test_columns_are_a_part_of_the_whole(impl, size, begin, end):
    weight = quantized(*size).weight
    for dtype in (torch.float32, torch.bfloat16):
        found = impl(weight, begin, end, dtype)
        assert torch.equal(found, impl(weight, 0, weight.N, dtype)[:, begin:end]) and found.is_contiguous()


@pytest.mark.parametrize("group", [0, 128])
@everywhere
def test_nan_of_a_scale_stays_in_its_place(impl, group):
    weight = quantized(35, 384, group).weight
    weight.scale[100] = torch.nan
    expected = torch.zeros(35, 384, dtype=torch.bool, device=DEVICE)
    expected[:, 100] = True
    if group:
        weight.packed[3, 384 // 2 + 2 : 384 // 2 + 4] = 255  # the second group's scale
        expected[3, 128:256] = True
    assert torch.equal(impl(weight, 0, weight.N, torch.float32).isnan(), expected)


@pytest.mark.parametrize("impl", RUNNABLE, indirect=True)
def test_cpp_takes_any_number_of_threads(impl, set_threads):
    weight, results = quantized(7, 128, 64).weight, []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        results.append(impl(weight, 0, weight.N, torch.float32))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("group, dtype", [(0, torch.bfloat16), (64, torch.float32)])
def test_opcheck(group, dtype):
    weight = quantized(35, 384, group).weight
    torch.library.opcheck(torch.ops.teal.dequantize, (*weight, 64, 384, dtype))
    torch.testing.assert_close(
        dequantize(weight, 64, 384, dtype), dequantize_reference(weight, 64, 384, dtype), rtol=TWO_ROUNDINGS, atol=0
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w, s: (w.float(), s, 0), "dequantize takes a weight"),
        (lambda w, s: (w.short(), s, 0), "dequantize takes a weight"),
        (lambda w, s: (w, s[:-1], 0), "dequantize takes a weight"),
        (lambda w, s: (w, None, 0), "no scale"),
        (lambda w, s: (w, s.bfloat16(), 0), r"scale \[128\] bfloat16"),
        (lambda w, s: (w[:, :40].contiguous(), s[:40], 0), "whole sixteens"),
        (lambda w, s: (w.view(torch.uint8), s, 64), "dequantize takes a weight"),
        (lambda w, s: (w.view(torch.uint8), s, 0), "groups of 0"),
        (lambda w, s: (w.t().contiguous().t(), s, 0), "packed .* strided"),
        (lambda w, s: (w, s.repeat_interleave(2)[::2], 0), "scale .* strided"),
    ],
)
def test_rejects_bad_input(change, said):
    weight = quantized(35, 128, 0)
    with pytest.raises(ValueError, match=said):
        dequantize(PackedWeight(*change(weight.packed, weight.scale)), 0, 128)


@pytest.mark.parametrize("begin, end", [(-32, 64), (0, 160), (64, 64), (96, 32), (16, 64), (0, 48)])
def test_rejects_columns_that_are_not_there_or_not_whole(begin, end):
    with pytest.raises(ValueError, match=f"columns of 128 by multiples of 32, got {begin} to {end}"):
        dequantize(quantized(35, 128, 0).weight, begin, end)
