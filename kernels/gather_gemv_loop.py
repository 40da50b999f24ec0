"""gather_gemv_loop: a gather-GEMV, the sum of the rows that a compact vector names, each times its entry.

compact_gemv and gate_up share it: a program has BLOCK_N columns and a share of the vector (split-K); LANES rows of its
threads have places of their own in it, four at a time. The rows of one slot go round all splits; of several slots each
split has whole ones, and each slot has lanes of its own, so that no place must be looked for.

Software pipelining by hand: DEPTH fours a lane are on their way at once. A load's registers are used up before it is
made again: copied at the end of a step instead, it would be waited for there, and a step would take as long as a load,
1.2 us.
"""

from teal_fast.kernels.backend import jit, tl, triton
from teal_fast.kernels.fixed_point import absmax_scale, add_pair, no_sums, pair, total


@jit
def _numbers(index_ptr, value_ptr, at, place, last, count):
    """Four row numbers from the offset `at`, those before place `last`, and their entries, those before `count`."""
    k, x = (), ()
    for i in tl.static_range(4):
        k = k + (tl.load(index_ptr + at + i, mask=place + i < last, other=0),)
        x = x + (tl.load(value_ptr + at + i, mask=place + i < count, other=0.0),)
    return k, x


@jit
def _fetch_four(
    packed_ptr, k, place, count, column, limit, N: tl.constexpr, WHOLE: tl.constexpr, ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Columns `column` to column + BLOCK_N, those below limit, of the rows k at places below count, with scales."""
    W: tl.constexpr = BLOCK_N * BITS // 32 if BITS <= 8 else BLOCK_N
    G: tl.constexpr = BLOCK_N // GROUP if BITS == 4 and BLOCK_N > GROUP else 1
    first, end = column, limit
    if BITS <= 8:  # whole 16 bytes, which the compiler does not see: it would load words one by one
        first, end = tl.multiple_of(column * BITS // 32, 4), limit * BITS // 32
    w, g, four = first + tl.arange(0, W), tl.arange(0, G)[None, :], ()
    for i in tl.static_range(4):
        row, inside, scale = k[i].to(OFFSET) * ROW, place + i < count, 1.0
        mask = inside[:, None] & ((w < end)[None, :] | WHOLE)
        words = tl.load(packed_ptr + (row[:, None] + w[None, :]), mask=mask, other=0, eviction_policy="evict_first")
        if BITS == 4:
            scales = packed_ptr.to(tl.pointer_type(tl.bfloat16)) + (2 * row + N // 4 + column // GROUP)
            if G > 1:
                mask = inside[:, None] & (g < (limit - column) // GROUP)
                scale = tl.load(scales[:, None] + g, mask=mask, other=0.0).to(tl.float32)[:, :, None]
                words = tl.reshape(words, (words.shape[0], G, W // G))
            else:
                scale = tl.load(scales, mask=inside, other=0.0).to(tl.float32)[:, None]
        four = four + ((words, scale),)
    return four


@jit
def _weigh_four(y, x, w, inverse, BITS: tl.constexpr):
    """The sums y plus four entries x times rows w."""
    for i in tl.static_range(0, 4, 2):
        a, b = w[i], w[i + 1]
        p, q = x[i].to(tl.float32)[:, None], x[i + 1].to(tl.float32)[:, None]
        if BITS <= 8:
            if len(a[0].shape) == 3:
                p, q = p[:, :, None], q[:, :, None]
            y = add_pair(y, pair(p * a[1], q * b[1], inverse), a[0], b[0], BITS)
        else:
            y = y + a[0].to(tl.float32) * p
            y = y + b[0].to(tl.float32) * q
    return y


@jit
def gather_gemv_loop(
    index_ptr, value_ptr, count_ptr, packed_ptr, split, column, limit, N: tl.constexpr, WHOLE: tl.constexpr,
    ROW: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr,
    LANES: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    LEVELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N]: what the rows of `split` add up to in the columns from `column` on, those below `limit`."""
    slot = tl.arange(0, triton.next_power_of_2(SHARE))
    EACH: tl.constexpr = LANES // slot.numel  # lanes a slot
    lane = tl.arange(0, LANES)
    if SLOTS == 1:
        count = tl.load(count_ptr)
        base, begin, end = 0, split * 4 * LANES, count
        STEP: tl.constexpr = 4 * LANES * SPLITS
    else:
        mine = split * SHARE + lane // EACH
        count = tl.load(count_ptr + mine, mask=(lane // EACH < SHARE) & (mine < SLOTS), other=0)
        base, begin, end = mine * SLOT, 0, tl.max(count, axis=0)
        STEP: tl.constexpr = 4 * EACH
    place = begin + 4 * (lane % EACH)
    k, x, w = (), (), ()
    for d in tl.static_range(DEPTH):  # the first need no count
        rows, entries = _numbers(index_ptr, value_ptr, base + place + d * STEP, place + d * STEP, SLOT, count)
        k, x = k + (rows,), x + (entries,)
    for d in tl.static_range(DEPTH):
        at = place + d * STEP
        w = w + (_fetch_four(packed_ptr, k[d], at, count, column, limit, N, WHOLE, ROW, BLOCK_N, BITS, GROUP, OFFSET),)
    place += DEPTH * STEP
    k, next_x = (), ()
    for d in tl.static_range(DEPTH):
        rows, entries = _numbers(index_ptr, value_ptr, base + place + d * STEP, place + d * STEP, count, count)
        k, next_x = k + (rows,), next_x + (entries,)
    dequant_scale, inverse = 1.0, 1.0
    if BITS <= 8:
        dequant_scale, inverse = _split_scale(
            value_ptr, count_ptr, split, begin, SLOTS, SLOT, SHARE, STEP, 4 * LANES, LEVELS
        )
        y = no_sums(w[0][0][0], BITS)
    else:
        y = tl.zeros((LANES, BLOCK_N), dtype=tl.float32)
    for _ in tl.range(begin, end, DEPTH * STEP, num_stages=1):
        rows_after, x_after, fetched = (), (), ()
        for d in tl.static_range(DEPTH):
            y = _weigh_four(y, x[d], w[d], inverse, BITS)
            at = place + d * STEP
            four = _fetch_four(packed_ptr, k[d], at, count, column, limit, N, WHOLE, ROW, BLOCK_N, BITS, GROUP, OFFSET)
            at += DEPTH * STEP
            rows, entries = _numbers(index_ptr, value_ptr, base + at, at, count, count)
            rows_after, x_after, fetched = rows_after + (rows,), x_after + (entries,), fetched + (four,)
        place += DEPTH * STEP
        x = next_x
        k, next_x, w = rows_after, x_after, fetched
    return total(y, BITS) * dequant_scale if BITS <= 8 else tl.sum(y, axis=0)


@jit
def _split_scale(
    value_ptr, count_ptr, split, begin, SLOTS: tl.constexpr, SLOT: tl.constexpr, SHARE: tl.constexpr,
    STEP: tl.constexpr, TURN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """`absmax_scale` of all the entries of a split."""
    if SLOTS == 1:
        i = tl.arange(0, triton.next_power_of_2((SLOT + STEP - 1) // STEP * TURN))
        at = begin + i // TURN * STEP + i % TURN
        x = tl.load(value_ptr + at, mask=at < tl.load(count_ptr), other=0.0)
    else:
        i = tl.arange(0, triton.next_power_of_2(SHARE))
        slot = split * SHARE + i
        count = tl.load(count_ptr + slot, mask=(i < SHARE) & (slot < SLOTS), other=0)
        place = tl.arange(0, triton.next_power_of_2(SLOT))
        at = slot[:, None] * SLOT + place[None, :]
        x = tl.load(value_ptr + at, mask=place[None, :] < count[:, None], other=0.0)
    return absmax_scale(x, LEVELS)
