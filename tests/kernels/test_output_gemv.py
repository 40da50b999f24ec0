import pytest
import torch

import teal_fast.kernels.output_gemv
from teal_fast.kernels.backend import triton
from teal_fast.kernels.native import library
from teal_fast.kernels.output_gemv import _output_gemv_cpu, _output_gemv_cuda, output_gemv, output_gemv_reference
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.kernels.compacted import DEVICE, normal, pairwise

# ragged both ways, more than a block of K, the demo model's width, one entry, less than a vector, many blocks
SIZES = [(37, 100), (5, 2100), (300, 576), (1, 64), (9, 7), (3, 8200)]
IMPLEMENTATIONS, DTYPES = ["triton", *RUNNABLE], [torch.float32, torch.float16, torch.bfloat16]
everywhere = pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
in_cpp = pytest.mark.parametrize("impl", RUNNABLE, indirect=True)


@pytest.fixture
def impl(request, monkeypatch):
    """An implementation by its name."""
    if request.param == "triton":
        return _output_gemv_cuda if triton else pytest.skip("no Triton here")
    if DEVICE == "cuda":
        pytest.skip("runs on the CPU")
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.output_gemv, "library", lambda: native)
    return _output_gemv_cpu


def make(V: int, K: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(V * 1000 + K)
    weight = torch.randint(-128, 128, (V, K), generator=generator).to(torch.int8)
    scale = (0.5 + torch.rand(V, generator=generator)) / 74
    return normal(K, dtype=dtype, seed=1), weight.to(DEVICE), scale.to(DEVICE)


def check(impl, x, weight, scale) -> None:
    """fp32 is off by the order of summation, C++ besides by x in fixed point: half a step, 1/32767 of the largest."""
    found, expected = impl(x, weight, scale), output_gemv_reference(x, weight, scale)
    assert found.shape == scale.shape and found.dtype == torch.float32
    fixed = impl is _output_gemv_cpu or (impl is output_gemv and DEVICE == "cpu" and library() is not None)
    off = 2**-22 * x.float().abs() + (x.float().abs().max() / 65534 if fixed else 0)
    assert ((found - expected).abs() <= (weight.float().abs() @ off) * scale).all()


@pytest.mark.parametrize("impl, size, dtype", pairwise(IMPLEMENTATIONS, SIZES, DTYPES), indirect=["impl"], ids=str)
def test_matches_reference(impl, size, dtype):
    x, weight, scale = make(*size, dtype)
    check(impl, x, weight, scale)
    assert output_gemv_reference(x, weight, scale).abs().max() > 1


@everywhere
def test_outliers_do_not_round_others_away(impl):
    x, weight, scale = make(37, 100, torch.float32)
    rounded = x.abs().max() / 65534
    x[0], x[40], x[41] = 5000, -1000, 3e4
    off = 2**-22 * x.abs() + rounded
    found, expected = impl(x, weight, scale), output_gemv_reference(x, weight, scale)
    assert ((found - expected).abs() <= (weight.float().abs() @ off) * scale).all()


def test_reference():
    x, weight, scale = make(37, 100, torch.float32)
    expected = (weight.double() * scale.double()[:, None]) @ x.double()
    torch.testing.assert_close(output_gemv_reference(x, weight, scale).double(), expected, rtol=0, atol=1e-4)


@everywhere
def test_the_largest_sums_fit(impl):
    K = 4100
    weight = torch.full((2, K), -128, dtype=torch.int8, device=DEVICE)
    weight[1] = 127
    check(impl, torch.ones(K, device=DEVICE), weight, torch.tensor([1.0, 0.01], device=DEVICE))


@everywhere
def test_small_numbers_beside_none_larger_count(impl):
    x, weight, scale = make(37, 100, torch.float32)
    check(impl, x * 1e-6, weight, scale)
    assert impl(torch.zeros_like(x), weight, scale).tolist() == [0] * 37


@pytest.mark.parametrize(
    "impl, place, dtype",
    pairwise(IMPLEMENTATIONS, [(0, torch.nan), (70, torch.inf), (99, -torch.inf)], DTYPES),  # 99: after whole vectors
    indirect=["impl"],
    ids=str,
)
def test_nan_and_inf_travel(impl, place, dtype):
    x, weight, scale = make(37, 100, dtype)
    x[place[0]] = place[1]
    assert not output_gemv_reference(x, weight, scale).isfinite().any()
    assert not impl(x, weight, scale).isfinite().any()


@everywhere
def test_nothing_of_the_vector_before_is_left(impl):
    x, weight, scale = make(37, 100, torch.float32)
    expected = impl(x, weight, scale)
    impl(torch.full_like(x, torch.nan), weight, scale)
    assert torch.equal(impl(x, weight, scale), expected)


@pytest.mark.parametrize("V, K", [(300, 576), (3, 8200)])
@in_cpp
def test_same_bits_for_any_number_of_threads(impl, V, K, set_threads):
    results = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        results.append(impl(*make(V, K, torch.bfloat16)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(DEVICE == "cuda", reason="runs on the CPU")
def test_a_type_without_cpp_falls_back():
    inputs = make(37, 100, torch.float64)
    assert torch.equal(output_gemv(*inputs), output_gemv_reference(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.teal.output_gemv, make(37, 100, dtype))
    check(output_gemv, *make(37, 100, dtype))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, w, s: (x[None], w, s), r"takes contiguous x \[K\] dtype, .* got x \[1, 100\] float32"),
        (lambda x, w, s: (x[:-1], w, s), r"x \[99\]"),
        (lambda x, w, s: (x, w, s[:-1]), r"scale \[36\]"),
        (lambda x, w, s: (x, w[0], s), r"weight \[100\]"),
        (lambda x, w, s: (x, w.float(), s), r"weight \[37, 100\] float32"),
        (lambda x, w, s: (x, w.view(torch.uint8), s), r"weight \[37, 100\] uint8"),
        (lambda x, w, s: (x, w, s.bfloat16()), r"scale \[37\] bfloat16"),
        (lambda x, w, s: (x.to(torch.int8), w, s), r"x \[100\] int8"),
        (lambda x, w, s: (x, w.t().contiguous().t(), s), "weight .* strided"),
        (lambda x, w, s: (x.repeat_interleave(2)[::2], w, s), "x .* strided"),
    ],
)
def test_rejects_bad_input(change, said):
    with pytest.raises(ValueError, match=said):
        output_gemv(*change(*make(37, 100, torch.float32)))
