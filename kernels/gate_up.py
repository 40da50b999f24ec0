"""teal::gate_up: SiLU(gate) ⊙ up of a vector given by its kept channels, compacted for the down projection.

index [1, K] int32, value [1, K] and count [1] int32 as kernels/norm_compact.py makes them; weight [K, 2 F], gate
columns first, in any form that kernels/compact_gemv.py takes, with its scale [2 F]; threshold [F] fp32 for h =
SiLU(gate) ⊙ up. Returns h in slots, one a program: index [slots, width] int32, value [slots, width], count [slots]
int32, the kept channels of each from the left.

A program owns the same columns of gate and up and walks the whole list, so that nothing is left to be reduced.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, offset_type, tl
from kernels.rows import add_rows, as_loaded, bits, check_rows, fetch_rows, settle, to_float, weigh_rows

# (F, bits a weight): rows a step, channels of h a program (the slots' width), warps. From a sweep on an H200,
# 2026-11-24 (of bf16 that of benchmarks/kernels.py --tune).
TUNED = {(11008, 16): (128, 32, 4), (8192, 16): (256, 64, 8), (28672, 8): (128, 128, 4)}
DEFAULTS = {32: (128, 64, 4), 16: (128, 64, 4), 8: (256, 64, 4), 4: (128, 128, 8)}


def config(F: int, form: int) -> tuple[int, int, int]:
    """Rows a step, slot width and warps for h of F channels and weights of `form` bits."""
    return TUNED.get((F, form), DEFAULTS[form])


def gate_up_reference(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, threshold: Tensor, scale: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = slice(int(count))
    both = value[0, rows].float() @ to_float(weight[index[0, rows].long()], 2 * len(threshold), group)
    gate, up = (both if scale is None else both * scale).chunk(2)
    h = (F.silu(gate) * up).to(value.dtype)
    out_index, out_value, out_count = _gate_up_fake(index, value, count, weight, threshold, scale, group)
    width = out_index.shape[1]
    for slot, (part, limit) in enumerate(zip(h.split(width), threshold.split(width), strict=True)):
        kept = (part.abs() <= limit).logical_not().nonzero().squeeze(1)
        out_index[slot, : len(kept)], out_value[slot, : len(kept)] = slot * width + kept, part[kept]
        out_count[slot] = len(kept)
    return out_index, out_value, out_count


@jit
def _gate_up_kernel(
    index_ptr, value_ptr, count_ptr, weight_ptr, threshold_ptr, scale_ptr, out_index_ptr, out_value_ptr, out_count_ptr,
    K, F, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * WIDTH
    n = first + tl.arange(0, WIDTH)
    own = n < F
    limit = tl.load(threshold_ptr + n, mask=own, other=0.0)
    gdc_wait(PDL)
    place = tl.arange(0, BLOCK_K)
    k = tl.load(index_ptr + place, mask=place < K, other=0)
    x = tl.load(value_ptr + place, mask=place < K, other=0.0)
    count = tl.load(count_ptr)
    STEPS: tl.constexpr = BLOCK_K // ROWS
    gate = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    up = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    gate_offset = tl.zeros((BLOCK_K, WIDTH // 32 if BITS == 4 else 1), dtype=tl.float32)
    up_offset = gate_offset
    if BITS <= 8:  # as in kernels/compact_gemv.py
        w, w_scale = fetch_rows(weight_ptr, k, place < count, first, F, 2 * F, WIDTH, BITS, GROUP, OFFSET)
        u, u_scale = fetch_rows(weight_ptr, k, place < count, F + first, 2 * F, 2 * F, WIDTH, BITS, GROUP, OFFSET)
        factor = tl.where(place < count, x.to(tl.float32), 0.0)
        place += BLOCK_K
        k = tl.load(index_ptr + place, mask=place < K, other=0)
        x = tl.load(value_ptr + place, mask=place < K, other=0.0)
    for _ in tl.range(0, count, BLOCK_K, num_stages=1):
        next_w, next_w_scale = fetch_rows(weight_ptr, k, place < count, first, F, 2 * F, WIDTH, BITS, GROUP, OFFSET)
        next_u, next_u_scale = fetch_rows(
            weight_ptr, k, place < count, F + first, 2 * F, 2 * F, WIDTH, BITS, GROUP, OFFSET
        )
        next_factor = tl.where(place < count, x.to(tl.float32), 0.0)
        place += BLOCK_K
        k = tl.load(index_ptr + place, mask=place < K, other=0)
        x = tl.load(value_ptr + place, mask=place < K, other=0.0)
        if BITS > 8:
            w, w_scale, u, u_scale, factor = next_w, next_w_scale, next_u, next_u_scale, next_factor
        product, off = weigh_rows(w, w_scale, factor, BITS)
        gate = add_rows(gate, product, STEPS)
        up_product, up_off = weigh_rows(u, u_scale, factor, BITS)
        up = add_rows(up, up_product, STEPS)
        if BITS <= 8:
            gate_offset += off
            up_offset += up_off
            w, w_scale, u, u_scale, factor = next_w, next_w_scale, next_u, next_u_scale, next_factor
    gdc_launch_dependents(PDL)
    g = settle(tl.sum(gate, axis=0), tl.sum(gate_offset, axis=0), BITS)
    u = settle(tl.sum(up, axis=0), tl.sum(up_offset, axis=0), BITS)
    if BITS <= 8:
        g *= tl.load(scale_ptr + n, mask=own, other=0.0)
        u *= tl.load(scale_ptr + F + n, mask=own, other=0.0)
    h = (g / (1 + tl.exp(-g)) * u).to(value_ptr.dtype.element_ty)
    kept = ((tl.abs(h.to(tl.float32)) <= limit) == 0) & own
    place = first + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(out_index_ptr + place, n, mask=kept)
    tl.store(out_value_ptr + place, h, mask=kept)
    tl.store(out_count_ptr + tl.program_id(0), tl.sum(kept.to(tl.int32), axis=0))


def _gate_up_cuda(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, threshold: Tensor, scale: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    out_index, out_value, out_count = _gate_up_fake(index, value, count, weight, threshold, scale, group)
    form = bits(weight)
    block_k, width, warps = config(threshold.shape[0], form)
    rows = block_k if form > 8 else min(block_k, warps * 32 * (128 // form) // width)
    weight = as_loaded(weight)
    _gate_up_kernel[(out_count.shape[0],)](
        index, value, count, weight, threshold, scale, out_index, out_value, out_count, weight.shape[0],
        threshold.shape[0], block_k, width, rows, form, group, offset_type(weight), num_warps=warps,
        **launch_options(weight),
    )  # fmt: skip
    return out_index, out_value, out_count


def _gate_up_fake(
    index: Tensor, value: Tensor, count: Tensor, weight: Tensor, threshold: Tensor, scale: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    width = config(threshold.shape[0], bits(weight))[1]
    slots = -(-threshold.shape[0] // width)
    return index.new_empty(slots, width), value.new_empty(slots, width), count.new_empty(slots)


torch.library.define(
    "teal::gate_up",
    "(Tensor index, Tensor value, Tensor count, Tensor weight, Tensor threshold, Tensor? scale, int group)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("teal::gate_up", "CUDA", _gate_up_cuda)
torch.library.register_fake("teal::gate_up", _gate_up_fake)


def gate_up(
    index: Tensor,
    value: Tensor,
    count: Tensor,
    weight: Tensor,
    threshold: Tensor,
    scale: Tensor | None = None,
    group: int = 0,
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
    return torch.ops.teal.gate_up(index, value, count, weight, threshold, scale, group)
