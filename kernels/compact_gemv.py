"""teal::compact_gemv: W times a vector given by its kept channels only.

The vector comes in slots, one for each program that made it: index [slots, width] int32 and value [slots, width] hold
count [slots] int32 kept channels each, from the left; one slot of width K is a plain list (kernels/norm_compact.py).
weight [K, N] row-major in value's dtype, or int8, or four-bit rows in groups of `group` (kernels/int4.py) with scales
of at most 1 in size, the last two with a scale [N] fp32. Returns y [N] fp32.

Programs split rows, too; the last of a column adds up what each of them found, in the order of the splits, so that the
bits are the same always. arrived counts them: kernels/arrivals.py.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, tl, triton
from teal_fast.kernels.gather_gemv_loop import plan, walk
from teal_fast.kernels.rows import as_loaded, bits, check_rows, outputs, to_float
from teal_fast.kernels.semaphore import check_arrived, is_last

# (K, N, bits a weight): splits, columns a program, warps, depth (kernels/walk.py). From a sweep on an H200, 2026-11-24.
TUNED = {(14336, 4096, 16): (16, 64, 2, 1), (14336, 4096, 8): (28, 128, 1, 4)}
DEFAULTS = {32: (16, 32, 1, 2), 16: (16, 64, 1, 2), 8: (16, 64, 1, 2), 4: (28, 128, 1, 3)}


def config(K: int, N: int, form: int) -> tuple[int, int, int, int]:
    """Splits, columns a program, warps and depth for a weight [K, N] of `form` bits."""
    return TUNED.get((K, N, form), DEFAULTS[form])


def compact_gemv_reference(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, scale: Tensor | None, group: int, arrived: Tensor
) -> Tensor:
    N = outputs(weight, scale)
    y = torch.zeros(N, device=weight.device)
    for k, x, kept in zip(index, value, count.tolist(), strict=True):
        y += x[:kept].float() @ to_float(weight[k[:kept].long()], N, group)
    return y if scale is None else y * scale


@jit
def _compact_gemv_kernel(
    index_ptr, value_ptr, count_ptr, weight_ptr, scale_ptr, partial_ptr, y_ptr, arrived_ptr, N: tl.constexpr,
    WHOLE: tl.constexpr, ROW: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr, SPLITS: tl.constexpr,
    SHARE: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, LEVELS: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    column, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    gdc_wait(PDL)
    sums = walk(
        index_ptr, value_ptr, count_ptr, weight_ptr, split, column, N, N, WHOLE, ROW, SLOTS, SLOT, SPLITS, SHARE,
        LANES, BLOCK_N, DEPTH, BITS, GROUP, LEVELS, OFFSET,
    )  # fmt: skip
    gdc_launch_dependents(PDL)
    n = column + tl.arange(0, BLOCK_N)
    tl.store(partial_ptr + split * N + n, sums, mask=n < N)
    if is_last(arrived_ptr + tl.program_id(0), SPLITS):
        part = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None]
        own = (part < SPLITS) & (n < N)[None, :]
        y = tl.sum(tl.load(partial_ptr + part * N + n[None, :], mask=own, other=0.0, cache_modifier=".cg"), axis=0)
        if BITS <= 8:
            y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)
        tl.store(y_ptr + n, y, mask=n < N)


def _compact_gemv_cuda(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, scale: Tensor | None, group: int, arrived: Tensor
) -> Tensor:
    N = outputs(weight, scale)
    walked = plan(index, weight, N, 1, group, config(len(weight), N, bits(weight)))
    y = weight.new_empty(N, dtype=torch.float32)
    partial = y.new_empty(walked["SPLITS"], N)
    _compact_gemv_kernel[(triton.cdiv(N, walked["BLOCK_N"]), walked["SPLITS"])](
        index, value, count, as_loaded(weight), scale, partial, y, arrived, **walked, **launch_options(weight)
    )
    return y


def _compact_gemv_fake(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, scale: Tensor | None, group: int, arrived: Tensor
) -> Tensor:
    return weight.new_empty(outputs(weight, scale), dtype=torch.float32)


torch.library.define(
    "teal::compact_gemv",
    "(Tensor index, Tensor value, Tensor count, Tensor weight, Tensor? scale, int group, Tensor(a!) arrived) -> Tensor",
)
torch.library.impl("teal::compact_gemv", "CUDA", _compact_gemv_cuda)
torch.library.register_fake("teal::compact_gemv", _compact_gemv_fake)


def compact_gemv(
    index: Tensor,
    value: Tensor,
    count: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    group: int,
    arrived: Tensor,
) -> Tensor:
    """y [N], as above. Raises ValueError on what does not fit."""
    slots = count.shape[0]
    if index.ndim != 2 or index.shape != value.shape or index.shape[0] != slots or index.numel() < weight.shape[0]:
        shapes = [list(t.shape) for t in (index, value, count, weight)]
        raise ValueError(
            f"compact_gemv takes index and value [slots, width], count [slots], weight [K, N], got {shapes}"
        )
    N = check_rows("compact_gemv", value, weight, scale, group)
    if not all(t is None or t.is_contiguous() for t in (index, value, count, weight, scale)):
        raise ValueError("compact_gemv takes contiguous tensors, got a strided view")
    if index.dtype != torch.int32 or count.dtype != torch.int32:
        raise ValueError(f"compact_gemv takes int32 index and count, got {index.dtype}, {count.dtype}")
    check_arrived("compact_gemv", arrived, N)
    return torch.ops.teal.compact_gemv(index, value, count, weight, scale, group, arrived)
