import pytest
import torch

import teal_fast.kernels.sparse_gemm
import teal_fast.kernels.sparse_gemv
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.sparse_gemm import (
    MOST_TOKENS,
    _sparse_gemm_cpu,
    _sparse_gemm_torch,
    sparse_gemm,
    sparse_gemm_reference,
)
from teal_fast.kernels.sparse_gemv import sparse_gemv
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.kernels.compacted import DEVICE, normal
from teal_fast.tests.kernels.quantized import factors, order, poison, quantized

# Against sums in fp32 of up to ~300 terms of size 1; half of the last bit besides, since y is rounded once.
TOLERANCE = {torch.float32: (0, 6e-5), torch.float16: (2**-11, 6e-5), torch.bfloat16: (2**-8, 6e-5)}
SIZES = [(1, 64, 128), (2, 100, 300), (5, 65, 1), (8, 3, 33), (16, 300, 70)]  # tokens, K, N
QUANTIZED = [(2, 100, 304, 0), (8, 70, 192, 64), (5, 20, 1152, 64), (16, 3, 192, 192)]
everywhere = pytest.mark.parametrize("impl", ["torch", *RUNNABLE], indirect=True)


@pytest.fixture
def impl(request, monkeypatch):
    """An implementation by its name."""
    if DEVICE == "cuda":
        pytest.skip("runs on the CPU")
    if request.param == "torch":
        return _sparse_gemm_torch
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.sparse_gemm, "library", lambda: native)

    def in_cpp(x, weight, threshold, bias=None):
        _sparse_gemm_cpu(torch.full_like(x, torch.nan), *weight, threshold, None)  # leaves NaN in its own memory
        return _sparse_gemm_cpu(x, *weight, threshold, bias)

    return in_cpp


def make(M: int, K: int, dtype: torch.dtype):
    x = normal(M, K, seed=K).to(dtype)
    return x, torch.full((K,), x.abs().float().quantile(0.5).item(), device=DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@everywhere
def test_matches_reference(impl, size, dtype):
    M, K, N = size
    (x, threshold), weight = make(M, K, dtype), PackedWeight(normal(K, N).to(dtype))
    bias = torch.linspace(-20, 20, N, device=DEVICE, dtype=dtype)
    expected = sparse_gemm_reference(x.float(), PackedWeight(weight.packed.float()), threshold, bias.float())
    found, (rtol, atol) = impl(x, weight, threshold, bias), TOLERANCE[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)
    dense = x.float() @ weight.packed.float() + bias.float()
    assert K < 4 or not torch.allclose(found.float(), dense, atol=0.1)  # the threshold matters


@pytest.mark.parametrize("size", QUANTIZED, ids=str)
@everywhere
def test_quantized_matches_reference(impl, size):
    M, K, N, group = size
    (x, threshold), weight = make(M, K, torch.float32), quantized(K, N, group)
    found = impl(x, weight.weight, threshold)
    expected = sparse_gemm_reference(x, weight.weight, threshold)
    kept = x.masked_fill(x.abs() <= threshold, 0)
    rounding = impl is not _sparse_gemm_torch and group
    off = torch.stack([order(row, weight) + (factors(row, weight) if rounding else 0) for row in kept])
    assert ((found - expected).abs() <= off).all()


@everywhere
def test_nothing_kept_and_all_kept(impl):
    (x, _), weight = make(3, 100, torch.float32), PackedWeight(normal(100, 70))
    assert impl(x, weight, torch.full((100,), 100.0, device=DEVICE)).abs().max() == 0
    expected = x @ weight.packed
    torch.testing.assert_close(impl(x, weight, torch.full((100,), -1.0, device=DEVICE)), expected, rtol=0, atol=6e-5)


@everywhere
def test_each_token_has_a_mask_of_its_own(impl):
    x = torch.tensor([[0.5, -0.5, 0.75, -2.0], [2.0, 0.5, torch.nan, 0.25]], device=DEVICE)
    threshold = torch.tensor([0.5, 0.25, 0.75, 0.5], device=DEVICE)  # on it an entry is dropped; NaN is not
    weight = PackedWeight(torch.eye(4, device=DEVICE))
    first, second = impl(x, weight, threshold)
    assert first.tolist() == [0, -0.5, 0, -2.0] and second.isnan().all()


@everywhere
def test_rows_that_no_token_keeps_are_not_read(impl):
    (x, threshold), weight = make(3, 100, torch.float32), PackedWeight(normal(100, 70))
    dropped, expected = (x.abs() <= threshold).all(0), impl(x, weight, threshold)
    assert dropped.sum() > 5
    weight.packed[dropped] = torch.nan
    assert torch.equal(impl(x, weight, threshold), expected)
    four_bits = quantized(100, 192, 64)
    poisoned = four_bits._replace(packed=poison(four_bits.packed, dropped))
    assert torch.equal(impl(x, poisoned.weight, threshold), impl(x, four_bits.weight, threshold))


@pytest.mark.skipif(DEVICE == "cuda", reason="runs on the CPU")
@pytest.mark.parametrize("instructions", RUNNABLE)
def test_tokens_that_drop_nothing_have_the_bits_they_have_alone(instructions, set_threads, monkeypatch):
    for module in (teal_fast.kernels.sparse_gemm, teal_fast.kernels.sparse_gemv):
        monkeypatch.setattr(module, "library", lambda: compiled(instructions))
    (x, _), weight, threshold = make(5, 577, torch.float32), PackedWeight(normal(577, 963)), torch.full((577,), -1.0)
    expected = torch.stack([sparse_gemv(row, weight, threshold) for row in x])
    for threads in (1, 2, 3):
        set_threads(threads)
        assert torch.equal(sparse_gemm(x, weight, threshold), expected)


@pytest.mark.parametrize("group", [None, 0, 64])
def test_opcheck(group):
    x, threshold = make(3, 100, torch.bfloat16)
    weight = PackedWeight(normal(100, 192).bfloat16()) if group is None else quantized(100, 192, group).weight
    torch.library.opcheck(torch.ops.teal.sparse_gemm, (x, *weight, threshold, None))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, w, t: (x[0], w, t), r"takes contiguous x \[M, K\] dtype, .* got x \[64\] float32"),
        (lambda x, w, t: (x, w, t[:-1]), r"threshold \[63\]"),
        (lambda x, w, t: (x.t().contiguous().t(), w, t), "x .* strided"),
        (lambda x, w, t: (x, w.bfloat16(), t), "takes a weight .* in torch.float32"),
        (lambda x, w, t: (x[:0], w, t), f"takes 1 to {MOST_TOKENS} tokens, got 0"),
        (lambda x, w, t: (x.repeat(9, 1), w, t), f"takes 1 to {MOST_TOKENS} tokens, got 18"),
    ],
)
def test_rejects_bad_input(change, said):
    (x, threshold), weight = make(2, 64, torch.float32), normal(64, 32)
    x, weight, threshold = change(x, weight, threshold)
    with pytest.raises(ValueError, match=said):
        sparse_gemm(x, PackedWeight(weight), threshold)
