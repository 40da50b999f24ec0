"""teal::compact_gemv: W times a vector given by its kept channels only, as unreduced partial sums.

The vector comes in slots, one for each program that made it: index [slots, width] int32 and value [slots, width] hold
count [slots] int32 kept channels each, from the left; one slot of width K is a plain list (kernels/norm_compact.py).
weight [K, N] row-major in value's dtype, or int8, or four-bit rows in groups of `group` (kernels/int4.py), the last two
with a scale [N] fp32. Returns partial [splits, N] fp32, whose sum over splits is y: the consumer adds up in its own
load, so that no launch, no atomic and no zeroing stands between, and the bits are the same always.
"""

import torch
from torch import Tensor

from kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, offset_type, tl, triton
from kernels.rows import add_rows, as_loaded, bits, check_rows, fetch_rows, outputs, settle, to_float, weigh_rows

# (K, N, bits a weight): splits, rows and columns a step, warps. From a sweep on an H200, 2026-11-24 (of bf16 that of
# benchmarks/kernels.py --tune); of the best, those with few splits: whoever adds up the partial sums reads them all,
# over 1 us a norm for 8 splits more.
TUNED = {
    (4096, 6144, 16): (8, 64, 64, 2),
    (4096, 12288, 16): (8, 64, 64, 2),
    (2048, 3072, 16): (8, 128, 64, 2),
    (14336, 4096, 8): (16, 64, 64, 2),
    (8192, 10240, 8): (4, 128, 64, 2),
    (8192, 8192, 8): (8, 64, 64, 2),
    (28672, 8192, 8): (8, 128, 128, 4),
    (14336, 4096, 4): (16, 128, 128, 4),
}
DEFAULTS = {32: (16, 64, 64, 2), 16: (16, 64, 64, 2), 8: (8, 128, 64, 2), 4: (16, 32, 128, 1)}


def config(K: int, N: int, form: int) -> tuple[int, int, int, int]:
    """Splits, rows and columns a step, and warps for a weight [K, N] of `form` bits."""
    return TUNED.get((K, N, form), DEFAULTS[form])


def compact_gemv_reference(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, scale: Tensor | None, group: int
) -> Tensor:
    """y [N] fp32, the sum over splits."""
    N = outputs(weight, scale)
    y = torch.zeros(N, device=weight.device)
    for k, x, kept in zip(index, value, count.tolist(), strict=True):
        y += x[:kept].float() @ to_float(weight[k[:kept].long()], N, group)
    return y if scale is None else y * scale


@jit
def _place(place, ends, gaps, base, SLOTTED: tl.constexpr):
    """Offsets in index and value of the `place`-th kept channels of the slots that end at `ends`."""
    if SLOTTED:
        # Slots along the first axis: a thread then sums up within itself instead of with its neighbours.
        passed = place[None, :] >= ends[:, None]
        return base + place + tl.sum(tl.where(passed, gaps[:, None], 0), axis=0)
    return place


@jit
def _compact_gemv_kernel(
    index_ptr, value_ptr, count_ptr, weight_ptr, scale_ptr, partial_ptr, N, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, SHARE: tl.constexpr, SHARE_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    SLOTTED: tl.constexpr = SLOTS > 1
    split = tl.program_id(1)
    slot = tl.arange(0, SHARE_BLOCK)
    gdc_wait(PDL)
    counts = tl.load(count_ptr + split * SHARE + slot, mask=(slot < SHARE) & (split * SHARE + slot < SLOTS), other=0)
    if SLOTTED:  # a split takes SHARE slots
        total = tl.sum(counts, axis=0)
        first = 0
        step: tl.constexpr = BLOCK_K
    else:  # the splits take turns at the one list
        total = tl.load(count_ptr)
        first = split * BLOCK_K
        step: tl.constexpr = SPLITS * BLOCK_K
    ends, gaps = tl.cumsum(counts, axis=0), WIDTH - counts
    base = split * SHARE * WIDTH
    limit = SLOTS * WIDTH
    place = first + tl.arange(0, BLOCK_K)
    at = _place(place, ends, gaps, base, SLOTTED)
    k = tl.load(index_ptr + at, mask=at < limit, other=0)
    x = tl.load(value_ptr + at, mask=at < limit, other=0.0)
    column = tl.program_id(0) * BLOCK_N
    STEPS: tl.constexpr = BLOCK_K // ROWS
    y = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    offset = tl.zeros((BLOCK_K, BLOCK_N // 32 if BITS == 4 else 1), dtype=tl.float32)
    if BITS <= 8:  # rows are fetched a step ahead, for which those of bf16 would take too many registers
        w, scale = fetch_rows(weight_ptr, k, place < total, column, N, N, BLOCK_N, BITS, GROUP, OFFSET)
        factor = tl.where(place < total, x.to(tl.float32), 0.0)
        place += step
        at = _place(place, ends, gaps, base, SLOTTED)
        k = tl.load(index_ptr + at, mask=at < limit, other=0)
        x = tl.load(value_ptr + at, mask=at < limit, other=0.0)
    for _ in tl.range(first, total, step, num_stages=1):
        next_w, next_scale = fetch_rows(weight_ptr, k, place < total, column, N, N, BLOCK_N, BITS, GROUP, OFFSET)
        next_factor = tl.where(place < total, x.to(tl.float32), 0.0)
        place += step  # the numbers of the rows after those are on their way, too
        at = _place(place, ends, gaps, base, SLOTTED)
        k = tl.load(index_ptr + at, mask=at < limit, other=0)
        x = tl.load(value_ptr + at, mask=at < limit, other=0.0)
        if BITS > 8:
            w, scale, factor = next_w, next_scale, next_factor
        product, off = weigh_rows(w, scale, factor, BITS)
        y = add_rows(y, product, STEPS)
        if BITS <= 8:
            offset += off
            w, scale, factor = next_w, next_scale, next_factor
    gdc_launch_dependents(PDL)
    n = column + tl.arange(0, BLOCK_N)
    sums = settle(tl.sum(y, axis=0), tl.sum(offset, axis=0), BITS)
    if BITS <= 8:
        sums *= tl.load(scale_ptr + n, mask=n < N, other=0.0)
    tl.store(partial_ptr + split.to(tl.int64) * N + n, sums, mask=n < N)


def _compact_gemv_cuda(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, scale: Tensor | None, group: int
) -> Tensor:
    partial = _compact_gemv_fake(index, value, count, weight, scale, group)
    (slots, width), (splits, N), form = index.shape, partial.shape, bits(weight)
    _, block_k, block_n, warps = config(len(weight), N, form)
    share = triton.cdiv(slots, splits)
    rows = min(block_k, warps * 32 * (128 // form) // block_n)  # that the threads cover at once, 16 bytes each
    weight = as_loaded(weight)
    _compact_gemv_kernel[(triton.cdiv(N, block_n), splits)](
        index, value, count, weight, scale, partial, N, slots, width, splits, share, triton.next_power_of_2(share),
        block_k, block_n, rows, form, group, offset_type(weight), num_warps=warps, **launch_options(weight),
    )  # fmt: skip
    return partial


def _compact_gemv_fake(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, scale: Tensor | None, group: int
) -> Tensor:
    N, slots = outputs(weight, scale), index.shape[0]
    splits = config(weight.shape[0], N, bits(weight))[0]
    return weight.new_empty(splits if slots == 1 else min(splits, slots), N, dtype=torch.float32)


torch.library.define(
    "teal::compact_gemv",
    "(Tensor index, Tensor value, Tensor count, Tensor weight, Tensor? scale, int group) -> Tensor",
)
torch.library.impl("teal::compact_gemv", "CUDA", _compact_gemv_cuda)
torch.library.register_fake("teal::compact_gemv", _compact_gemv_fake)


def compact_gemv(
    index: Tensor,
    value: Tensor,
    count: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    """Partial sums [splits, N], as above. Raises ValueError on what does not fit."""
    slots = count.shape[0]
    if index.ndim != 2 or index.shape != value.shape or index.shape[0] != slots or index.numel() < weight.shape[0]:
        shapes = [list(t.shape) for t in (index, value, count, weight)]
        raise ValueError(
            f"compact_gemv takes index and value [slots, width], count [slots], weight [K, N], got {shapes}"
        )
    check_rows("compact_gemv", value, weight, scale, group)
    if not all(t is None or t.is_contiguous() for t in (index, value, count, weight, scale)):
        raise ValueError("compact_gemv takes contiguous tensors, got a strided view")
    if index.dtype != torch.int32 or count.dtype != torch.int32:
        raise ValueError(f"compact_gemv takes int32 index and count, got {index.dtype}, {count.dtype}")
    return torch.ops.teal.compact_gemv(index, value, count, weight, scale, group)
