"""teal::quantized_gemm: a weight in int8 or four-bit groups times few tokens, on CUDA: for short prompts.

x [M, K] in fp32, bf16 or fp16; rows [K, N] int8, or uint8 [K, row_bytes] in groups of `group` (kernels/int4.py); scale
[N] fp32; bias [N] in x's dtype, or none. y [M, N] in x's dtype, accumulated in fp32. A tile of the weight becomes
floats of x's dtype on its way to the product: a short prompt is bound by reading weights and by launches, and widening
a weight first (kernels/widen.py) moves at least five times the bytes in one launch more.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED, has_large_shared_memory, jit, tl, triton
from teal_fast.kernels.rows import bits, check_bias, check_rows, load_rows, to_float

MOST_TOKENS = 128
SMALLEST_TILE = 16  # tokens that tl.dot wants at least
NARROW, WIDE = 32, 64  # columns a program, so that a weight of 4,096 outputs makes a program for each multiprocessor
BLOCK_K, STAGES = 128, 4  # what fits 227 KB of shared memory at 128 tokens; half of both fits 99 KB


def quantized_gemm_reference(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    y = x.float() @ to_float(rows, len(scale), group) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@jit
def _quantized_gemm_kernel(
    x_ptr, rows_ptr, scale_ptr, bias_ptr, y_ptr, M, K, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
        w = load_rows(rows_ptr, k, k < K, column, N, BLOCK_N, BITS, GROUP)
        y = tl.dot(x.to(dot_type), w.to(dot_type), y, input_precision="ieee")
    y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if BIASED:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def _quantized_gemm_cuda(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    y = _quantized_gemm_fake(x, rows, scale, bias, group)
    (M, K), N = x.shape, len(scale)
    block_m = max(SMALLEST_TILE, triton.next_power_of_2(M))
    block_n = NARROW if N <= 8192 else WIDE
    large = has_large_shared_memory(x.device.index)
    block_k, stages = (BLOCK_K, STAGES) if large else (BLOCK_K // 2, STAGES // 2)
    _quantized_gemm_kernel[(triton.cdiv(N, block_n),)](
        x, rows, scale, bias, y, M, K, N, block_m, block_n, block_k, bits(rows), group, bias is not None, INTERPRETED,
        num_warps=4 if block_m < 64 else 8, num_stages=stages if x.element_size() == 2 else stages // 2,
    )  # fmt: skip
    return y


def _quantized_gemm_fake(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


torch.library.define("teal::quantized_gemm", "(Tensor x, Tensor rows, Tensor scale, Tensor? bias, int group) -> Tensor")
torch.library.impl("teal::quantized_gemm", "CUDA", _quantized_gemm_cuda)
torch.library.register_fake("teal::quantized_gemm", _quantized_gemm_fake)


def quantized_gemm(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None = None, group: int = 0) -> Tensor:
    """y [M, N], as above. Raises ValueError on what does not fit."""
    N = check_rows("quantized_gemm", x, rows, scale, group)
    if x.ndim != 2 or x.shape[1] != len(rows) or not 0 < len(x) <= MOST_TOKENS or not x.is_floating_point():
        expected = f"floats [M, {len(rows)}] of 1 to {MOST_TOKENS} tokens"
        raise ValueError(f"quantized_gemm takes x of {expected}, got {list(x.shape)} {x.dtype}")
    check_bias("quantized_gemm", x, bias, N)
    if not all(tensor is None or tensor.is_contiguous() for tensor in (x, rows, scale, bias)):
        raise ValueError("quantized_gemm takes contiguous tensors, got a strided view")
    return torch.ops.teal.quantized_gemm(x, rows, scale, bias, group)
