"""teal::gate_up: SiLU(gate) ⊙ up of a vector given by its kept channels, compacted for the down projection.

index [1, K] int32, value [1, K] and count [1] int32 as kernels/norm_compact.py makes them; weight [K, 2 F] row-major in
value's dtype, gate columns first; threshold [F] fp32 for h = SiLU(gate) ⊙ up. Returns h in slots, one a program:
index [slots, width] int32, value [slots, width], count [slots] int32, the kept channels of each from the left.

A program owns the same columns of gate and up and walks the whole list, so that nothing is left to be reduced.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, offset_type, tl

# F: rows a step, channels of h a program (the slots' width), warps. benchmarks/kernels.py --tune, H200, 2026-11-24.
TUNED = {14336: (128, 64, 4), 11008: (128, 32, 4), 8192: (256, 64, 8)}
DEFAULT = (128, 64, 4)


def config(F: int) -> tuple[int, int, int]:
    """Rows a step, slot width and warps for h of F channels."""
    return TUNED.get(F, DEFAULT)


def gate_up_reference(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = slice(int(count))
    gate, up = (value[0, rows].float() @ weight[index[0, rows].long()].float()).chunk(2)
    h = (F.silu(gate) * up).to(value.dtype)
    out_index, out_value, out_count = _gate_up_fake(index, value, count, weight, threshold)
    width = out_index.shape[1]
    for slot, (part, limit) in enumerate(zip(h.split(width), threshold.split(width), strict=True)):
        kept = (part.abs() <= limit).logical_not().nonzero().squeeze(1)
        out_index[slot, : len(kept)], out_value[slot, : len(kept)] = slot * width + kept, part[kept]
        out_count[slot] = len(kept)
    return out_index, out_value, out_count


@jit
def _gate_up_kernel(
    index_ptr, value_ptr, count_ptr, weight_ptr, threshold_ptr, out_index_ptr, out_value_ptr, out_count_ptr, K, F,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    own = n < F
    limit = tl.load(threshold_ptr + n, mask=own, other=0.0)
    gdc_wait(PDL)
    place = tl.arange(0, BLOCK_K)
    k = tl.load(index_ptr + place, mask=place < K, other=0)
    x = tl.load(value_ptr + place, mask=place < K, other=0.0)
    count = tl.load(count_ptr)
    gate = tl.zeros((BLOCK_K, WIDTH), dtype=tl.float32)
    up = tl.zeros((BLOCK_K, WIDTH), dtype=tl.float32)
    for _ in tl.range(0, count, BLOCK_K, num_stages=1):
        inside = place < count
        row = weight_ptr + (tl.where(inside, k, 0).to(OFFSET)[:, None] * (2 * F) + n[None, :])
        mask = inside[:, None] & own[None, :]
        w = tl.load(row, mask=mask, other=0.0)
        u = tl.load(row + F, mask=mask, other=0.0)
        scale = tl.where(inside, x.to(tl.float32), 0.0)[:, None]
        place += BLOCK_K  # the next rows' numbers are on their way while these rows are
        k = tl.load(index_ptr + place, mask=place < K, other=0)
        x = tl.load(value_ptr + place, mask=place < K, other=0.0)
        gate += w.to(tl.float32) * scale
        up += u.to(tl.float32) * scale
    gdc_launch_dependents(PDL)
    g, u = tl.sum(gate, axis=0), tl.sum(up, axis=0)
    h = (g / (1 + tl.exp(-g)) * u).to(value_ptr.dtype.element_ty)
    kept = ((tl.abs(h.to(tl.float32)) <= limit) == 0) & own
    place = tl.program_id(0) * WIDTH + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(out_index_ptr + place, n, mask=kept)
    tl.store(out_value_ptr + place, h, mask=kept)
    tl.store(out_count_ptr + tl.program_id(0), tl.sum(kept.to(tl.int32), axis=0))


def _gate_up_cuda(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out_index, out_value, out_count = _gate_up_fake(index, value, count, weight, threshold)
    block_k, width, warps = config(threshold.shape[0])
    _gate_up_kernel[(out_count.shape[0],)](
        index, value, count, weight, threshold, out_index, out_value, out_count, weight.shape[0], threshold.shape[0],
        block_k, width, offset_type(weight), num_warps=warps, **launch_options(weight),
    )  # fmt: skip
    return out_index, out_value, out_count


def _gate_up_fake(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    width = config(threshold.shape[0])[1]
    slots = -(-threshold.shape[0] // width)
    return index.new_empty(slots, width), value.new_empty(slots, width), count.new_empty(slots)


torch.library.define(
    "teal::gate_up",
    "(Tensor index, Tensor value, Tensor count, Tensor weight, Tensor threshold) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("teal::gate_up", "CUDA", _gate_up_cuda)
torch.library.register_fake("teal::gate_up", _gate_up_fake)


def gate_up(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Index, value and count of h, as above. Raises ValueError on what does not fit."""
    K, width = weight.shape
    fits = index.shape == value.shape == (1, K) and count.shape == (1,) and threshold.shape == (width // 2,)
    if not fits or width % 2 or not weight.is_contiguous():
        shapes = [list(t.shape) for t in (index, value, count, weight, threshold)]
        raise ValueError(f"gate_up takes index, value [1, K], count [1], weight [K, 2 F], threshold [F], got {shapes}")
    if (
        value.dtype != weight.dtype
        or threshold.dtype != torch.float32
        or index.dtype != torch.int32
        or count.dtype != torch.int32
    ):
        raise ValueError(
            f"gate_up takes int32 index and count, one dtype, fp32 threshold, got {value.dtype}, {weight.dtype}"
        )
    return torch.ops.teal.gate_up(index, value, count, weight, threshold)
