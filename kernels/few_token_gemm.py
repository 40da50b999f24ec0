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
# As the source has them: channels of a block, outputs of a CTA, its threads (16 warps multiply, one copies).
ROWS, COLUMNS, THREADS = 64, 256, 17 * 32
BOX = 128  # bytes of a row that a tensor map brings at once
MOST_SPLITS = 6  # CTAs of a cluster, as the source has it: of 7 an H200 has room for 15 clusters only
MEMORY = 120_000  # bytes of a CTA: so many that a multiprocessor has one, so few that small launches find room


class Maps(Structure):
    """`Maps` of the source."""

    _fields_ = [("weight", TensorMap), ("scales", TensorMap), ("x", TensorMap)]


class Product(Structure):
    """`Product` of the source; zero: 0."""

    _fields_ = [
        *((name, c_void_p) for name in ("scale", "bias", "y")),
        *((name, c_int) for name in ("M", "K", "N", "splits", "zero")),
    ]


def cut(K: int, N: int, processors: int) -> tuple[int, int]:
    """CTAs in all, and how many of them share K as a cluster. Neither depends on the number of tokens, which so does
    not change the order of a sum.

    Clusters fill no more than seven eighths of a GPU, since each lies within one of its parts, whose rest stays idle.
    """
    tiles = -(-N // COLUMNS)
    splits = max(1, min(MOST_SPLITS, -(-K // ROWS), processors * 7 // 8 // tiles))
    return tiles * splits, splits


def scale_bytes(group: int) -> int:
    """Bytes of a four-bit row's scales that a CTA reads: whole sixteens with those of all groups it has outputs of."""
    if COLUMNS % group == 0:
        return 16  # up to 4 scales, which no boundary of sixteens parts
    return -(-(2 * (COLUMNS // group + 2) + 14) // 16) * 16  # the first may lie 14 bytes within a sixteen


def constants(bits: int, group: int, fp16: bool, tiles: int) -> dict[str, int]:
    """What the source is compiled for; tiles: of tokens."""
    scales = scale_bytes(group) if bits == 4 else 0
    block = ROWS * (COLUMNS * bits // 8 + 2 * TILE * tiles + scales)
    sums = 2 * 4 * COLUMNS * TILE * tiles  # fp32, for each half of a block's channels
    stages = (MEMORY - 128 - sums) // (block + 16)  # two barriers a stage, whose room is rounded up to 128 bytes
    found = {"BITS": bits, "GROUP": group, "SCALES": scales, "HALF_IS_FP16": int(fp16)}
    return found | {"TILES": tiles, "STAGES": stages}


def maps(x: Tensor, weight: PackedWeight, tiles: int) -> Maps:
    """Where the kernel reads: a weight's values by bytes, the scales at its rows' ends, x."""
    (M, K), packed, N = x.shape, weight.packed, weight.N
    row, values = packed.stride(0) * packed.element_size(), N * weight.bits // 8  # bytes
    found = Maps(
        tensor_map(packed.data_ptr(), 1, values, K, row, (BOX, ROWS), swizzled=True),
        TensorMap(),
        tensor_map(x.data_ptr(), 2, K, M, 2 * K, (ROWS, TILE * tiles), swizzled=True),
    )
    if weight.bits == 4:
        box = scale_bytes(weight.group), ROWS
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
    config = launch_config(ctas, THREADS, MEMORY, dependent=True, cluster=splits)
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
