"""teal::gate_up: h = SiLU(gate) ⊙ up of a vector given by its kept channels, compacted for the down projection.

x: one slot of K channels, as kernels/norm_compact.py makes it; weight [K, 2 F], gate columns first, as
kernels/compact_gemv.py takes it; threshold [F] fp32, in units of |h|. Returns h [F] as a compact vector, one slot a
program. Split-K with a semaphore as there: programs have the same columns of gate or of up and a share of the rows, and
the last one of a slot adds up and compacts.
"""

import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl, triton
from teal_fast.kernels.checks import takes
from teal_fast.kernels.compact_vector import (
    VECTOR_ARGUMENTS,
    VECTOR_TABLE,
    CompactVector,
    compact_reference,
    empty_vector,
)
from teal_fast.kernels.gather_gemv_loop import gather_gemv_loop
from teal_fast.kernels.launch_config import Config, block_columns, launch_config, pick_config
from teal_fast.kernels.packed import WEIGHT_ARGUMENTS, WEIGHT_TABLE, PackedWeight, check_weight
from teal_fast.kernels.semaphore import check_semaphores, last_block

TUNED: dict[tuple[int, int, int], Config] = {}
DEFAULTS = {32: (8, 32, 1, 1), 16: (8, 64, 1, 1), 8: (8, 128, 1, 2), 4: (12, 256, 1, 2)}  # H200, 2026-11-24


def gate_up_reference(x: CompactVector, weight: PackedWeight, threshold: Tensor, semaphores: Tensor) -> CompactVector:
    kept = slice(int(x.count))
    both = x.value[0, kept].float() @ weight.values(x.index[0, kept].long())
    gate, up = (both if weight.scale is None else both * weight.scale).chunk(2)
    width = _gate_up_fake(x, weight, threshold, semaphores).index.shape[1]
    return compact_reference((F.silu(gate) * up).to(x.value.dtype), threshold, width)


@jit
def _gate_up_kernel(
    index_ptr, value_ptr, count_ptr, packed_ptr, threshold_ptr, scale_ptr, out_index_ptr, out_value_ptr, out_count_ptr,
    partial_ptr, semaphore_ptr, N: tl.constexpr, WHOLE: tl.constexpr, ROW: tl.constexpr, SLOTS: tl.constexpr,
    SLOT: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = N // 2
    first, split, half = tl.program_id(0) * BLOCK_N, tl.program_id(1) // 2, tl.program_id(1) % 2
    n = first + tl.arange(0, BLOCK_N)
    own = n < F
    gdc_wait(PDL)
    sums = gather_gemv_loop(
        index_ptr, value_ptr, count_ptr, packed_ptr, split, half * F + first, half * F + F, N, WHOLE, ROW, SLOTS, SLOT,
        SPLITS, SHARE, LANES, BLOCK_N, DEPTH, BITS, GROUP, OFFSET,
    )  # fmt: skip
    gdc_launch_dependents(PDL)
    tl.store(partial_ptr + split * N + half * F + n, sums, mask=own)
    if last_block(semaphore_ptr + tl.program_id(0), 2 * SPLITS):
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


def _gate_up_cuda(x: CompactVector, weight: PackedWeight, threshold: Tensor, semaphores: Tensor) -> CompactVector:
    h = _gate_up_fake(x, weight, threshold, semaphores)
    launch = launch_config(x, weight, 2, pick_config(weight, TUNED, DEFAULTS))
    partial = threshold.new_empty(launch["SPLITS"], weight.N)
    _gate_up_kernel[len(h.count), 2 * launch["SPLITS"]](
        *x, weight.words, threshold, weight.scale, *h, partial, semaphores, **launch, **launch_options(threshold)
    )
    return h


def _gate_up_fake(x: CompactVector, weight: PackedWeight, threshold: Tensor, semaphores: Tensor) -> CompactVector:
    width = block_columns(pick_config(weight, TUNED, DEFAULTS)[1], weight)  # of a slot
    return empty_vector(threshold, -(-threshold.shape[0] // width), width, x.value.dtype)


_check = takes("gate_up", f"{VECTOR_TABLE}; {WEIGHT_TABLE}; threshold [F] fp32", "S", "W", "N")
_gate_up = register(
    "gate_up",
    f"({VECTOR_ARGUMENTS}, {WEIGHT_ARGUMENTS}, Tensor threshold, Tensor(a!) semaphores) -> (Tensor, Tensor, Tensor)",
    cuda=_gate_up_cuda,
    fake=_gate_up_fake,
    bundle=lambda f: lambda *flat: f(CompactVector(*flat[:3]), PackedWeight(*flat[3:6]), *flat[6:]),
)


def gate_up(x: CompactVector, weight: PackedWeight, threshold: Tensor, semaphores: Tensor) -> CompactVector:
    """h, as above. Raises ValueError on what does not fit."""
    N = check_weight("gate_up", weight, x.value.dtype)
    _check(*x, *weight[:2], threshold, S=1, W=weight.packed.shape[0], N=N)
    F = len(threshold)
    if N != 2 * F or (weight.scale is not None and F % (weight.group or 16)):
        raise ValueError(f"gate_up takes {2 * F} columns for {F} thresholds, in whole groups, got {N}, {weight.group}")
    check_semaphores("gate_up", semaphores, N)
    return CompactVector(*_gate_up(*x, *weight, threshold, semaphores))
