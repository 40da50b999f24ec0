import pytest
import torch

import teal_fast.kernels.output_gemv
from teal_fast.kernels.backend import triton
from teal_fast.kernels.native import library
from teal_fast.kernels.output_gemv import _output_gemv_cpu, _output_gemv_cuda, output_gemv, output_gemv_reference
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.kernels.compacted import DEVICE, normal

# ragged both ways, more than a block of K, the demo model's width, one entry, less than a vector, many blocks
SIZES = [(37, 100), (5, 2100), (300, 576), (1, 64), (9, 7), (3, 8200)]
everywhere = pytest.mark.parametrize("impl", ["triton", *RUNNABLE, "op"], indirect=True)
in_cpp = pytest.mark.parametrize("impl", RUNNABLE, indirect=True)
in_every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture
def impl(request, monkeypatch):
    """An implementation by its name."""
    if request.param == "op":
        return output_gemv
    if request.param == "triton":
        return _output_gemv_cuda if triton else pytest.skip("no Triton here")
    if DEVICE == "cuda":
        pytest.skip("runs on the CPU")
    native = compiled(request.param)
    monkeypatch.setattr(teal_fast.kernels.output_gemv, "library", lambda: native)
    return _output_gemv_cpu


def make(V: int, K: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(V * 1000 + K)
    rows = torch.randint(-128, 128, (V, K), generator=generator).to(torch.int8)
    scale = (0.5 + torch.rand(V, generator=generator)) / 74
    return normal(K, dtype=dtype, seed=1), rows.to(DEVICE), scale.to(DEVICE)


def check(impl, x, rows, scale) -> None:
    """fp32 is off by the order of summation, C++ besides by x in fixed point: half a step, 1/32767 of the largest."""
    found, expected = impl(x, rows, scale), output_gemv_reference(x, rows, scale)
    assert found.shape == scale.shape and found.dtype == torch.float32
    fixed = impl is _output_gemv_cpu or (impl is output_gemv and DEVICE == "cpu" and library() is not None)
    off = 2**-22 * x.float().abs() + (x.float().abs().max() / 65534 if fixed else 0)
    assert ((found - expected).abs() <= (rows.float().abs() @ off) * scale).all()


@pytest.mark.parametrize("V, K", SIZES)
@in_every_type
@everywhere
def test_matches_reference(impl, dtype, V, K):
    x, rows, scale = make(V, K, dtype)
    check(impl, x, rows, scale)
    assert output_gemv_reference(x, rows, scale).abs().max() > 1


def test_reference():
    x, rows, scale = make(37, 100, torch.float32)
    expected = (rows.double() * scale.double()[:, None]) @ x.double()
    torch.testing.assert_close(output_gemv_reference(x, rows, scale).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("K", [2048, 4100])
@everywhere
def test_the_largest_sums_fit(impl, K):
    rows = torch.full((2, K), -128, dtype=torch.int8, device=DEVICE)
    rows[1] = 127
    check(impl, torch.ones(K, device=DEVICE), rows, torch.tensor([1.0, 0.01], device=DEVICE))


@everywhere
def test_small_numbers_beside_none_larger_count(impl):
    x, rows, scale = make(37, 100, torch.float32)
    check(impl, x * 1e-6, rows, scale)
    assert impl(torch.zeros_like(x), rows, scale).tolist() == [0] * 37


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 70, 99])  # in whole vectors and after them
@in_every_type
@everywhere
def test_nan_and_inf_travel(impl, dtype, place, value):
    x, rows, scale = make(37, 100, dtype)
    x[place] = value
    assert not output_gemv_reference(x, rows, scale).isfinite().any()
    assert not impl(x, rows, scale).isfinite().any()


@everywhere
def test_nothing_of_the_vector_before_is_left(impl):
    x, rows, scale = make(37, 100, torch.float32)
    expected = impl(x, rows, scale)
    impl(torch.full_like(x, torch.nan), rows, scale)
    assert torch.equal(impl(x, rows, scale), expected)


@pytest.mark.parametrize("V, K", SIZES)
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


@in_every_type
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.teal.output_gemv, make(37, 100, dtype))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, r, s: (x[None], r, s), "takes x"),
        (lambda x, r, s: (x[:-1], r, s), "takes x"),
        (lambda x, r, s: (x, r, s[:-1]), "takes x"),
        (lambda x, r, s: (x, r[0], s), "takes x"),
        (lambda x, r, s: (x, r.float(), s), "int8 rows"),
        (lambda x, r, s: (x, r.view(torch.uint8), s), "int8 rows"),
        (lambda x, r, s: (x, r, s.bfloat16()), "fp32 scale"),
        (lambda x, r, s: (x.to(torch.int8), r, s), "output_gemv takes"),
        (lambda x, r, s: (x, r.t().contiguous().t(), s), "contiguous"),
        (lambda x, r, s: (x.repeat_interleave(2)[::2], r, s), "contiguous"),
    ],
)
def test_rejects_bad_input(change, said):
    with pytest.raises(ValueError, match=said):
        output_gemv(*change(*make(37, 100, torch.float32)))
