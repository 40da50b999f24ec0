"""teal::few_token_gemm: up to 16 tokens times a weight of any format but blocks, in CUDA C++ from Hopper GPUs on.

x [M, K] in bf16 or fp16; the weight [K, N] is in x's dtype, or it and its scale [N] fp32 are as in quantized_gemm.py,
whose result it gives; bias [N] in x's dtype, or none; y [M, N] in x's dtype.

Weights are read once, at nearly the memory's speed (csrc/few_token_gemm.cu): to verify drafted tokens, and for short
prompts. A token has the same bits whatever tokens are computed beside it and however many: K and N alone decide the
order of its sums.
"""

import functools
import sys
from ctypes import Structure, c_int, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import INTERPRETED, register
from teal_fast.kernels.checks import takes
from teal_fast.kernels.cuda_driver import CudaModule, launch_config
from teal_fast.kernels.native import pointer
from teal_fast.kernels.nvrtc import CudaError, compile_cuda
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, check_weight
from teal_fast.kernels.quantized_gemm import quantized_gemm

MOST_TOKENS = 16
TILE = 8  # tokens that a matrix instruction takes
ROWS, WARPS = 16, 8  # channels of an instruction, warps of a CTA: as the source has them
CTAS = 2  # a multiprocessor
MOST_SPLITS = 7  # CTAs of a cluster


class Weight(Structure):
    """`Weight` of the source."""

    _fields_ = [("packed", c_void_p), ("scale", c_void_p), ("row", c_int64), ("K", c_int), ("N", c_int)]


def cut(K: int, N: int, bits: int, tiles: int, processors: int) -> tuple[int, int, int]:
    """Columns of a CTA in words of four bytes a lane, CTAs that share K as a cluster, and CTAs in all.

    tiles: of tokens. It does not change how K is shared, which decides the bits of a sum. Clusters fill no more than
    seven eighths of a GPU, whose parts hold whole ones: of 132 multiprocessors 32 clusters of 7, not 48 of 5.
    """
    columns = {words: 8 * words * 32 // bits for words in (2, 4)}  # of a CTA
    places = processors * CTAS * 7 // 8
    words = 4 if -(-N // columns[4]) * MOST_SPLITS * 7 >= places * 6 else 2
    most = min(MOST_SPLITS, K // ROWS // WARPS // 2, places // -(-N // columns[words]))
    words, splits = 2 if tiles > 1 and bits == 4 else words, max(1, most)  # its sums need too many registers
    return words, splits, -(-N // columns[words]) * splits


def constants(bits: int, group: int, fp16: bool, tiles: int, words: int, splits: int) -> dict[str, int]:
    """What the source is compiled for."""
    names = ("BITS", "GROUP", "HALF_IS_FP16", "TILES", "WORDS", "SPLITS")
    return dict(zip(names, map(int, (bits, group, fp16, tiles, words, splits)), strict=True))


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(device: int, bits: int, group: int, fp16: bool, tiles: int, words: int, splits: int):
    """The module, which must be kept, its kernel, and the bytes of shared memory that it takes; None without one."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return None
    try:
        code = compile_cuda(
            "few_token_gemm.cu", f"sm_{major}{minor}", constants(bits, group, fp16, tiles, words, splits)
        )
        module = CudaModule(code)
        shared = module.size("shared_bytes")
        return module, module.kernel("few_token_gemm", shared), shared
    except CudaError as error:
        print(f"{error}: products of few tokens take other kernels, some times slower", file=sys.stderr)
        return None


def _few_token_gemm_cuda(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    (M, K), N, device = x.shape, weight.N, x.device.index
    tiles, found = -(-M // TILE), None
    if not INTERPRETED and x.element_size() == 2 and K % ROWS == 0 and N % ROWS == 0:
        words, splits, ctas = cut(K, N, weight.bits, tiles, _processors(device))
        found = _kernel(device, weight.bits, weight.group, x.dtype == torch.float16, tiles, words, splits)
    if found is None and weight.scale is not None:
        return quantized_gemm(x, weight, bias)
    if found is None:
        return F.linear(x, weight.packed.t(), bias)
    module, kernel, shared = found
    y, packed = x.new_empty(M, N), weight.packed
    operand = Weight(pointer(packed), pointer(weight.scale), packed.stride(0) * packed.element_size(), K, N)
    config = launch_config(ctas, 32 * WARPS, shared, dependent=True, cluster=splits)
    module.launch(kernel, config, pointer(x), operand, pointer(bias), pointer(y), c_int(M))
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
