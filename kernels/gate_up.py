"""teal::gate_up: SiLU(gate) ⊙ up of a vector given by its kept channels, compacted for the down projection.

index [1, K] int32, value [1, K] and count [1] int32 as kernels/norm_compact.py makes them; weight [K, 2 F], gate
columns first, in any form that kernels/compact_gemv.py takes, with its scale [2 F]; threshold [F] fp32 for h =
SiLU(gate) ⊙ up. Returns h in slots, one a program: index [slots, width] int32, value [slots, width], count [slots]
int32, the kept channels of each from the left.

Programs have the same columns of gate or of up and a share of the rows; the last of a slot adds up and compacts, as in
kernels/compact_gemv.py, whose `arrived` this is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, tl, triton
from teal_fast.kernels.gather_gemv_loop import block_columns, plan, walk
from teal_fast.kernels.rows import as_loaded, bits, check_rows, to_float
from teal_fast.kernels.semaphore import check_arrived, is_last

# (F, bits a weight): splits, channels of h a program (the slots' width), warps, depth (kernels/walk.py). From a sweep
# on an H200, 2026-11-24.
TUNED: dict[tuple[int, int], tuple[int, int, int, int]] = {}
DEFAULTS = {32: (8, 32, 1, 1), 16: (8, 64, 1, 1), 8: (8, 128, 1, 2), 4: (12, 256, 1, 2)}


def config(F: int, form: int) -> tuple[int, int, int, int]:
    """Splits, slot width, warps and depth for h of F channels and weights of `form` bits."""
    return TUNED.get((F, form), DEFAULTS[form])


def gate_up_reference(
    index: Tensor,
    value: Tensor,
    count: Tensor,
    weight: Tensor,
    threshold: Tensor,
    scale: Tensor | None,
    group: int,
    arrived: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = slice(int(count))
    both = value[0, rows].float() @ to_float(weight[index[0, rows].long()], 2 * len(threshold), group)
    gate, up = (both if scale is None else both * scale).chunk(2)
    h = (F.silu(gate) * up).to(value.dtype)
    out_index, out_value, out_count = _gate_up_fake(index, value, count, weight, threshold, scale, group, arrived)
    width = out_index.shape[1]
    for slot, (part, limit) in enumerate(zip(h.split(width), threshold.split(width), strict=True)):
        kept = (part.abs() <= limit).logical_not().nonzero().squeeze(1)
        out_index[slot, : len(kept)], out_value[slot, : len(kept)] = slot * width + kept, part[kept]
        out_count[slot] = len(kept)
    return out_index, out_value, out_count


@jit
def _gate_up_kernel(
    index_ptr, value_ptr, count_ptr, weight_ptr, threshold_ptr, scale_ptr, out_index_ptr, out_value_ptr, out_count_ptr,
    partial_ptr, arrived_ptr, N: tl.constexpr, WHOLE: tl.constexpr, ROW: tl.constexpr, SLOTS: tl.constexpr,
    SLOT: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr, OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = N // 2
    first, split, half = tl.program_id(0) * BLOCK_N, tl.program_id(1) // 2, tl.program_id(1) % 2
    n = first + tl.arange(0, BLOCK_N)
    own = n < F
    gdc_wait(PDL)
    sums = walk(
        index_ptr, value_ptr, count_ptr, weight_ptr, split, half * F + first, half * F + F, N, WHOLE, ROW, SLOTS, SLOT,
        SPLITS, SHARE, LANES, BLOCK_N, DEPTH, BITS, GROUP, LEVELS, OFFSET,
    )  # fmt: skip
    gdc_launch_dependents(PDL)
    tl.store(partial_ptr + split * N + half * F + n, sums, mask=own)
    if is_last(arrived_ptr + tl.program_id(0), 2 * SPLITS):
        part = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None]
        at = partial_ptr + part * N + n[None, :]
        mask = (part < SPLITS) & own[None, :]
        g = tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
        u = tl.sum(tl.load(at + F, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
        if BITS <= 8:
            g *= tl.load(scale_ptr + n, mask=own, other=0.0)
            u *= tl.load(scale_ptr + F + n, mask=own, other=0.0)
        h = (g / (1 + tl.exp(-g)) * u).to(value_ptr.dtype.element_ty)
        limit = tl.load(threshold_ptr + n, mask=own, other=0.0)
        kept = ((tl.abs(h.to(tl.float32)) <= limit) == 0) & own
        place = first + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(out_index_ptr + place, n, mask=kept)
        tl.store(out_value_ptr + place, h, mask=kept)
        tl.store(out_count_ptr + tl.program_id(0), tl.sum(kept.to(tl.int32), axis=0))


def _gate_up_cuda(
    index: Tensor,
    value: Tensor,
    count: Tensor,
    weight: Tensor,
    threshold: Tensor,
    scale: Tensor | None,
    group: int,
    arrived: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    out_index, out_value, out_count = _gate_up_fake(index, value, count, weight, threshold, scale, group, arrived)
    N = 2 * len(threshold)
    walked = plan(index, weight, N, 2, group, config(len(threshold), bits(weight)))
    partial = threshold.new_empty(walked["SPLITS"], N)
    _gate_up_kernel[(len(out_count), 2 * walked["SPLITS"])](
        index, value, count, as_loaded(weight), threshold, scale, out_index, out_value, out_count, partial, arrived,
        **walked, **launch_options(weight),
    )  # fmt: skip
    return out_index, out_value, out_count


def _gate_up_fake(
    index: Tensor,
    value: Tensor,
    count: Tensor,
    weight: Tensor,
    threshold: Tensor,
    scale: Tensor | None,
    group: int,
    arrived: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    width = block_columns(config(len(threshold), bits(weight))[1], bits(weight), group)
    slots = -(-threshold.shape[0] // width)
    return index.new_empty(slots, width), value.new_empty(slots, width), count.new_empty(slots)


torch.library.define(
    "teal::gate_up",
    "(Tensor index, Tensor value, Tensor count, Tensor weight, Tensor threshold, Tensor? scale, int group,"
    " Tensor(a!) arrived) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("teal::gate_up", "CUDA", _gate_up_cuda)
torch.library.register_fake("teal::gate_up", _gate_up_fake)


def gate_up(
    index: Tensor,
    value: Tensor,
    count: Tensor,
    weight: Tensor,
    threshold: Tensor,
    scale: Tensor | None,
    group: int,
    arrived: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Index, value and count of h, as above. Raises ValueError on what does not fit."""
    K, N = weight.shape[0], 2 * len(threshold)
    if not index.shape == value.shape == (1, K) or count.shape != (1,):
        shapes = [list(t.shape) for t in (index, value, count, weight, threshold)]
        raise ValueError(f"gate_up takes index, value [1, K], count [1], weight [K, 2 F], threshold [F], got {shapes}")
    if check_rows("gate_up", value, weight, scale, group) != N or (scale is not None and N // 2 % (group or 16)):
        raise ValueError(
            f"gate_up takes {N} columns for {N // 2} thresholds, in whole groups, got {list(weight.shape)}, {group}"
        )
    if not all(t is None or t.is_contiguous() for t in (index, value, count, weight, threshold, scale)):
        raise ValueError("gate_up takes contiguous tensors, got a strided view")
    if threshold.dtype != torch.float32 or index.dtype != torch.int32 or count.dtype != torch.int32:
        dtypes = f"{threshold.dtype}, {index.dtype}, {count.dtype}"
        raise ValueError(f"gate_up takes an fp32 threshold, int32 index and count, got {dtypes}")
    check_arrived("gate_up", arrived, N)
    return torch.ops.teal.gate_up(index, value, count, weight, threshold, scale, group, arrived)
