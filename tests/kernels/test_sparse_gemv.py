import pytest
import torch

from kernels.backend import triton
from kernels.sparse_gemv import _sparse_gemv_cpu, _sparse_gemv_cuda, sparse_gemv, sparse_gemv_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Against the fp32 reference, for sums of up to ~600 terms of size 1: fp32 differs by the order of summation; in half
# precision the last bit of results up to 128 is 0.06 (fp16) and 0.5 (bf16), and the CPU path rounds four partial sums.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.13, torch.bfloat16: 1.0}
IMPLEMENTATIONS = [
    pytest.param(_sparse_gemv_cuda, marks=pytest.mark.skipif(triton is None, reason="no Triton here"), id="triton"),
    pytest.param(_sparse_gemv_cpu, marks=pytest.mark.skipif(DEVICE == "cuda", reason="runs on the CPU"), id="cpu"),
    pytest.param(sparse_gemv, id="op"),
]
everywhere = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def make(K: int, N: int, dtype: torch.dtype, quantile: float = 0.5):
    generator = torch.Generator().manual_seed(K * 1000 + N)
    x = torch.randn(K, generator=generator)
    weight = torch.randn(K, N, generator=generator)
    threshold = torch.full((K,), x.abs().quantile(quantile).item())
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), threshold.to(DEVICE)


# exact tiles, ragged both ways, one output, one input, the demo model's down projection
@pytest.mark.parametrize("K, N", [(64, 128), (100, 300), (65, 1), (1, 130), (576, 960)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@everywhere
def test_matches_reference(impl, dtype, K, N):
    x, weight, threshold = make(K, N, dtype)
    expected = sparse_gemv_reference(x, weight, threshold)
    torch.testing.assert_close(impl(x, weight, threshold), expected, rtol=0, atol=TOLERANCE[dtype])
    assert not torch.equal(expected, (x.float() @ weight.float()).to(dtype)) or K == 1  # the threshold matters


@everywhere
def test_threshold_per_channel(impl):
    x, weight, _ = make(100, 70, torch.float32)
    threshold = torch.linspace(0, 2, 100, device=DEVICE)
    torch.testing.assert_close(
        impl(x, weight, threshold), sparse_gemv_reference(x, weight, threshold), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@everywhere
def test_bias(impl, dtype):
    x, weight, threshold = make(100, 70, dtype)
    bias = torch.linspace(-20, 20, 70, device=DEVICE, dtype=dtype)
    expected = sparse_gemv_reference(x, weight, threshold) + bias
    torch.testing.assert_close(impl(x, weight, threshold, bias), expected, rtol=0, atol=TOLERANCE[dtype])


@everywhere
def test_value_on_the_threshold_is_dropped(impl):
    x = torch.tensor([0.5, -0.5, 0.5, -2.0], device=DEVICE)
    weight = torch.eye(4, device=DEVICE)
    threshold = torch.tensor([0.5, 0.5, 0.25, 0.5], device=DEVICE)
    assert impl(x, weight, threshold).tolist() == [0, 0, 0.5, -2.0]


@everywhere
def test_nothing_kept_and_all_kept(impl):
    x, weight, _ = make(100, 70, torch.float32)
    x[3] = 0
    assert impl(x, weight, torch.full((100,), 100.0, device=DEVICE)).tolist() == [0] * 70
    everything = impl(x, weight, torch.full((100,), -1.0, device=DEVICE))
    torch.testing.assert_close(everything, x @ weight, rtol=0, atol=1e-4)


@everywhere
def test_dropped_rows_are_not_read(impl):
    x, weight, threshold = make(100, 70, torch.float32)
    weight[x.abs() <= threshold] = torch.nan
    assert impl(x, weight, threshold).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@everywhere
def test_nan_and_inf_travel_as_in_a_dense_layer(impl, value):
    x, weight, threshold = make(64, 40, torch.float32)
    x[5] = value
    dense = torch.where(x.abs() <= threshold, 0, x) @ weight
    torch.testing.assert_close(impl(x, weight, threshold), dense, rtol=0, atol=1e-4, equal_nan=True)


@everywhere
def test_same_bits_every_time(impl):
    x, weight, threshold = make(576, 300, torch.bfloat16)
    first = impl(x, weight, threshold)
    assert all(torch.equal(impl(x, weight, threshold), first) for _ in range(5))


def test_same_bits_for_any_number_of_threads():
    x, weight, threshold = (tensor.cpu() for tensor in make(576, 960, torch.float32))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(_sparse_gemv_cpu(x, weight, threshold))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck():
    torch.library.opcheck(torch.ops.teal.sparse_gemv, make(100, 70, torch.float32))


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
    ],
)
def test_rejects_bad_input(change, said):
    with pytest.raises(ValueError, match=said):
        sparse_gemv(*change(*make(64, 32, torch.float32)))
