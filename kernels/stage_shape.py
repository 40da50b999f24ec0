"""Which models csrc/three_stages.cu serves, and how a decode step's launches are cut into CTAs for one.

Every launch has at most one CTA a multiprocessor. stage_qkv: warps share the segments of 512 bytes of a row. stage_o:
SHARERS CTAs a head. stage_mlp: CHANNELS of the MLP a CTA, as few as fill the GPU.
"""

from dataclasses import dataclass

THREADS, WARPS = 512, 16  # of a CTA
MOST_RANKS = 8
MOST_ROWS = 512  # of whole numbers that a thread adds up: 512 · 128 · 32767 < 2^31
GRANULES = {16: 32, 8: 64, 4: 128}  # channels: 64 bytes, which the GPU's memory reads at once
UNROLL = {(16, 16): (4, 4), (8, 8): (2, 2), (8, 4): (2, 2)}  # steps a batch, by bits: the best on an H200
# What a sweep may set, and to at most what.
TUNED = {"unroll_a": 16, "unroll_m": 16, "channels": THREADS, "sharers": 32}


@dataclass(frozen=True)
class StageShape:
    """A model's sizes; bits of the attention's weights and of the MLP's, group of four-bit ones, bits of the output.

    ranks: how many GPUs it is cut over; heads, kv_heads and ffn are then one's share, vocab is the whole.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    bits_a: int
    bits_m: int
    group: int
    output_bits: int
    half_is_fp16: bool
    qk_norm: bool
    ranks: int = 1

    def check(self) -> None:
        """Raises ValueError saying what the kernels do not serve."""
        bits, group = (self.bits_a, self.bits_m), self.group if self.bits_m == 4 else 1
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        misfits = {
            f"weights of {self.bits_a} and {self.bits_m} bits": bits not in UNROLL or self.output_bits not in (16, 8),
            f"heads of {self.head_dim}": self.head_dim not in (32, 64, 128, 256),
            f"a width of {self.dim}": self.dim % 32 or self.dim > 16384 or self.dim % group,
            f"an MLP of {self.ffn}": self.ffn % (128 // self.bits_m) or self.ffn % group,
            f"q, k and v of {qkv}": qkv % (128 // self.bits_a),
            f"{self.ranks} ranks": self.ranks > MOST_RANKS,
        }
        if found := next((what for what, misfit in misfits.items() if misfit), None):
            raise ValueError(f"no kernels for {found}")


def cut(shape: StageShape, processors: int, **tuned: int) -> dict[str, int]:
    """The launches' constants on a GPU of so many multiprocessors. Raises ValueError where none serve.

    tuned: some of TUNED, instead of what is chosen here (tuning.py).
    """
    shape.check()
    granule, (unroll_a, unroll_m) = GRANULES[shape.bits_m], UNROLL[shape.bits_a, shape.bits_m]
    unroll_a, unroll_m = tuned.get("unroll_a", unroll_a), tuned.get("unroll_m", unroll_m)
    channels = tuned.get("channels", -(-shape.ffn // (processors * granule)) * granule)
    sharers = tuned.get("sharers", max(1, min(processors // shape.heads, shape.head_dim // 8)))
    ctas_o, ctas_mlp = shape.heads * sharers, -(-shape.ffn // channels)
    row = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.bits_a // 8
    segments = -(-row // 512)
    ctas_qkv = min(processors, 14 * segments)
    each = ctas_qkv * WARPS // segments  # warps a segment
    width = 2 * channels * shape.bits_m // 128
    if each < WARPS or channels > THREADS or width > THREADS or ctas_o > processors:
        raise ValueError(
            f"no kernels for {shape.heads} heads with an MLP of {shape.ffn} on {processors} multiprocessors"
        )
    if shape.bits_m < 16 and shape.dim > MOST_ROWS * min(each, THREADS // width):
        raise ValueError(f"no kernels for quantized rows of {shape.dim} channels")
    batches = -(-shape.heads // shape.kv_heads // 8)
    return {
        "CTAS_QKV": ctas_qkv, "CTAS_O": ctas_o, "CTAS_MLP": ctas_mlp, "SHARERS": sharers, "CHANNELS": channels,
        "SPLITS": max(1, processors // (shape.kv_heads * batches)), "BATCHES": batches,
        "ADDENDS_QKV": each // WARPS + 2, "ADDENDS_O": ctas_o, "ADDENDS_MLP": ctas_mlp,
        "UNROLL_A": unroll_a, "UNROLL_M": unroll_m,
    }  # fmt: skip
