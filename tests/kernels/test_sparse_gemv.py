import pytest
import torch

import kernels.sparse_gemv
from kernels.backend import triton
from kernels.native import library
from kernels.sparse_gemv import (
    _sparse_gemv_cpu,
    _sparse_gemv_cuda,
    _sparse_gemv_torch,
    sparse_gemv,
    sparse_gemv_reference,
)
from tests.cpp import RUNNABLE, compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Against the reference's sum in fp32, of up to ~600 terms of size 1: (relative, absolute). fp32 differs by the order of
# summation, the reference itself from fp64 by 5e-5. Triton and C++ round once, by half the last bit. Plain PyTorch
# rounds four partial sums and their sum: five half bits of values up to 64 are 0.08 in fp16 and 0.63 in bf16.
TOLERANCE = {torch.float32: (0, 6e-5), torch.float16: (2**-11, 6e-5), torch.bfloat16: (2**-8, 6e-5)}
TOLERANCE_TORCH = {torch.float32: (0, 6e-5), torch.float16: (0, 0.08), torch.bfloat16: (0, 0.63)}
# exact tiles, ragged both ways, one output, one input, fewer rows than four splits, rows longer than the 8192 bytes up
# to which C++ fetches ahead, the demo model's down projection
SIZES = [(64, 128), (100, 300), (65, 1), (1, 130), (3, 33), (7, 17), (45, 47), (50, 4100), (576, 960)]
everywhere = pytest.mark.parametrize("impl", ["triton", "torch", *RUNNABLE, "op"], indirect=True)
on_cpu = pytest.mark.parametrize("impl", ["torch", *RUNNABLE], indirect=True)
in_cpp = pytest.mark.parametrize("impl", RUNNABLE, indirect=True)
in_every_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def impl(request, monkeypatch):
    """An implementation by its name."""
    if request.param == "op":
        return sparse_gemv
    if request.param == "triton":
        return _sparse_gemv_cuda if triton else pytest.skip("no Triton here")
    if DEVICE == "cuda":
        pytest.skip("runs on the CPU")
    if request.param == "torch":
        return _sparse_gemv_torch
    native = compiled(request.param)
    monkeypatch.setattr(kernels.sparse_gemv, "library", lambda: native)

    def poisoned(x, weight, threshold, bias=None):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        _sparse_gemv_cpu(torch.full_like(x, torch.nan), weight, threshold)  # leaves NaN in the kernel's own memory
        torch.set_num_threads(threads)
        return _sparse_gemv_cpu(x, weight, threshold, bias)

    return poisoned


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@in_every_type
@everywhere
def test_nan_and_inf_travel_as_in_a_dense_layer(impl, dtype, value):
    x, weight, threshold = make(64, 40, dtype)
    x[5] = value
    assert not sparse_gemv_reference(x, weight, threshold).isfinite().any()
    check(impl, x, weight, threshold)


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
    x, weight, threshold = make(576, 300, torch.bfloat16)
    first = impl(x, weight, threshold)
    assert all(torch.equal(impl(x, weight, threshold), first) for _ in range(5))


@pytest.mark.parametrize("K, N", [(577, 963), (50, 4100), (3, 33), (65, 1)])
@in_every_type
@on_cpu
def test_same_bits_for_any_number_of_threads(impl, dtype, K, N, set_threads):
    results = []
    for threads in (1, 2, 3, 4, 8):
        set_threads(threads)
        results.append(impl(*make(K, N, dtype)))
    assert all(torch.equal(result, results[0]) for result in results)


@in_every_type
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.teal.sparse_gemv, make(100, 70, dtype))
    torch.library.opcheck(
        torch.ops.teal.sparse_gemv, (*make(100, 70, dtype), torch.ones(70, device=DEVICE, dtype=dtype))
    )


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
        (lambda x, w, t: (x, w.bfloat16(), t), "one floating type"),
        (lambda x, w, t: (x.long(), w.long(), t), "one floating type"),
        (lambda x, w, t: (x, w, t.bfloat16()), "fp32 threshold"),
        (lambda x, w, t: (x, w.t().contiguous().t(), t), "contiguous"),
        (lambda x, w, t: (x, w, t, x), "bias"),
        (lambda x, w, t: (x, w, t, x[:32].bfloat16()), "bias"),
    ],
)
def test_rejects_bad_input(change, said):
    with pytest.raises(ValueError, match=said):
        sparse_gemv(*change(*make(64, 32, torch.float32)))
