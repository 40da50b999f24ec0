"""gather_gemv_loop: a gather-GEMV, the sum of the rows that a compact vector names, each times its entry.

compact_gemv and gate_up share it: a program has BLOCK_N columns and a share of the vector (split-K); LANES rows of its
threads have places of their own in it, four at a time. The rows of one slot go round all splits; of several slots each
split has whole ones, and each slot has lanes of its own, so that no place must be looked for.

Software pipelining by hand: DEPTH fours a lane are on their way at once. A load's registers are used up before it is
made again: copied at the end of a step instead, it would be waited for there, and a step would take as long as a load,
1.2 us.
"""

from teal_fast.kernels.backend import jit, tl, triton
from teal_fast.kernels.fetch_rows import fetch, fetch_four, four_numbers
from teal_fast.kernels.fixed_point import add_pair, level, no_sums, pair, total
from teal_fast.kernels.outliers import entry_offset, forget, missing, row_times, split_entries, split_range


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
    OFFSET: tl.constexpr,
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
        rows, entries = four_numbers(index_ptr, value_ptr, base + place + d * STEP, place + d * STEP, SLOT, count)
        k, x = k + (rows,), x + (entries,)
    for d in tl.static_range(DEPTH):
        at = place + d * STEP
        w = w + (fetch_four(packed_ptr, k[d], at, count, column, limit, N, WHOLE, ROW, BLOCK_N, BITS, GROUP, OFFSET),)
    place += DEPTH * STEP
    k, next_x = (), ()
    for d in tl.static_range(DEPTH):
        rows, entries = four_numbers(index_ptr, value_ptr, base + place + d * STEP, place + d * STEP, count, count)
        k, next_x = k + (rows,), next_x + (entries,)
    scale, inverse = 1.0, 1.0
    if BITS <= 8:
        whole = split_entries(value_ptr, count_ptr, split, SLOTS, SLOT, SHARE, STEP, 4 * LANES)
        most, outliers = split_range(whole)
        scale, inverse = level(most)
        y = no_sums(w[0][0][0], BITS)
    else:
        y = tl.zeros((LANES, BLOCK_N), dtype=tl.float32)
    for _ in tl.range(begin, end, DEPTH * STEP, num_stages=1):
        rows_after, x_after, fetched = (), (), ()
        for d in tl.static_range(DEPTH):
            y = _weigh_four(y, x[d], w[d], inverse, BITS)
            at = place + d * STEP
            four = fetch_four(packed_ptr, k[d], at, count, column, limit, N, WHOLE, ROW, BLOCK_N, BITS, GROUP, OFFSET)
            at += DEPTH * STEP
            rows, entries = four_numbers(index_ptr, value_ptr, base + at, at, count, count)
            rows_after, x_after, fetched = rows_after + (rows,), x_after + (entries,), fetched + (four,)
        place += DEPTH * STEP
        x = next_x
        k, next_x, w = rows_after, x_after, fetched
    if BITS <= 8:
        sums = total(y, BITS) * scale
        if outliers:  # rare
            sums += _sum_outliers(
                index_ptr, value_ptr, count_ptr, packed_ptr, split, column, limit, most, scale, inverse, N,
                WHOLE, ROW, SLOTS, SLOT, SHARE, STEP, 4 * LANES, BLOCK_N, BITS, GROUP, OFFSET,
            )  # fmt: skip
    else:
        sums = tl.sum(y, axis=0)
    return sums


@jit
def _sum_outliers(
    index_ptr, value_ptr, count_ptr, packed_ptr, split, column, limit, most, scale, inverse, N: tl.constexpr,
    WHOLE: tl.constexpr, ROW: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr, SHARE: tl.constexpr,
    STEP: tl.constexpr, TURN: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N]: what fixed point lacks of the split's entries beyond `most`, one after another in their order."""
    # Forgotten, or offsets would be kept in registers all through the loop above: gate_up in int8 took 171 of them a
    # thread instead of 103.
    split = forget(split)
    x = split_entries(value_ptr, count_ptr, split, SLOTS, SLOT, SHARE, STEP, TURN)
    number, only = tl.arange(0, x.numel), tl.arange(0, 1)
    sums, last = tl.zeros((BLOCK_N,), tl.float32), -1
    for _ in tl.range(0, tl.sum((tl.abs(x) > most).to(tl.int32), axis=0), num_stages=1):
        last = tl.min(tl.where((tl.abs(x) > most) & (number > last), number, x.numel), axis=0)
        at = entry_offset(last, split, SLOTS, SLOT, SHARE, STEP, TURN)
        k = tl.load(index_ptr + at + only)
        words, row_scale = fetch(packed_ptr, k, only, 0, 1, column, limit, N, WHOLE, ROW, BLOCK_N, BITS, GROUP, OFFSET)
        lacking = missing(tl.load(value_ptr + at).to(tl.float32) * row_scale, scale, inverse)
        sums += total(row_times(lacking, words, BITS), BITS)
    return sums
