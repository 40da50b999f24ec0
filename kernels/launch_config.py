"""Launch configurations of the kernels that run kernels/gather_gemv_loop.py: splits, tiles and unrolling.

Their defaults and tuned ones are from sweeps by benchmarks/kernels.py.
"""

from teal_fast.kernels.backend import offset_type, triton
from teal_fast.kernels.compact_vector import CompactVector
from teal_fast.kernels.fixed_point import MOST_ROWS
from teal_fast.kernels.int4 import SMALLEST_GROUP
from teal_fast.kernels.packed import PackedWeight

LOAD = 128  # bits that a thread loads at once
Config = tuple[int, int, int, int]  # splits of K, columns a program, warps, depth


def pick_config(weight: PackedWeight, tuned: dict, defaults: dict) -> Config:
    """The tuned configuration by (K, N, bits a weight), else the default by bits."""
    return tuned.get((weight.packed.shape[0], weight.N, weight.bits), defaults[weight.bits])


def block_columns(preferred: int, weight: PackedWeight) -> int:
    """Columns a program: as many as preferred, where these are whole groups or fit into one."""
    misfit = weight.bits == 4 and weight.group % preferred and preferred % weight.group
    return SMALLEST_GROUP if misfit else preferred


def launch_config(x: CompactVector, weight: PackedWeight, parts: int, config: Config) -> dict:
    """Compile-time arguments of `gather_gemv_loop` for x and a weight whose columns make so many equal parts."""
    (slots, width), N, bits = x.index.shape, weight.N, weight.bits
    splits, block_n, warps, depth = config
    block_n = block_columns(block_n, weight)
    lanes = max(warps * 32 * LOAD // (block_n * bits), 1)
    if slots == 1:
        fewest = triton.cdiv(width, MOST_ROWS // 4 * 4 * lanes) if bits <= 8 else 1
        splits = max(min(splits, triton.cdiv(width, 4 * lanes)), fewest)
    else:
        splits = max(min(splits, slots), triton.cdiv(slots, lanes))
    share = triton.cdiv(slots, splits)
    each = 4 * lanes * (splits if slots == 1 else 1) // triton.next_power_of_2(share)  # places of a slot a step
    if bits <= 8 and 4 * triton.cdiv(width, each) > MOST_ROWS:
        most = MOST_ROWS // 4 * each
        raise ValueError(f"slots of {width} channels are too wide for int8 and int4: expected at most {most}")
    return {
        "N": N, "WHOLE": N // parts % block_n == 0, "ROW": weight.words.shape[1], "SLOTS": slots, "SLOT": width,
        "SPLITS": splits, "SHARE": share, "LANES": lanes, "BLOCK_N": block_n, "DEPTH": depth, "BITS": bits,
        "GROUP": weight.group, "OFFSET": offset_type(weight.words), "num_warps": warps,
    }  # fmt: skip
