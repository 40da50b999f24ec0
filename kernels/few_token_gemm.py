"""teal::few_token_gemm: up to 16 tokens times a weight of any format but blocks, in CUDA C++ from Hopper GPUs on.

x [M, K] in bf16 or fp16; the weight [K, N] is in x's dtype, or it and its scale [N] fp32 are as in quantized_gemm.py,
whose result it gives; bias [N] in x's dtype, or none; y [M, N] in x's dtype.

Weights are read once, at nearly the memory's speed (csrc/few_token_gemm.cu): to verify drafted tokens, and for short
prompts. A token has the same bits whatever tokens are computed beside it and however many: K and N alone decide the
order of its sums.
"""

import functools
import sys
from ctypes import Structure, c_int, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED, register
from teal_fast.kernels.checks import takes
from teal_fast.kernels.cuda_driver import CudaModule, TensorMap, launch_config, tensor_map
from teal_fast.kernels.native import pointer
from teal_fast.kernels.nvrtc import CudaError, compile_cuda
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, check_weight
from teal_fast.kernels.quantized_gemm import quantized_gemm

MOST_TOKENS = 16
TILE = 8  # tokens that a matrix instruction takes
ROWS, COLUMNS, WARPS = (
    64,
    256,
    16,
)  # channels of a block, outputs and multiplying warps of a CTA: as the source has them
BOX = 128  # bytes of a row that a tensor map brings at once
MOST_SPLITS = 6  # CTAs of a cluster
MEMORY = 120_000  # bytes of a CTA: so many that a multiprocessor has one, so few that small launches find room


class Maps(Structure):
    """`Maps` of the source."""

    _fields_ = [("weight", TensorMap), ("scales", TensorMap), ("x", TensorMap)]


class Product(Structure):
    """`Product` of the source."""

    _fields_ = [
        *((name, c_void_p) for name in ("scale", "bias", "y")),
        *((name, c_int) for name in ("M", "K", "N", "splits", "zero")),
    ]


def cut(K: int, N: int, processors: int) -> tuple[int, int]:
    """CTAs in all, and how many of them share K as a cluster. The number of tokens does not matter, so that it does not
    change the order of a sum.

    Clusters fill no more than seven eighths of a GPU, whose parts hold whole ones: of 7 an H200 has room for 15 only.
    """
    tiles = -(-N // COLUMNS)
    splits = max(1, min(MOST_SPLITS, -(-K // ROWS), processors * 7 // 8 // tiles))
    return tiles * splits, splits


def scale_bytes(bits: int, group: int) -> int:
    """Bytes of a row's scales that a CTA reads: its groups' in whole sixteens, which the first may not begin."""
    if bits != 4 or COLUMNS % group == 0:
        return 16 * (bits == 4)
    return -(-(2 * (COLUMNS // group + 2) + 14) // 16) * 16


def constants(bits: int, group: int, fp16: bool, tiles: int) -> dict[str, int]:
    """What the source is compiled for; tiles: of tokens."""
    scales = scale_bytes(bits, group)
    block = ROWS * (COLUMNS * bits // 8 + 2 * TILE * tiles + scales)
    stages = (MEMORY - 128 - 8 * COLUMNS * TILE * tiles) // (block + 16)
    found = {"BITS": bits, "GROUP": group, "SCALES": scales, "HALF_IS_FP16": fp16, "TILES": tiles, "STAGES": stages}
    return {name: int(value) for name, value in found.items()}


def maps(x: Tensor, weight: PackedWeight, tiles: int) -> Maps:
    """Where the kernel reads: a weight's values by bytes, the scales in its rows' ends, x."""
    (M, K), packed, N = x.shape, weight.packed, weight.N
    row, values = packed.stride(0) * packed.element_size(), N * weight.bits // 8  # bytes
    found = Maps(
        tensor_map(packed.data_ptr(), 1, values, K, row, (BOX, ROWS), swizzled=True),
        TensorMap(),
        tensor_map(x.data_ptr(), 2, K, M, 2 * K, (ROWS, TILE * tiles), swizzled=True),
    )
    if weight.bits == 4:
        box = scale_bytes(4, weight.group), ROWS
        found.scales = tensor_map(packed.data_ptr() + values, 1, row - values, K, row, box)
    return found


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(device: int, bits: int, group: int, fp16: bool, tiles: int):
    """The module, which must be kept, and its kernel; None without one."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return None
    try:
        module = CudaModule(
            compile_cuda("few_token_gemm.cu", f"sm_{major}{minor}", constants(bits, group, fp16, tiles))
        )
        return module, module.kernel("few_token_gemm", MEMORY)
    except CudaError as error:
        print(f"{error}: products of few tokens take other kernels, some times slower", file=sys.stderr)
        return None


def _few_token_gemm_cuda(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    (M, K), N, device = x.shape, weight.N, x.device.index
    tiles, found = -(-M // TILE), None
    if not INTERPRETED and x.element_size() == 2 and K % 8 == 0 and N % 16 == 0:
        found = _kernel(device, weight.bits, weight.group, x.dtype == torch.float16, tiles)
    if found is None and weight.scale is not None:
        return quantized_gemm(x, weight, bias)
    if found is None:
        return F.linear(x, weight.packed.t(), bias)
    module, kernel = found
    ctas, splits = cut(K, N, _processors(device))
    y = x.new_empty(M, N)
    product = Product(*map(pointer, (weight.scale, bias, y)), M, K, N, splits, 0)
    config = launch_config(ctas, 32 * (WARPS + 1), MEMORY, dependent=True, cluster=splits)
    module.launch(kernel, config, maps(x, weight, tiles), product)
    return y


_check = takes("few_token_gemm", f"x [M, K] dtype; {WEIGHT_TABLE}; bias [N] dtype or none", "N")
_few_token_gemm = register(
    "few_token_gemm",
    f"(Tensor x, {WEIGHT_ARGUMENTS}, Tensor? bias) -> Tensor",
    cuda=_few_token_gemm_cuda,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.N),
    bundle=lambda f: lambda x, *flat: f(x, PackedWeight(*flat[:3]), flat[3]),
)


def few_token_gemm(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y [M, N], as above. Raises ValueError on what does not fit."""
    _check(x, *weight[:2], bias, N=check_weight("few_token_gemm", weight, x.dtype))
    if not 0 < len(x) <= MOST_TOKENS:
        raise ValueError(f"few_token_gemm takes 1 to {MOST_TOKENS} tokens, got {len(x)}")
    return _few_token_gemm(x, *weight, bias)
