import pytest
import torch

import teal_fast.kernels.sparse_gemv
from teal_fast.kernels.backend import triton
from teal_fast.kernels.native import library
from teal_fast.kernels.sparse_gemv import (
    _sparse_gemv_cpu,
    _sparse_gemv_cuda,
    _sparse_gemv_torch,
    sparse_gemv,
    sparse_gemv_reference,
)
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.kernels.compacted import DEVICE
from teal_fast.tests.kernels.quantized import factors, order, poison, quantized

# Against the reference's sum in fp32, of up to ~600 terms of size 1: (relative, absolute). fp32 differs by the order of
# summation, the reference itself from fp64 by 5e-5. Triton and C++ round once, by half the last bit. Plain PyTorch
# rounds four partial sums and their sum: five half bits of values up to 64 are 0.08 in fp16 and 0.63 in bf16.
TOLERANCE = {torch.float32: (0, 6e-5), torch.float16: (2**-11, 6e-5), torch.bfloat16: (2**-8, 6e-5)}
TOLERANCE_TORCH = {torch.float32: (0, 6e-5), torch.float16: (0, 0.08), torch.bfloat16: (0, 0.63)}
# Those of quantized rows are rounded once everywhere, too, and off by what quantized.py derives: `order`, `factors`.
# exact tiles, ragged both ways, one output, one input, fewer rows than four splits, rows longer than the 8192 bytes up
# to which C++ fetches ahead, the demo model's down projection
SIZES = [(64, 128), (100, 300), (65, 1), (1, 130), (3, 33), (7, 17), (45, 47), (50, 4100), (576, 960)]
# In int8 (group 0): exact tiles, ragged, one input, few columns. In int4: groups of each size, one alone, more than the
# 16 whose factors C++ makes at once, fewer rows than splits.
QUANTIZED = [(64, 128, 0), (100, 304, 0), (1, 144, 0), (45, 16, 0)]
QUANTIZED += [(70, 192, 64), (1, 64, 64), (12, 1152, 64), (64, 128, 128), (3, 192, 192), (70, 384, 192)]
# Any width of int8, rows longer than C++ fetches ahead, many rows of four bits
QUANTIZED_CPP = [(64, 37, 0), (65, 1, 0), (577, 963, 0), (20, 8195, 0), (577, 1152, 64), (300, 576, 192)]
everywhere = pytest.mark.parametrize("impl", ["triton", "torch", *RUNNABLE, "op"], indirect=True)
on_cpu = pytest.mark.parametrize("impl", ["torch", *RUNNABLE], indirect=True)
in_cpp = pytest.mark.parametrize("impl", RUNNABLE, indirect=True)
in_every_form = pytest.mark.parametrize("K, N, group", QUANTIZED)
in_every_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def impl(request, monkeypatch):
    """An implementation by its name."""
    if request.param == "op":
        return sparse_gemv
    if request.param == "triton":
        return on_triton if triton else pytest.skip("no Triton here")
    if DEVICE == "cuda":
        pytest.skip("runs on the CPU")
    if request.param == "torch":
        return _sparse_gemv_torch
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.sparse_gemv, "library", lambda: native)

    return in_cpp_poisoned


def on_triton(x, weight, threshold, bias=None, scale=None, group=0):
    return _sparse_gemv_cuda(x, weight, threshold, bias, scale, group)


def in_cpp_poisoned(x, weight, threshold, bias=None, scale=None, group=0):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    nothing = torch.full_like(x, torch.nan)
    _sparse_gemv_cpu(nothing, weight, threshold, None, scale, group)  # leaves NaN in the kernel's own memory
    torch.set_num_threads(threads)
    return _sparse_gemv_cpu(x, weight, threshold, bias, scale, group)


def make(K: int, N: int, dtype: torch.dtype, quantile: float = 0.5):
    generator = torch.Generator().manual_seed(K * 1000 + N)
    x = torch.randn(K, generator=generator)
    weight = torch.randn(K, N, generator=generator)
    threshold = torch.full((K,), x.abs().quantile(quantile).item())
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), threshold.to(DEVICE)


def check(impl, x, weight, threshold, bias=None) -> None:
    """The result is the reference's, NaN and inf included."""
    wide = (None if tensor is None else tensor.float() for tensor in (x, weight, threshold, bias))
    expected, found = sparse_gemv_reference(*wide), impl(x, weight, threshold, bias)
    assert found.dtype == x.dtype and found.shape == expected.shape
    plain = impl is _sparse_gemv_torch or (impl is sparse_gemv and DEVICE == "cpu" and library() is None)
    rtol, atol = (TOLERANCE_TORCH if plain else TOLERANCE)[x.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol, equal_nan=True)


def make_quantized(K: int, N: int, group: int, dtype: torch.dtype):
    x, _, threshold = make(K, N, dtype)
    return x, quantized(K, N, group), threshold


def run(impl, x, weight, threshold, bias=None):
    return impl(x, weight.packed, threshold, bias, weight.scale, weight.group)


def check_quantized(impl, x, weight, threshold, bias=None, rounded=True) -> None:
    """The result is the reference's; `rounded`: but for what C++ rounds in four-bit rows."""
    wide = None if bias is None else bias.float()
    expected, found = (
        run(sparse_gemv_reference, x.float(), weight, threshold, wide),
        run(impl, x, weight, threshold, bias),
    )
    assert found.dtype == x.dtype and found.shape == expected.shape
    kept = torch.where(x.float().abs() <= threshold, 0, x.float())
    off = order(kept, weight) + TOLERANCE[x.dtype][0] * expected.abs()
    cpp = impl is in_cpp_poisoned or (impl is sparse_gemv and DEVICE == "cpu" and library() is not None)
    if cpp and weight.group and rounded:
        off += factors(kept, weight)
    assert ((found.float() - expected).abs() <= off).all()


@pytest.mark.parametrize("K, N", SIZES)
@in_every_type
@everywhere
def test_matches_reference(impl, dtype, K, N):
    x, weight, threshold = make(K, N, dtype)
    check(impl, x, weight, threshold)
    kept = sparse_gemv_reference(x, weight, threshold)
    assert not torch.equal(kept, (x.float() @ weight.float()).to(dtype)) or K == 1  # the threshold matters


@pytest.mark.parametrize("K, N", SIZES[:-1])
@everywhere
def test_nothing_kept_and_all_kept(impl, K, N):
    x, weight, threshold = make(K, N, torch.float32)
    x[K // 2] = 0
    assert impl(x, weight, torch.full_like(threshold, 100)).tolist() == [0] * N
    check(impl, x, weight, torch.full_like(threshold, -1))
    bias = torch.linspace(-20, 20, N, device=DEVICE)
    assert torch.equal(impl(x, weight, torch.full_like(threshold, 100), bias), bias)


@in_every_form
@in_every_type
@everywhere
def test_quantized_matches_reference(impl, dtype, K, N, group):
    check_quantized(impl, *make_quantized(K, N, group, dtype))


@in_every_form
def test_quantized_reference(K, N, group):
    x, weight, threshold = make_quantized(K, N, group, torch.float32)
    expected = (x * (x.abs() > threshold)).double() @ weight.dense().double()
    assert ((run(sparse_gemv_reference, x, weight, threshold) - expected).abs() <= order(x, weight)).all()


@pytest.mark.parametrize("K, N, group", QUANTIZED_CPP)
@in_every_type
@on_cpu
def test_quantized_matches_reference_on_the_cpu(impl, dtype, K, N, group):
    check_quantized(impl, *make_quantized(K, N, group, dtype))


@pytest.mark.parametrize("K, N, group", [case for case in QUANTIZED + QUANTIZED_CPP if case[2]])
@on_cpu
def test_whole_factors_are_exact(impl, K, N, group):
    """x of whole numbers, with a 127 in every two, and rows of equal scales: C++ has nothing to round."""
    weight = quantized(K, N, group)
    weight.packed[:, N // 2 :] = weight.packed[0, N // 2 :].clone()
    weight = weight._replace(unit=weight.unit[:1].expand(K, N))
    x = torch.randint(-127, 128, (K,), generator=torch.Generator().manual_seed(0)).float()
    x[::2] = 127 * x[::2].sign()
    check_quantized(impl, x, weight, torch.full((K,), -1.0), rounded=False)


@in_every_form
@everywhere
def test_quantized_nothing_kept_and_all_kept(impl, K, N, group):
    x, weight, threshold = make_quantized(K, N, group, torch.float32)
    x[K // 2] = 0
    assert run(impl, x, weight, torch.full_like(threshold, 100)).tolist() == [0] * N
    check_quantized(impl, x, weight, torch.full_like(threshold, -1))
    bias = torch.linspace(-20, 20, N, device=DEVICE)
    assert torch.equal(run(impl, x, weight, torch.full_like(threshold, 100), bias), bias)
    check_quantized(impl, x, weight, threshold, bias)


@everywhere
def test_threshold_per_channel(impl):
    x, weight, _ = make(100, 70, torch.float32)
    check(impl, x, weight, torch.linspace(0, 2, 100, device=DEVICE))


@in_every_type
@everywhere
def test_bias(impl, dtype):
    x, weight, threshold = make(100, 70, dtype)
    check(impl, x, weight, threshold, torch.linspace(-20, 20, 70, device=DEVICE, dtype=dtype))


@everywhere
def test_value_on_the_threshold_is_dropped(impl):
    x = torch.tensor([0.5, -0.5, 0.5, -2.0], device=DEVICE)
    weight = torch.eye(4, device=DEVICE)
    threshold = torch.tensor([0.5, 0.5, 0.25, 0.5], device=DEVICE)
    assert impl(x, weight, threshold).tolist() == [0, 0, 0.5, -2.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@everywhere
def test_dropped_rows_are_not_read(impl, value):
    x, weight, threshold = make(100, 70, torch.float32)
    expected = impl(x, weight, threshold)
    weight[x.abs() <= threshold] = value
    assert torch.equal(impl(x, weight, threshold), expected)


@in_every_form
@everywhere
def test_dropped_quantized_rows_are_not_read(impl, K, N, group):
    x, weight, threshold = make_quantized(K, N, group, torch.float32)
    poisoned = weight._replace(rows=poison(weight.packed, x.abs() <= threshold))
    assert K == 1 or not torch.equal(poisoned.packed, weight.packed)
    assert torch.equal(run(impl, x, poisoned, threshold), run(impl, x, weight, threshold))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@in_every_type
@everywhere
def test_nan_and_inf_travel_as_in_a_dense_layer(impl, dtype, value):
    x, weight, threshold = make(64, 40, dtype)
    x[5] = value
    assert not sparse_gemv_reference(x, weight, threshold).isfinite().any()
    check(impl, x, weight, threshold)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("K, N, group", [(64, 48, 0), (20, 1152, 64), (64, 192, 192)])
@in_every_type
@everywhere
def test_nan_and_inf_travel_through_quantized_rows(impl, dtype, K, N, group, value):
    x, weight, threshold = make_quantized(K, N, group, dtype)
    x[K // 2] = value
    assert not run(sparse_gemv_reference, x, weight, threshold).isfinite().any()
    assert not run(impl, x, weight, threshold).isfinite().any()


@in_every_type
@everywhere
def test_nan_and_inf_of_kept_rows_reach_their_outputs_alone(impl, dtype):
    x, weight, threshold = make(64, 45, dtype)
    x[:2], threshold[0] = 0, -1  # zero times infinity is NaN, unless the row is dropped
    x[2:5] = 3
    for k, n, value in (
        (0, 1, torch.inf),
        (1, 7, torch.inf),
        (2, 20, torch.nan),
        (3, 43, torch.inf),
        (4, 44, torch.nan),
    ):
        weight[k, n] = value
    assert sparse_gemv_reference(x, weight, threshold).isfinite().logical_not().nonzero().flatten().tolist() == [
        1,
        20,
        43,
        44,
    ]
    check(impl, x, weight, threshold)


@in_every_type
@on_cpu  # Triton's interpreter has no subnormal bf16
def test_subnormals_count(impl, dtype):
    count = torch.arange(70, device=DEVICE)
    tiny = (count * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).to(dtype)
    one, threshold = torch.ones(1, device=DEVICE, dtype=dtype), torch.zeros(1, device=DEVICE)
    assert torch.equal(impl(one, tiny[None], threshold), tiny)
    scale = 1 / torch.finfo(dtype).smallest_normal if dtype != torch.float16 else 2.0**15
    expected = (tiny.double() * scale).to(dtype)
    assert expected[-1] > 1e-6 and torch.equal(impl(one * scale, tiny[None], threshold), expected)
    assert torch.equal(impl(tiny[69:], one[None] * scale, threshold), expected[69:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@in_cpp
def test_every_value_is_widened_and_rounded_as_pytorch_does(impl, dtype):
    """All 65,536 values, each with a smaller one added: every rounding, to infinity too; some in a row's ragged end."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1, 3e-7, 1e-39, 65504, 3.39e38, -6.1e-5])
    weight = torch.cat((every, special.to(dtype))).repeat(2, 1)
    weight[1] = weight[1].roll(1000)
    x = torch.tensor([1, 0.375]).to(dtype)
    expected = (weight[0].float() + weight[1].float() * 0.375).to(dtype)
    assert 0.005 < expected.isfinite().logical_not().float().mean() < 0.1
    assert torch.equal(impl(x, weight, torch.zeros(2)).nan_to_num(7), expected.nan_to_num(7))


@everywhere
def test_same_bits_every_time(impl):
    x, weight, threshold = make(300, 200, torch.bfloat16)
    first = impl(x, weight, threshold)
    assert all(torch.equal(impl(x, weight, threshold), first) for _ in range(5))


@pytest.mark.parametrize("group", [0, 64, 192])
@everywhere
def test_same_bits_every_time_quantized(impl, group):
    inputs = make_quantized(100, 192, group, torch.bfloat16)
    first = run(impl, *inputs)
    assert all(torch.equal(run(impl, *inputs), first) for _ in range(3))


@pytest.mark.parametrize("K, N", [(577, 963), (50, 4100), (3, 33), (65, 1)])
@in_every_type
@on_cpu
def test_same_bits_for_any_number_of_threads(impl, dtype, K, N, set_threads):
    results = []
    for threads in (1, 2, 3, 4, 8):
        set_threads(threads)
        results.append(impl(*make(K, N, dtype)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("K, N, group", QUANTIZED + QUANTIZED_CPP)
@in_cpp
def test_same_bits_for_any_number_of_threads_quantized(impl, K, N, group, set_threads):
    results = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        results.append(run(impl, *make_quantized(K, N, group, torch.float32)))
    assert all(torch.equal(result, results[0]) for result in results)


@in_every_type
def test_opcheck(dtype):
    inputs, bias = make(100, 70, dtype), torch.ones(70, device=DEVICE, dtype=dtype)
    torch.library.opcheck(torch.ops.teal.sparse_gemv, (*inputs, None, None, 0))
    torch.library.opcheck(torch.ops.teal.sparse_gemv, (*inputs, bias, None, 0))


@pytest.mark.parametrize("group", [0, 128])
def test_opcheck_quantized(group):
    x, weight, threshold = make_quantized(100, 384, group, torch.bfloat16)
    torch.library.opcheck(torch.ops.teal.sparse_gemv, (x, weight.packed, threshold, None, weight.scale, group))


@pytest.mark.skipif(DEVICE == "cuda", reason="runs on the CPU")
def test_a_type_without_cpp_falls_back():
    x, weight, threshold = make(100, 70, torch.float64)
    expected = (x * (x.abs() > threshold)) @ weight
    torch.testing.assert_close(sparse_gemv(x, weight, threshold), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, w, t: (x[None], w, t), "takes x"),
        (lambda x, w, t: (x[:-1], w, t), "takes x"),
        (lambda x, w, t: (x, w, t[:-1]), "takes x"),
        (lambda x, w, t: (x, w.bfloat16(), t), "takes rows"),
        (lambda x, w, t: (x.long(), w.long(), t), "floating x"),
        (lambda x, w, t: (x, w, t, None, x[:32]), "takes rows"),
        (lambda x, w, t: (x, w, t.bfloat16()), "fp32 threshold"),
        (lambda x, w, t: (x, w.t().contiguous().t(), t), "contiguous"),
        (lambda x, w, t: (x, w, t, x), "bias"),
        (lambda x, w, t: (x, w, t, x[:32].bfloat16()), "bias"),
    ],
)
def test_rejects_bad_input(change, said):
    with pytest.raises(ValueError, match=said):
        sparse_gemv(*change(*make(64, 32, torch.float32)))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, w: (x, w.packed, None), "no scale"),
        (lambda x, w: (x, w.packed, w.scale[:-1]), "takes rows"),
        (lambda x, w: (x, w.packed, w.scale[:, None]), "takes rows"),
        (lambda x, w: (x, w.packed, w.scale.bfloat16()), "takes rows"),
        (lambda x, w: (x, w.packed.short(), w.scale), "takes rows"),
        (lambda x, w: (x, w.packed.bool(), w.scale), "takes rows"),
        (lambda x, w: (x, w.packed[:, :40].contiguous(), w.scale[:40]), "whole sixteens"),
        (lambda x, w: (x, w.packed.t().contiguous().t(), w.scale), "contiguous"),
        (lambda x, w: (x, w.packed, w.scale.repeat_interleave(2)[::2]), "contiguous"),
        (lambda x, w: (x, w.packed.view(torch.uint8), w.scale), "groups of 0"),
        (lambda x, w: (x, w.packed.view(torch.uint8), w.scale, 64), "takes rows"),  # wider than rows of four bits are
        (lambda x, w: (x, w.packed.view(torch.uint8)[:, :96].contiguous(), w.scale, 32), "groups of 32"),
        (lambda x, w: (x, w.packed.view(torch.uint8)[:, :96].contiguous(), w.scale, 192), "groups of 192"),
        (lambda x, w: (x, w.packed.view(torch.uint8)[:, :96].contiguous(), None, 64), "no scale"),
    ],
)
def test_rejects_bad_quantized_input(change, said):
    x, weight, threshold = make_quantized(64, 128, 0, torch.float32)
    x, rows, scale, *group = change(x, weight)
    with pytest.raises(ValueError, match=said):
        sparse_gemv(x, rows, threshold, None, scale, *group)
    x, weight, threshold = make_quantized(64, 128, 64, torch.float32)
    sparse_gemv(x, weight.packed, threshold, None, weight.scale, 64)  # this is what it takes
