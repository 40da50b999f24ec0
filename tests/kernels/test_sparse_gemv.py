import pytest
import torch

import teal_fast.kernels.sparse_gemv
from teal_fast.kernels.backend import triton
from teal_fast.kernels.native import library
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.sparse_gemv import (
    _sparse_gemv_cpu,
    _sparse_gemv_cuda,
    _sparse_gemv_torch,
    sparse_gemv,
    sparse_gemv_reference,
)
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.kernels.compacted import DEVICE, pairwise
from teal_fast.tests.kernels.quantized import factors, order, poison, quantized

# Against the reference's sum in fp32, of up to ~600 terms of size 1: (relative, absolute). fp32 differs by the order of
# summation, the reference itself from fp64 by 5e-5. Triton and C++ round once, by half the last bit. Plain PyTorch
# rounds four partial sums and their sum: five half bits of values up to 64 are 0.08 in fp16 and 0.63 in bf16.
TOLERANCE = {torch.float32: (0, 6e-5), torch.float16: (2**-11, 6e-5), torch.bfloat16: (2**-8, 6e-5)}
TOLERANCE_TORCH = {torch.float32: (0, 6e-5), torch.float16: (0, 0.08), torch.bfloat16: (0, 0.63)}
# Those of quantized rows are rounded once everywhere, too, and off by what quantized.py derives: `order`, `factors`.
# exact tiles, ragged both ways, one output, one input, fewer rows than four splits, less than a vector, rows longer
# than the 8192 bytes up to which C++ fetches ahead, the demo model's down projection
SIZES = [(64, 128), (100, 300), (65, 1), (1, 130), (3, 33), (45, 47), (50, 4100), (576, 960)]
# In int8 (group 0): exact tiles, ragged, one input. In int4: groups of each size, one alone, more than the 16 whose
# factors C++ makes at once, fewer rows than splits.
QUANTIZED = [(64, 128, 0), (100, 304, 0), (1, 144, 0), (70, 192, 64), (12, 1152, 64), (64, 128, 128), (3, 192, 192)]
# Any width of int8, rows longer than C++ fetches ahead, many rows of four bits
QUANTIZED_CPP = [(65, 1, 0), (577, 963, 0), (20, 8195, 0), (577, 1152, 64), (300, 576, 192)]
DTYPES = list(TOLERANCE)
IMPLEMENTATIONS = ["triton", "torch", *RUNNABLE]
everywhere = pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
in_cpp = pytest.mark.parametrize("impl", RUNNABLE, indirect=True)
# each implementation with some dtype
in_turn = pytest.mark.parametrize(
    "impl, dtype", [(impl, DTYPES[i % 3]) for i, impl in enumerate(IMPLEMENTATIONS)], indirect=["impl"], ids=str
)


def cases(names: str, implementations: list[str], values: list, third: list = DTYPES):
    """Every pair of an implementation, a value and one of the third, by default a dtype, without every triple."""
    return pytest.mark.parametrize(
        f"impl, {names}", pairwise(implementations, values, third), indirect=["impl"], ids=str
    )


@pytest.fixture
def impl(request, monkeypatch):
    """An implementation by its name."""
    if request.param == "triton":
        return _sparse_gemv_cuda if triton else pytest.skip("no Triton here")
    if DEVICE == "cuda":
        pytest.skip("runs on the CPU")
    if request.param == "torch":
        return _sparse_gemv_torch
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.sparse_gemv, "library", lambda: native)
    return in_cpp_poisoned


def in_cpp_poisoned(x, weight, threshold, bias=None):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    nothing = torch.full_like(x, torch.nan)
    _sparse_gemv_cpu(nothing, *weight, threshold, None)  # leaves NaN in the kernel's own memory
    torch.set_num_threads(threads)
    return _sparse_gemv_cpu(x, *weight, threshold, bias)


def make(K: int, N: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(K * 1000 + N)
    x = torch.randn(K, generator=generator)
    weight = torch.randn(K, N, generator=generator)
    threshold = torch.full((K,), x.abs().quantile(0.5).item())
    return x.to(DEVICE, dtype), PackedWeight(weight.to(DEVICE, dtype)), threshold.to(DEVICE)


def make_quantized(K: int, N: int, group: int, dtype: torch.dtype):
    x, _, threshold = make(K, N, dtype)
    return x, quantized(K, N, group), threshold


def check(impl, x, weight, threshold, bias=None) -> None:
    """The result is the reference's, NaN and inf included."""
    exact = PackedWeight(weight.packed.float())
    expected = sparse_gemv_reference(x.float(), exact, threshold, None if bias is None else bias.float())
    found = impl(x, weight, threshold, bias)
    assert found.dtype == x.dtype and found.shape == expected.shape
    plain = impl is _sparse_gemv_torch or (impl is sparse_gemv and DEVICE == "cpu" and library() is None)
    rtol, atol = (TOLERANCE_TORCH if plain else TOLERANCE)[x.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol, equal_nan=True)


def check_quantized(impl, x, weight, threshold, bias=None, rounded=True) -> None:
    """The result is the reference's; `rounded`: but for what C++ rounds in four-bit rows."""
    expected = sparse_gemv_reference(x.float(), weight.weight, threshold, None if bias is None else bias.float())
    found = impl(x, weight.weight, threshold, bias)
    assert found.dtype == x.dtype and found.shape == expected.shape
    kept = torch.where(x.float().abs() <= threshold, 0, x.float())
    off = order(kept, weight) + TOLERANCE[x.dtype][0] * expected.abs()
    cpp = impl is in_cpp_poisoned or (impl is sparse_gemv and DEVICE == "cpu" and library() is not None)
    if cpp and weight.group and rounded:
        off += factors(kept, weight)
    assert ((found.float() - expected).abs() <= off).all()


@cases("size, dtype", IMPLEMENTATIONS, SIZES)
def test_matches_reference(impl, dtype, size):
    x, weight, threshold = make(*size, dtype)
    check(impl, x, weight, threshold)
    kept = sparse_gemv_reference(x, weight, threshold)
    dense = (x.float() @ weight.packed.float()).to(dtype)
    assert not torch.equal(kept, dense) or len(x) == 1  # the threshold matters


@cases("size, dtype", IMPLEMENTATIONS, QUANTIZED)
def test_quantized_matches_reference(impl, dtype, size):
    check_quantized(impl, *make_quantized(*size, dtype))


@cases("size, dtype", RUNNABLE, QUANTIZED_CPP)
def test_quantized_matches_reference_in_cpp(impl, dtype, size):
    check_quantized(impl, *make_quantized(*size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_matches_reference(dtype):
    x, weight, threshold = make(100, 300, dtype)
    check(sparse_gemv, x, weight, threshold, torch.linspace(-20, 20, 300, device=DEVICE, dtype=dtype))
    check_quantized(sparse_gemv, *make_quantized(70, 192, 64, dtype))


@pytest.mark.parametrize("K, N, group", [(100, 304, 0), (70, 192, 64), (64, 128, 128)])
def test_quantized_reference(K, N, group):
    x, weight, threshold = make_quantized(K, N, group, torch.float32)
    expected = (x * (x.abs() > threshold)).double() @ weight.dense().double()
    found = sparse_gemv_reference(x, weight.weight, threshold)
    assert ((found - expected).abs() <= order(x, weight)).all()


@pytest.mark.parametrize("K, N, group", [(12, 1152, 64), (70, 384, 192)])
@pytest.mark.parametrize("impl", ["torch", *RUNNABLE], indirect=True)
def test_whole_factors_are_exact(impl, K, N, group):
    """x of whole numbers, with a 127 in every two, and rows of equal scales: C++ has nothing to round."""
    weight = quantized(K, N, group)
    weight.packed[:, N // 2 :] = weight.packed[0, N // 2 :].clone()
    weight = weight._replace(row_scale=weight.row_scale[:1].expand(K, N))
    x = torch.randint(-127, 128, (K,), generator=torch.Generator().manual_seed(0)).float()
    x[::2] = 127 * x[::2].sign()
    check_quantized(impl, x, weight, torch.full((K,), -1.0), rounded=False)


@pytest.mark.parametrize("outliers", [{0: 1000.0}, {69: -5000.0}, {k: 1000.0 * (k - 9) for k in (8, 12, 14, 15, 16)}])
@in_cpp
def test_outliers_do_not_round_other_rows_away(impl, outliers):
    x, weight, threshold = make_quantized(70, 192, 64, torch.float32)
    x[list(outliers)] = torch.tensor(list(outliers.values()))
    kept = torch.where(x.abs() <= threshold, 0, x)
    others = kept.clone()
    others[list(outliers)] = 0
    off = order(kept, weight) + factors(others, weight)
    found = impl(x, weight.weight, threshold)
    assert ((found - sparse_gemv_reference(x, weight.weight, threshold)).abs() <= off).all()


@pytest.mark.parametrize("size", [(100, 300), (3, 33)])
@everywhere
def test_nothing_kept_and_all_kept(impl, size):
    x, weight, threshold = make(*size, torch.float32)
    x[len(x) // 2] = 0
    assert impl(x, weight, torch.full_like(threshold, 100)).tolist() == [0] * weight.N
    check(impl, x, weight, torch.full_like(threshold, -1))
    bias = torch.linspace(-20, 20, weight.N, device=DEVICE)
    assert torch.equal(impl(x, weight, torch.full_like(threshold, 100), bias), bias)


@pytest.mark.parametrize("size", [(100, 304, 0), (20, 1152, 64)])
@everywhere
def test_quantized_nothing_kept_and_all_kept(impl, size):
    x, weight, threshold = make_quantized(*size, torch.float32)
    x[len(x) // 2] = 0
    assert impl(x, weight.weight, torch.full_like(threshold, 100)).tolist() == [0] * len(weight.scale)
    check_quantized(impl, x, weight, torch.full_like(threshold, -1))
    bias = torch.linspace(-20, 20, len(weight.scale), device=DEVICE)
    assert torch.equal(impl(x, weight.weight, torch.full_like(threshold, 100), bias), bias)
    check_quantized(impl, x, weight, threshold, bias)


@everywhere
def test_threshold_per_channel(impl):
    x, weight, _ = make(100, 70, torch.float32)
    check(impl, x, weight, torch.linspace(0, 2, 100, device=DEVICE))


@in_turn
def test_bias(impl, dtype):
    x, weight, threshold = make(100, 70, dtype)
    check(impl, x, weight, threshold, torch.linspace(-20, 20, 70, device=DEVICE, dtype=dtype))


@everywhere
def test_value_on_the_threshold_is_dropped(impl):
    x = torch.tensor([0.5, -0.5, 0.5, -2.0], device=DEVICE)
    threshold = torch.tensor([0.5, 0.5, 0.25, 0.5], device=DEVICE)
    assert impl(x, PackedWeight(torch.eye(4, device=DEVICE)), threshold).tolist() == [0, 0, 0.5, -2.0]


@everywhere
def test_dropped_rows_are_not_read(impl):
    x, weight, threshold = make(100, 70, torch.float32)
    expected = impl(x, weight, threshold)
    dropped = x.abs() <= threshold
    weight.packed[dropped] = torch.nan
    weight.packed[dropped.nonzero()[::2, 0]] = torch.inf
    assert torch.equal(impl(x, weight, threshold), expected)


@pytest.mark.parametrize("size", [(100, 304, 0), (64, 192, 192)])
@everywhere
def test_dropped_quantized_rows_are_not_read(impl, size):
    x, weight, threshold = make_quantized(*size, torch.float32)
    poisoned = weight._replace(packed=poison(weight.packed, x.abs() <= threshold))
    assert not torch.equal(poisoned.packed, weight.packed)
    assert torch.equal(impl(x, poisoned.weight, threshold), impl(x, weight.weight, threshold))


@cases("value, dtype", IMPLEMENTATIONS, [torch.nan, torch.inf])
def test_nan_and_inf_travel_as_in_a_dense_layer(impl, dtype, value):
    x, weight, threshold = make(64, 40, dtype)
    x[5] = value
    assert not sparse_gemv_reference(x, weight, threshold).isfinite().any()
    check(impl, x, weight, threshold)


@cases("value, size", IMPLEMENTATIONS, [torch.nan, -torch.inf], [(64, 48, 0), (20, 1152, 64)])
def test_nan_and_inf_travel_through_quantized_rows(impl, size, value):
    x, weight, threshold = make_quantized(*size, torch.bfloat16)
    x[len(x) // 2] = value
    assert not sparse_gemv_reference(x, weight.weight, threshold).isfinite().any()
    assert not impl(x, weight.weight, threshold).isfinite().any()


@in_turn
def test_nan_and_inf_of_kept_rows_reach_their_outputs_alone(impl, dtype):
    x, weight, threshold = make(64, 45, dtype)
    x[:2], threshold[0] = 0, -1  # zero times infinity is NaN, unless the row is dropped
    x[2:5] = 3
    bad = [(0, 1, torch.inf), (1, 7, torch.inf), (2, 20, torch.nan), (3, 43, torch.inf), (4, 44, torch.nan)]
    for k, n, value in bad:
        weight.packed[k, n] = value
    reached = sparse_gemv_reference(x, weight, threshold).isfinite().logical_not().nonzero().flatten().tolist()
    assert reached == [1, 20, 43, 44]
    check(impl, x, weight, threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["torch", *RUNNABLE], indirect=True)  # Triton's interpreter has no subnormal bf16
def test_subnormals_count(impl, dtype):
    count = torch.arange(70, device=DEVICE)
    tiny = (count * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).to(dtype)
    one, threshold = torch.ones(1, device=DEVICE, dtype=dtype), torch.zeros(1, device=DEVICE)
    assert torch.equal(impl(one, PackedWeight(tiny[None]), threshold), tiny)
    scale = 1 / torch.finfo(dtype).smallest_normal if dtype != torch.float16 else 2.0**15
    expected = (tiny.double() * scale).to(dtype)
    assert expected[-1] > 1e-6 and torch.equal(impl(one * scale, PackedWeight(tiny[None]), threshold), expected)
    assert torch.equal(impl(tiny[69:], PackedWeight(one[None] * scale), threshold), expected[69:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@in_cpp
def test_every_value_is_converted_and_rounded_as_pytorch_does(impl, dtype):
    """All 65,536 values, each with a smaller one added: every rounding, to infinity too; some in a row's ragged end."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1, 3e-7, 1e-39, 65504, 3.39e38, -6.1e-5])
    weight = torch.cat((every, special.to(dtype))).repeat(2, 1)
    weight[1] = weight[1].roll(1000)
    x = torch.tensor([1, 0.375]).to(dtype)
    expected = (weight[0].float() + weight[1].float() * 0.375).to(dtype)
    assert 0.005 < expected.isfinite().logical_not().float().mean() < 0.1
    assert torch.equal(impl(x, PackedWeight(weight), torch.zeros(2)).nan_to_num(7), expected.nan_to_num(7))


@in_turn
def test_same_bits_every_time(impl, dtype):
    x, weight, threshold = make(300, 200, dtype)
    first = impl(x, weight, threshold)
    assert all(torch.equal(impl(x, weight, threshold), first) for _ in range(3))


@everywhere
def test_same_bits_every_time_quantized(impl):
    x, weight, threshold = make_quantized(100, 192, 64, torch.bfloat16)
    first = impl(x, weight.weight, threshold)
    assert all(torch.equal(impl(x, weight.weight, threshold), first) for _ in range(3))


@cases("size, dtype", RUNNABLE, [(577, 963), (50, 4100), (65, 1)])
def test_same_bits_for_any_number_of_threads(impl, dtype, size, set_threads):
    results = []
    for threads in (1, 2, 3, 4, 8):
        set_threads(threads)
        results.append(impl(*make(*size, dtype)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("size", [(577, 963, 0), (300, 576, 192)])
@in_cpp
def test_same_bits_for_any_number_of_threads_quantized(impl, size, set_threads):
    results = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        x, weight, threshold = make_quantized(*size, torch.float32)
        results.append(impl(x, weight.weight, threshold))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    (x, weight, threshold), bias = make(100, 70, dtype), torch.ones(70, device=DEVICE, dtype=dtype)
    torch.library.opcheck(torch.ops.teal.sparse_gemv, (x, *weight, threshold, None))
    torch.library.opcheck(torch.ops.teal.sparse_gemv, (x, *weight, threshold, bias))


@pytest.mark.parametrize("group", [0, 128])
def test_opcheck_quantized(group):
    x, weight, threshold = make_quantized(100, 384, group, torch.bfloat16)
    torch.library.opcheck(torch.ops.teal.sparse_gemv, (x, *weight.weight, threshold, None))


@pytest.mark.skipif(DEVICE == "cuda", reason="runs on the CPU")
def test_a_type_without_cpp_falls_back():
    x, weight, threshold = make(100, 70, torch.float64)
    expected = (x * (x.abs() > threshold)) @ weight.packed
    torch.testing.assert_close(sparse_gemv(x, weight, threshold), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, w, t: (x[None], w, t), r"takes contiguous x \[K\] dtype, .* got x \[1, 64\] float32"),
        (lambda x, w, t: (x[:-1], w, t), r"got x \[63\]"),
        (lambda x, w, t: (x, w, t[:-1]), r"threshold \[63\]"),
        (lambda x, w, t: (x, w, t.bfloat16()), r"threshold \[64\] bfloat16"),
        (lambda x, w, t: (x, w.bfloat16(), t), "takes a weight .* in torch.float32, .* torch.bfloat16, no scale"),
        (lambda x, w, t: (x.long(), w.long(), t), "takes a weight .* torch.int64"),
        (lambda x, w, t: (x, w[None], t), r"packed \[1, 64, 32\]"),
        (lambda x, w, t: (x, w.t().contiguous().t(), t), "packed .* strided"),
        (lambda x, w, t: (x, w, t, x), r"bias \[64\]"),
        (lambda x, w, t: (x, w, t, x[:32].bfloat16()), r"bias \[32\] bfloat16"),
        (lambda x, w, t: (x, w, None), "no threshold"),
    ],
)
def test_rejects_bad_input(change, said):
    x, weight, threshold = make(64, 32, torch.float32)
    x, packed, threshold, *bias = change(x, weight.packed, threshold)
    with pytest.raises(ValueError, match=f"sparse_gemv {said}" if said.startswith("takes") else said) as error:
        sparse_gemv(x, PackedWeight(packed), threshold, *bias)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w, s: (w, None), "no scale"),
        (lambda w, s: (w, s[:-1]), "takes a weight"),
        (lambda w, s: (w, s[:, None]), r"scale \[128, 1\]"),
        (lambda w, s: (w, s.bfloat16()), r"scale \[128\] bfloat16"),
        (lambda w, s: (w.short(), s), "takes a weight"),
        (lambda w, s: (w.bool(), s), "takes a weight"),
        (lambda w, s: (w.float(), s), "takes a weight"),
        (lambda w, s: (w[:, :40].contiguous(), s[:40]), "whole sixteens"),
        (lambda w, s: (w.t().contiguous().t(), s), "strided"),
        (lambda w, s: (w, s.repeat_interleave(2)[::2]), "strided"),
        (lambda w, s: (w.view(torch.uint8), s), "groups of 0"),
        (lambda w, s: (w.view(torch.uint8), s, 64), "takes a weight"),  # wider than rows of four bits are
        (lambda w, s: (w.view(torch.uint8)[:, :96].contiguous(), s, 32), "groups of 32"),
        (lambda w, s: (w.view(torch.uint8)[:, :96].contiguous(), s, 192), "groups of 192"),
        (lambda w, s: (w.view(torch.uint8)[:, :96].contiguous(), None, 64), "no scale"),
    ],
)
def test_rejects_bad_quantized_input(change, said):
    x, weight, threshold = make_quantized(64, 128, 0, torch.float32)
    with pytest.raises(ValueError, match=said):
        sparse_gemv(x, PackedWeight(*change(weight.packed, weight.scale)), threshold)
    x, weight, threshold = make_quantized(64, 128, 64, torch.float32)
    sparse_gemv(x, weight.weight, threshold)  # this is what it takes
