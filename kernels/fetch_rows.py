"""Loads of kernels/gather_gemv_loop.py: numbers of rows from a compact vector, and these rows of a packed weight."""

from teal_fast.kernels.backend import jit, tl


@jit
def four_numbers(index_ptr, value_ptr, at, place, last, count):
    """Four row numbers from the offset `at`, those before place `last`, and their entries, those before `count`."""
    k, x = (), ()
    for i in tl.static_range(4):
        k = k + (tl.load(index_ptr + at + i, mask=place + i < last, other=0),)
        x = x + (tl.load(value_ptr + at + i, mask=place + i < count, other=0.0),)
    return k, x


@jit
def fetch(
    packed_ptr, k, place, i, count, column, limit, N: tl.constexpr, WHOLE: tl.constexpr, ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Columns `column` to column + BLOCK_N, those below limit, of rows k at places + i below count, with scales."""
    W: tl.constexpr = BLOCK_N * BITS // 32 if BITS <= 8 else BLOCK_N
    G: tl.constexpr = BLOCK_N // GROUP if BITS == 4 and BLOCK_N > GROUP else 1
    first, end = column, limit
    if BITS <= 8:  # whole 16 bytes, which the compiler does not see: it would load words one by one
        first, end = tl.multiple_of(column * BITS // 32, 4), limit * BITS // 32
    w, g = first + tl.arange(0, W), tl.arange(0, G)[None, :]
    row, inside, scale = k.to(OFFSET) * ROW, place + i < count, 1.0
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
    return words, scale


@jit
def fetch_four(
    packed_ptr, k, place, count, column, limit, N: tl.constexpr, WHOLE: tl.constexpr, ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """What `fetch` fetches of the rows k[0] to k[3], at one place after another."""
    four = ()
    for i in tl.static_range(4):
        one = fetch(packed_ptr, k[i], place, i, count, column, limit, N, WHOLE, ROW, BLOCK_N, BITS, GROUP, OFFSET)
        four = four + (one,)
    return four
