import pytest
import torch

from teal_fast.kernels.backend import triton
from teal_fast.kernels.quantized_gemm import _quantized_gemm_cuda, quantized_gemm, quantized_gemm_reference
from teal_fast.tests.kernels.compacted import DEVICE, normal
from teal_fast.tests.kernels.quantized import quantized

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
# Of sums of 100 to 600 products of size 1: rows' scales and the output are rounded to the type.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.16}
# few tokens and the most; one block and ragged ones each way; int8, then groups of each size
SIZES = [(1, 5, 64, 0), (12, 100, 208, 0), (128, 300, 48, 0), (2, 600, 64, 64), (12, 140, 1152, 64), (33, 65, 576, 192)]


def make(M, K, N, group, dtype):
    weight = quantized(K, N, group)
    return normal(M, K, dtype=dtype), weight.packed, weight.scale, normal(N, dtype=dtype, seed=1), group


@pytest.mark.parametrize("M, K, N, group", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_reference(dtype, M, K, N, group):
    inputs = make(M, K, N, group, dtype)
    found, expected = _quantized_gemm_cuda(*inputs), quantized_gemm_reference(*inputs)
    assert found.dtype == dtype and expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype] / 8, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("group", [0, 64])
def test_reference_is_the_product_of_what_the_rows_stand_for(group):
    weight, x = quantized(70, 128, group), normal(3, 70)
    found = quantized_gemm_reference(x, weight.packed, weight.scale, None, group)
    torch.testing.assert_close(found, x @ weight.dense(), rtol=0, atol=1e-4)


def test_without_bias():
    x, rows, scale, _, group = make(3, 40, 64, 0, torch.float32)
    found = _quantized_gemm_cuda(x, rows, scale, None, group)
    torch.testing.assert_close(found, quantized_gemm_reference(x, rows, scale, None, group), rtol=0, atol=1e-4)


def test_large_whole_numbers_do_not_overflow_fp16():
    rows = torch.full((4096, 16), 127, dtype=torch.int8, device=DEVICE)
    x, scale = torch.ones(2, 4096, dtype=torch.float16, device=DEVICE), torch.full((16,), 1 / 127, device=DEVICE)
    assert (_quantized_gemm_cuda(x, rows, scale, None, 0) == 4096).all()


def test_nan_stays_in_its_token():
    x, *rest = make(4, 40, 64, 64, torch.float32)
    x[2, 7] = torch.nan
    assert _quantized_gemm_cuda(x, *rest).isnan().all(1).tolist() == [False, False, True, False]


def test_fake_agrees():
    inputs = make(5, 40, 64, 64, torch.bfloat16)
    real = _quantized_gemm_cuda(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.quantized_gemm(*map(mode.from_tensor, inputs[:4]), inputs[4])
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, r, s, b: (x[:, :-1], r, s, b), "takes x of floats"),
        (lambda x, r, s, b: (x.repeat(50, 1), r, s, b), "1 to 128 tokens"),
        (lambda x, r, s, b: (x.int(), r, s, b), "takes x of floats"),
        (lambda x, r, s, b: (x, r, s[:-16], b), "takes rows"),
        (lambda x, r, s, b: (x, r, s, b[1:]), "takes bias"),
        (lambda x, r, s, b: (x, r, s, b.half()), "takes bias"),
        (lambda x, r, s, b: (x.t().contiguous().t(), r, s, b), "contiguous"),
    ],
)
def test_rejects_bad_input(change, said):
    with pytest.raises(ValueError, match=said):
        quantized_gemm(*change(*make(3, 40, 64, 0, torch.float32)[:4]))
