"""Integer dot products (DP2A) of int8 and four-bit rows on a GPU, for kernels/gather_gemv_loop.py.

Converting whole numbers is slow on a GPU (16 a cycle and multiprocessor on Hopper, of other operations 64 or 128) and a
multiplication for each weight is too many. So x is quantized to 16 bits: x = scale · i, scale = most / 32767. DP2A
adds two products, of two x and the weights of two rows, in one instruction, and sums are exact, so that their order
does not matter. Rows are int32 words: the bytes of two are interleaved, so that those of a column lie side by side.

An x beyond `most` wraps round: its i is the lowest 16 bits of what it should be, which is wrong but known, and
kernels/outliers.py adds what the sums lack. As |i| <= 2^15 and |weight| <= 128 whatever x is, a thread's 32 bits hold
the sum of MOST_ROWS rows: 511 · 128 · 2^15 < 2^31.

Accumulators are tuples of int32 tensors, one for each byte of a word, of four-bit weights one for each half byte.
"""

from teal_fast.kernels.backend import INTERPRETED, jit, tl

# What rounds to whole numbers: added to |x| < 2 ** 22 it leaves x in the lowest bits of a float.
ROUNDING = tl.constexpr(1.5 * 2.0**23)
PLAIN = tl.constexpr(INTERPRETED)  # the interpreter knows no assembly
MOST_ROWS = 511  # a thread; a weight reaches -128, with the half byte of four bits in a byte's upper half, too


@jit
def _interleave_low(a, b):
    """Bytes a0 b0 a1 b1 of words a and b."""
    if PLAIN:
        y = (a & 0xFF) | ((b & 0xFF) << 8) | ((a & 0xFF00) << 8) | ((b & 0xFF00) << 16)
    else:
        y = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5140;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    return y


@jit
def _interleave_high(a, b):
    """Bytes a2 b2 a3 b3."""
    if PLAIN:
        y = _interleave_low((a >> 16) & 0xFFFF, (b >> 16) & 0xFFFF)
    else:
        y = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7362;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    return y


@jit
def signed(words):
    """Four-bit values in the upper halves of bytes, which stand for themselves less 8, as signed bytes, times 16."""
    if PLAIN:
        y = (words & -0xF0F0F10) ^ -0x7F7F7F80
    else:  # one instruction, where the compiler makes two
        mask = tl.full(words.shape, -0xF0F0F10, tl.int32)  # 0xF0F0F0F0
        sign = tl.full(words.shape, -0x7F7F7F80, tl.int32)  # 0x80808080
        y = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x6A;", "=r,r,r,r", [words, mask, sign], tl.int32, is_pure=True, pack=1
        )
    return y


@jit
def _dot_low(x, words, y):
    """y plus x0 w0 + x1 w1, of the two halves of x and the lower two bytes of words, all signed."""
    if PLAIN:
        y += ((x << 16) >> 16) * ((words << 24) >> 24) + (x >> 16) * ((words << 16) >> 24)
    else:
        y = tl.inline_asm_elementwise(
            "dp2a.lo.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [x, words, y], tl.int32, is_pure=True, pack=1
        )
    return y


@jit
def _dot_high(x, words, y):
    """The same with the upper two bytes."""
    if PLAIN:
        y = _dot_low(x, words >> 16, y)
    else:
        y = tl.inline_asm_elementwise(
            "dp2a.hi.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [x, words, y], tl.int32, is_pure=True, pack=1
        )
    return y


@jit
def level(most):
    """What one level stands for, and its inverse, where fixed point is to hold |x| <= most. NaN stays NaN."""
    return most * (1.0 / 32767), tl.where(most > 1e-30, 32767.0 / most, 0.0)


@jit
def pair(x, z, inverse):
    """Two entries in fixed point as the halves of a word."""
    a = (x * inverse + ROUNDING).to(tl.int32, bitcast=True)
    b = (z * inverse + ROUNDING).to(tl.int32, bitcast=True)
    return (a & 0xFFFF) | (b << 16)


@jit
def no_sums(like, BITS: tl.constexpr):
    """Accumulators for words like these."""
    zero = tl.zeros(like.shape, tl.int32)
    four = (zero, zero, zero, zero)
    return four if BITS == 8 else four + four


@jit
def add_pair(y, x, a, b, BITS: tl.constexpr):
    """The accumulators plus the products of two rows' words a, b with the pair x of their entries."""
    x = tl.broadcast_to(x, a.shape)
    low = _interleave_low(a, b)
    high = _interleave_high(a, b)
    if BITS == 8:
        y = _dots(x, low, high, y[0], y[1], y[2], y[3])
    else:
        y = _dots(x, signed(low << 4), signed(high << 4), y[0], y[1], y[2], y[3]) + _dots(
            x, signed(low), signed(high), y[4], y[5], y[6], y[7]
        )
    return y


@jit
def _dots(x, low, high, a, b, c, d):
    return (_dot_low(x, low, a), _dot_high(x, low, b), _dot_low(x, high, c), _dot_high(x, high, d))


@jit
def total(y, BITS: tl.constexpr):
    """fp32 [N]: the accumulators [L, …] summed over L, in the order of the columns, before x's scale."""
    low = _by_column(y[0], y[1], y[2], y[3])
    if BITS == 8:
        sums = tl.reshape(low, (low.numel,))
    else:  # 16 bytes hold 32 values: kernels/int4.py
        high = _by_column(y[4], y[5], y[6], y[7])
        both = tl.join(tl.reshape(low, (low.numel // 16, 16)), tl.reshape(high, (low.numel // 16, 16))) * 0.0625
        sums = tl.reshape(tl.permute(both, (0, 2, 1)), (2 * low.numel,))
    return sums


@jit
def _by_column(a, b, c, d):
    a, b = tl.sum(a.to(tl.float32), axis=0), tl.sum(b.to(tl.float32), axis=0)
    c, d = tl.sum(c.to(tl.float32), axis=0), tl.sum(d.to(tl.float32), axis=0)
    return tl.join(tl.join(a, c), tl.join(b, d))
