"""teal::compact_gemv: y = W x for a vector x given by its kept channels, by split-K with a semaphore.

x: kernels/compact_vector.py; weight [K, N]: kernels/packed.py, in x's dtype or quantized; y [N] fp32. The last program
of a tile of columns adds up what all have found in the order of the splits, so that the bits are always the same.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl, triton
from teal_fast.kernels.checks import takes
from teal_fast.kernels.compact_vector import VECTOR_ARGUMENTS, VECTOR_TABLE, CompactVector
from teal_fast.kernels.gather_gemv_loop import gather_gemv_loop
from teal_fast.kernels.launch_config import launch_config, pick_config
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, check_weight
from teal_fast.kernels.semaphore import check_semaphores, last_block

TUNED = {(14336, 4096, 16): (16, 64, 2, 1), (14336, 4096, 8): (28, 128, 1, 4)}  # H200, 2026-11-24
DEFAULTS = {32: (16, 32, 1, 2), 16: (16, 64, 1, 2), 8: (16, 64, 1, 2), 4: (28, 128, 1, 3)}


def compact_gemv_reference(x: CompactVector, weight: PackedWeight, semaphores: Tensor) -> Tensor:
    slots = zip(x.index, x.value, x.count.tolist(), strict=True)
    y = sum(value[:kept].float() @ weight.values(index[:kept].long()) for index, value, kept in slots)
    return y if weight.scale is None else y * weight.scale


@jit
def _compact_gemv_kernel(
    index_ptr, value_ptr, count_ptr, packed_ptr, scale_ptr, partial_ptr, y_ptr, semaphore_ptr, N: tl.constexpr,
    WHOLE: tl.constexpr, ROW: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr, SPLITS: tl.constexpr,
    SHARE: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    column, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    gdc_wait(PDL)
    sums = gather_gemv_loop(
        index_ptr, value_ptr, count_ptr, packed_ptr, split, column, N, N, WHOLE, ROW, SLOTS, SLOT, SPLITS, SHARE,
        LANES, BLOCK_N, DEPTH, BITS, GROUP, OFFSET,
    )  # fmt: skip
    gdc_launch_dependents(PDL)
    n = column + tl.arange(0, BLOCK_N)
    tl.store(partial_ptr + split * N + n, sums, mask=n < N)
    if last_block(semaphore_ptr + tl.program_id(0), SPLITS):
        part = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None]
        own = (part < SPLITS) & (n < N)[None, :]
        y = tl.sum(tl.load(partial_ptr + part * N + n[None, :], mask=own, other=0.0, cache_modifier=".cg"), axis=0)
        if BITS <= 8:
            y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)
        tl.store(y_ptr + n, y, mask=n < N)


def _compact_gemv_cuda(x: CompactVector, weight: PackedWeight, semaphores: Tensor) -> Tensor:
    launch, N = launch_config(x, weight, 1, pick_config(weight, TUNED, DEFAULTS)), weight.N
    y = weight.packed.new_empty(N, dtype=torch.float32)
    partial = y.new_empty(launch["SPLITS"], N)
    _compact_gemv_kernel[triton.cdiv(N, launch["BLOCK_N"]), launch["SPLITS"]](
        *x, weight.words, weight.scale, partial, y, semaphores, **launch, **launch_options(y)
    )
    return y


_check = takes("compact_gemv", f"{VECTOR_TABLE}; {WEIGHT_TABLE}", "N")
_compact_gemv = register(
    "compact_gemv",
    f"({VECTOR_ARGUMENTS}, {WEIGHT_ARGUMENTS}, Tensor(a!) semaphores) -> Tensor",
    cuda=_compact_gemv_cuda,
    fake=lambda x, weight, _: weight.packed.new_empty(weight.N, dtype=torch.float32),
    bundle=lambda f: lambda *flat: f(CompactVector(*flat[:3]), PackedWeight(*flat[3:6]), flat[6]),
)


def compact_gemv(x: CompactVector, weight: PackedWeight, semaphores: Tensor) -> Tensor:
    """y [N], as above. Raises ValueError on what does not fit."""
    _check(*x, *weight[:2], N=check_weight("compact_gemv", weight, x.value.dtype))
    if x.index.numel() < len(weight.packed):
        raise ValueError(f"compact_gemv takes slots for {len(weight.packed)} channels, got {list(x.index.shape)}")
    check_semaphores("compact_gemv", semaphores, weight.N)
    return _compact_gemv(*x, *weight, semaphores)
