"""What stands between a few tokens' products: residual add and norm, SiLU of gate times up, and the output layer."""

import pytest
import torch

from teal_fast.kernels.add_norm import add_norm, add_norm_reference
from teal_fast.kernels.backend import triton
from teal_fast.kernels.output_gemm import output_gemm, output_gemm_reference
from teal_fast.kernels.silu_mul import silu_mul, silu_mul_reference
from teal_fast.tests.kernels.compacted import DEVICE, normal

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [100, 256])
def test_add_norm(K, dtype):
    residual, update, weight = normal(8, K), normal(8, K, dtype=dtype, seed=1), normal(K, dtype=dtype, seed=2)
    for added in (update, None):
        found, expected = (f(residual, added, weight, 1e-5) for f in (add_norm, add_norm_reference))
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    alone = add_norm(residual[3:4], update[3:4], weight, 1e-5)
    assert torch.equal(alone[1][0], add_norm(residual, update, weight, 1e-5)[1][3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [100, 2048])
def test_silu_mul(N, dtype):
    x = normal(8, 2 * N, dtype=dtype) * 4
    torch.testing.assert_close(silu_mul(x), silu_mul_reference(x))


@pytest.mark.parametrize("format", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("V, K", [(500, 128), (64, 300)])
def test_output_gemm(V, K, format):
    x = normal(8, K, dtype=torch.float16 if format == "fp16" else torch.bfloat16)
    weight, scale = normal(V, K, dtype=x.dtype, seed=1), None
    if format == "int8":
        weight, scale = (weight * 40).clamp(-127, 127).to(torch.int8), normal(V, seed=2).abs() / 40
    found = output_gemm(x, weight, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, output_gemm_reference(x, weight, scale), rtol=1e-5, atol=1e-4)
    others = torch.cat((normal(5, K, dtype=x.dtype, seed=3), x[2:5]))
    assert torch.equal(output_gemm(others, weight, scale)[5:], found[2:5])


def test_bad_input_is_named():
    x = normal(17, 64, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"^output_gemm takes up to 16 tokens, .* got 17 tokens, weight torch.bfloat16$"
    ):
        output_gemm(x, x)
    with pytest.raises(ValueError, match=r"in int8, got 8 tokens, weight torch.float32$"):
        output_gemm(x[:8], x.float())
    with pytest.raises(ValueError, match=r"^silu_mul takes gate and up of one length, got 63 values$"):
        silu_mul(x[:, :63].contiguous())
    with pytest.raises(ValueError, match=r"^add_norm takes contiguous .* update \[7, 64\] bfloat16$"):
        add_norm(x[:8].float(), x[:7], x[0], 1e-5)
    assert x.device.type == DEVICE
