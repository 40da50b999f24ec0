import pytest
import torch
from torch.utils import _pytree as pytree

from teal_fast.kernels.backend import triton
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.quantized_gemm import _quantized_gemm_cuda, quantized_gemm, quantized_gemm_reference
from teal_fast.tests.kernels.compacted import DEVICE, normal
from teal_fast.tests.kernels.quantized import quantized

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
# Of sums of 100 to 600 products of size 1: rows' scales and the output are rounded to the type.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.16}
# few tokens and the most; one block and ragged ones each way; int8, then groups of each size; each dtype
CASES = [
    (1, 5, 64, 0, torch.float32),
    (12, 100, 208, 0, torch.bfloat16),
    (128, 300, 48, 0, torch.float16),
    (2, 300, 64, 64, torch.float16),
    (12, 70, 1152, 64, torch.float32),
    (33, 65, 576, 192, torch.bfloat16),
]


def make(M, K, N, group, dtype):
    weight = quantized(K, N, group)
    return normal(M, K, dtype=dtype), weight.weight, normal(N, dtype=dtype, seed=1)


@pytest.mark.parametrize("M, K, N, group, dtype", CASES)
def test_matches_reference(M, K, N, group, dtype):
    inputs = make(M, K, N, group, dtype)
    found, expected = _quantized_gemm_cuda(*inputs), quantized_gemm_reference(*inputs)
    assert found.dtype == dtype and expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype] / 8, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("group", [0, 64])
def test_reference_is_the_product_of_what_the_rows_stand_for(group):
    weight, x = quantized(70, 128, group), normal(3, 70)
    found = quantized_gemm_reference(x, weight.weight)
    torch.testing.assert_close(found, x @ weight.dense(), rtol=0, atol=1e-4)


def test_without_bias():
    x, weight, _ = make(3, 40, 64, 0, torch.float32)
    found, expected = _quantized_gemm_cuda(x, weight), quantized_gemm_reference(x, weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_large_whole_numbers_do_not_overflow_fp16():
    packed = torch.full((4096, 16), 127, dtype=torch.int8, device=DEVICE)
    x, scale = torch.ones(2, 4096, dtype=torch.float16, device=DEVICE), torch.full((16,), 1 / 127, device=DEVICE)
    assert (_quantized_gemm_cuda(x, PackedWeight(packed, scale)) == 4096).all()


def test_nan_stays_in_its_token():
    x, *rest = make(4, 40, 64, 64, torch.float32)
    x[2, 7] = torch.nan
    assert _quantized_gemm_cuda(x, *rest).isnan().all(1).tolist() == [False, False, True, False]


def test_fake_agrees():
    x, weight, bias = make(5, 40, 64, 64, torch.bfloat16)
    real = _quantized_gemm_cuda(x, weight, bias)
    with torch._subclasses.FakeTensorMode() as mode:
        inputs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (x, *weight, bias))
        fake = torch.ops.teal.quantized_gemm(*inputs)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, w, b: (x[:, :-1].contiguous(), w, b), r"quantized_gemm takes contiguous x \[M, K\] .* x \[3, 39\]"),
        (lambda x, w, b: (x.repeat(50, 1), w, b), "1 to 128 tokens, got 150"),
        (lambda x, w, b: (x.int(), w, b), r"x \[3, 40\] int32"),
        (lambda x, w, b: (x, w._replace(scale=w.scale[:-16]), b), "takes a weight"),
        (lambda x, w, b: (x, PackedWeight(x.new_ones(40, 64)), b), "takes a weight .* in int8 .* no scale"),
        (lambda x, w, b: (x, w, b[1:]), r"bias \[63\]"),
        (lambda x, w, b: (x, w, b.half()), r"bias \[64\] float16"),
        (lambda x, w, b: (x.t().contiguous().t(), w, b), "x .* strided"),
    ],
)
def test_rejects_bad_input(change, said):
    with pytest.raises(ValueError, match=said):
        quantized_gemm(*change(*make(3, 40, 64, 0, torch.float32)))
