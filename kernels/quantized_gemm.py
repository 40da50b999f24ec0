"""teal::quantized_gemm: few tokens times a weight in int8 or four-bit groups, on CUDA: for short prompts.

x [M, K] in fp32, bf16 or fp16; weight [K, N] in int8, or in four-bit groups of `group` (kernels/int4.py), with its
scale [N] fp32; bias [N] in x's dtype, or none. y [M, N] in x's dtype, accumulated in fp32.

A weight-only quantized GEMM: a tile of the weight becomes floats of x's dtype on its way to the product. A short prompt
is bound by reading weights and by launches; to dequantize the weight first (kernels/dequantize.py) moves at least five
times the bytes in one launch more.
"""

from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED, has_large_shared_memory, jit, register, tl, triton
from teal_fast.kernels.checks import takes
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, check_weight, load_rows

MOST_TOKENS = 128
SMALLEST_TILE = 16  # tokens that tl.dot wants at least
NARROW, WIDE = 32, 64  # columns a program, so that a weight of 4,096 outputs makes a program for each multiprocessor
BLOCK_K, STAGES = 128, 4  # what fits 227 KB of shared memory at 128 tokens; half of both fits 99 KB


def quantized_gemm_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    y = x.float() @ weight.values() * weight.scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@jit
def _quantized_gemm_kernel(
    x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, M, K, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BIASED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    dot_type = tl.float32 if UPCAST else x_ptr.dtype.element_ty  # Triton's interpreter cannot multiply bf16
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in tl.range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w = load_rows(packed_ptr, k, k < K, column, N, BLOCK_N, BITS, GROUP)
        y = tl.dot(x.to(dot_type), w.to(dot_type), y, input_precision="ieee")
    y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if BIASED:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def _quantized_gemm_cuda(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    (M, K), N = x.shape, weight.N
    y = x.new_empty(M, N)
    block_m = max(SMALLEST_TILE, triton.next_power_of_2(M))
    block_n = NARROW if N <= 8192 else WIDE
    large = has_large_shared_memory(x.device.index)
    block_k, stages = (BLOCK_K, STAGES) if large else (BLOCK_K // 2, STAGES // 2)
    _quantized_gemm_kernel[(triton.cdiv(N, block_n),)](
        x, weight.packed, weight.scale, bias, y, M, K, N, block_m, block_n, block_k, weight.bits, weight.group,
        bias is not None, INTERPRETED,
        num_warps=4 if block_m < 64 else 8, num_stages=stages if x.element_size() == 2 else stages // 2,
    )  # fmt: skip
    return y


_check = takes("quantized_gemm", f"x [M, K] dtype; {WEIGHT_TABLE}; bias [N] dtype or none", "N")
_quantized_gemm = register(
    "quantized_gemm",
    f"(Tensor x, {WEIGHT_ARGUMENTS}, Tensor? bias) -> Tensor",
    cuda=_quantized_gemm_cuda,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.N),
    bundle=lambda f: lambda x, *flat: f(x, PackedWeight(*flat[:3]), flat[3]),
)


def quantized_gemm(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y [M, N], as above. Raises ValueError on what does not fit."""
    _check(x, *weight[:2], bias, N=check_weight("quantized_gemm", weight, None))
    if not 0 < len(x) <= MOST_TOKENS:
        raise ValueError(f"quantized_gemm takes 1 to {MOST_TOKENS} tokens, got {len(x)}")
    return _quantized_gemm(x, *weight, bias)
