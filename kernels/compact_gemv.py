"""teal::compact_gemv: W times a vector given by its kept channels only, as unreduced partial sums.

The vector comes in slots, one for each program that made it: index [slots, width] int32 and value [slots, width] hold
count [slots] int32 kept channels each, from the left; one slot of width K is a plain list (kernels/norm_compact.py).
weight [K, N] row-major in value's dtype. Returns partial [splits, N] fp32, whose sum over splits is y: the consumer
adds up in its own load, so that no launch, no atomic and no zeroing stands between, and the bits are the same always.
"""

import torch
from torch import Tensor

from kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, offset_type, tl, triton

# (K, N): splits, rows and columns a step, warps. From benchmarks/kernels.py --tune on an H200, 2026-11-24; of the best,
# those with few splits: whoever adds up the partial sums reads them all, over 1 us a norm for 8 splits more.
TUNED = {
    (4096, 6144): (8, 64, 64, 2),
    (4096, 12288): (8, 64, 64, 2),
    (2048, 3072): (8, 128, 64, 2),
}
DEFAULT = (16, 64, 64, 2)


def compact_gemv_reference(index: Tensor, value: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    """y [N] fp32, the sum over splits."""
    y = torch.zeros(weight.shape[1], device=weight.device)
    for k, x, kept in zip(index, value, count.tolist(), strict=True):
        y += x[:kept].float() @ weight[k[:kept].long()].float()
    return y


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
    index_ptr, value_ptr, count_ptr, weight_ptr, partial_ptr, K, N, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, SHARE: tl.constexpr, SHARE_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    SLOTTED: tl.constexpr = SLOTS > 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    y = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for _ in tl.range(first, total, step, num_stages=1):
        inside = place < total
        row = weight_ptr + (tl.where(inside, k, 0).to(OFFSET)[:, None] * N + n[None, :])
        w = tl.load(row, mask=inside[:, None] & (n < N)[None, :], other=0.0, eviction_policy="evict_first")
        scale = tl.where(inside, x.to(tl.float32), 0.0)
        place += step  # the next rows' numbers are on their way while these rows are
        at = _place(place, ends, gaps, base, SLOTTED)
        k = tl.load(index_ptr + at, mask=at < limit, other=0)
        x = tl.load(value_ptr + at, mask=at < limit, other=0.0)
        product = w.to(tl.float32) * scale[:, None]
        y += tl.sum(tl.reshape(product, (BLOCK_K // ROWS, ROWS, BLOCK_N)), axis=0)  # within a thread
    gdc_launch_dependents(PDL)
    tl.store(partial_ptr + split.to(tl.int64) * N + n, tl.sum(y, axis=0), mask=n < N)


def _splits(weight: Tensor, slots: int) -> int:
    splits = TUNED.get(tuple(weight.shape), DEFAULT)[0]
    return splits if slots == 1 else min(splits, slots)


def _compact_gemv_cuda(index: Tensor, value: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    partial = _compact_gemv_fake(index, value, count, weight)
    (slots, width), (K, N), splits = index.shape, weight.shape, partial.shape[0]
    _, block_k, block_n, warps = TUNED.get((K, N), DEFAULT)
    share = triton.cdiv(slots, splits)
    rows = min(block_k, warps * 32 * 8 // block_n)  # rows that the threads cover at once, 8 columns each
    _compact_gemv_kernel[(triton.cdiv(N, block_n), splits)](
        index, value, count, weight, partial, K, N, slots, width, splits, share, triton.next_power_of_2(share),
        block_k, block_n, rows, offset_type(weight), num_warps=warps, **launch_options(weight),
    )  # fmt: skip
    return partial


def _compact_gemv_fake(index: Tensor, value: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(_splits(weight, index.shape[0]), weight.shape[1], dtype=torch.float32)


torch.library.define("teal::compact_gemv", "(Tensor index, Tensor value, Tensor count, Tensor weight) -> Tensor")
torch.library.impl("teal::compact_gemv", "CUDA", _compact_gemv_cuda)
torch.library.register_fake("teal::compact_gemv", _compact_gemv_fake)


def compact_gemv(index: Tensor, value: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    """Partial sums [splits, N], as above. Raises ValueError on what does not fit."""
    slots = count.shape[0]
    if index.ndim != 2 or index.shape != value.shape or index.shape[0] != slots or index.numel() < weight.shape[0]:
        shapes = [list(t.shape) for t in (index, value, count, weight)]
        raise ValueError(
            f"compact_gemv takes index and value [slots, width], count [slots], weight [K, N], got {shapes}"
        )
    if not all(t.is_contiguous() for t in (index, value, count, weight)):
        raise ValueError("compact_gemv takes contiguous tensors, got a strided view")
    if value.dtype != weight.dtype or index.dtype != torch.int32 or count.dtype != torch.int32:
        raise ValueError(f"compact_gemv takes int32 index and count, one dtype, got {value.dtype}, {weight.dtype}")
    return torch.ops.teal.compact_gemv(index, value, count, weight)
