"""Outliers of a split for kernels/gather_gemv_loop.py: entries so large that fixed point would lose the others.

In 16 bits of the largest entry, one that is 5,000 times the rest leaves them 3 bits: 2.5 % of what they add is lost.
Such massive activations are real (Llama-2 and 3: arXiv:2402.17762). So where an entry is beyond RARE times what the
split's entries are like, fixed point holds entries up to HELD times that, and what is beyond is added in fp32, in the
entries' order. What they are like is the smallest of the largest entries of GROUPS interleaved groups: up to seven
outliers leave one group untouched, and neither zeros nor many small entries make outliers of the rest. An entry just
within RARE costs 1e-3 of what the others add in int8, no more than bf16 rounds off; in int4, where a row's scales take
a part of the 16 bits, two or three times that.
"""

from teal_fast.kernels.backend import jit, tl, triton
from teal_fast.kernels.fixed_point import PLAIN, pair, signed

RARE = tl.constexpr(64.0)  # one of 100 to 1,000 splits of the demo, whose splits are small; 32: one of 20 to 200
HELD = tl.constexpr(16.0)
GROUPS = tl.constexpr(8)


@jit
def split_entries(
    value_ptr, count_ptr, split, SLOTS: tl.constexpr, SLOT: tl.constexpr, SHARE: tl.constexpr, STEP: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """A split's entries, fp32 of one dimension, zero where there is none."""
    if SLOTS == 1:
        i = tl.arange(0, triton.next_power_of_2((SLOT + STEP - 1) // STEP * TURN))
        at = entry_offset(i, split, SLOTS, SLOT, SHARE, STEP, TURN)
        x = tl.load(value_ptr + at, mask=at < tl.load(count_ptr), other=0.0)
    else:
        i = tl.arange(0, triton.next_power_of_2(SHARE))
        slot = split * SHARE + i
        count = tl.load(count_ptr + slot, mask=(i < SHARE) & (slot < SLOTS), other=0)
        place = tl.arange(0, triton.next_power_of_2(SLOT))
        at = slot[:, None] * SLOT + place[None, :]
        x = tl.load(value_ptr + at, mask=place[None, :] < count[:, None], other=0.0)
    return tl.reshape(x.to(tl.float32), (x.numel,))


@jit
def entry_offset(
    i, split, SLOTS: tl.constexpr, SLOT: tl.constexpr, SHARE: tl.constexpr, STEP: tl.constexpr, TURN: tl.constexpr
):
    """Where entry i of those that `split_entries` has lies."""
    P: tl.constexpr = triton.next_power_of_2(SLOT)
    turns, slots = split * TURN + i // TURN * STEP + i % TURN, (split * SHARE + i // P) * SLOT + i % P
    return turns if SLOTS == 1 else slots


@jit
def split_range(x):
    """The largest |x| that fixed point is to hold, NaN where one is NaN or inf, and whether any is beyond."""
    G: tl.constexpr = GROUPS if x.numel >= GROUPS else x.numel
    largest = tl.max(tl.reshape(tl.abs(x), (x.numel // G, G)), axis=0)
    usual = tl.min(tl.where(largest > 0, largest, float("inf")), axis=0)
    peak = tl.max(largest, axis=0)
    most = tl.where(peak > usual * RARE, usual * HELD, peak) + tl.sum(x * 0.0, axis=0)
    return most, peak > most


@jit
def forget(x):
    """A whole number x, of which the compiler then knows nothing: what was computed from it is computed anew."""
    return x if PLAIN else tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=False, pack=1)


@jit
def missing(x, scale, inverse):
    """What fixed point lacks of x: nearly nothing up to `most`, any part of x beyond."""
    return x - ((pair(x, x, inverse) << 16) >> 16).to(tl.float32) * scale


@jit
def row_times(x, words, BITS: tl.constexpr):
    """The products of one row's words with x in fp32, as accumulators for `total`."""
    return _bytes_times(x, words) if BITS == 8 else _bytes_times(x, signed(words << 4)) + _bytes_times(x, signed(words))


@jit
def _bytes_times(x, words):
    a, b = ((words << 24) >> 24).to(tl.float32), ((words << 16) >> 24).to(tl.float32)
    c, d = ((words << 8) >> 24).to(tl.float32), (words >> 24).to(tl.float32)
    return (a * x, b * x, c * x, d * x)
