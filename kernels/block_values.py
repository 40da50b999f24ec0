"""teal::block_columns and teal::block_outputs: a share of the values of a weight in blocks (kernels/blocks.py).

So that no whole layer is widened: a prompt's product takes some hundred columns [K, end - begin] at a time, an
embedding a token's own column as a row. Values are those of dequantize_blocks, rounded to `dtype`.
"""

import ctypes
from ctypes import c_int64

import torch
from torch import Tensor

from teal_fast.kernels.backend import register
from teal_fast.kernels.block_operand import KINDS, blocks_of, part_of, tensors_of
from teal_fast.kernels.block_planes import STRIP, places
from teal_fast.kernels.blocks import Blocks, dequantize_blocks
from teal_fast.kernels.native import TYPES, library, pointer


def block_columns_reference(blocks: Blocks, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    return dequantize_blocks(blocks)[:, begin:end].to(dtype)


def block_outputs_reference(blocks: Blocks, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_blocks(blocks)[:, outputs].t().to(dtype)


def _columns_torch(tensors: list[Tensor | None], kind: int, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    values = dequantize_blocks(some_outputs(blocks_of(tensors, kind), begin, end + -end % STRIP))
    return values[:, : end - begin].to(dtype)


def some_outputs(blocks: Blocks, begin: int, end: int) -> Blocks:
    """The outputs from `begin` to before `end`, multiples of STRIP or beyond the last; tensors are shared."""
    planes = zip(blocks.planes, blocks.kind.planes, strict=True)
    part = tuple(plane[:, begin * bits // 8 : end * bits // 8] for plane, bits in planes)
    return _with(blocks, part, slice(begin, end))


def _with(blocks: Blocks, planes: tuple[Tensor, ...], outputs: Tensor | slice) -> Blocks:
    kind, _, *scales = blocks
    return Blocks(kind, planes, *(None if scale is None else scale[:, outputs] for scale in scales))


def _outputs_torch(tensors: list[Tensor | None], kind: int, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Of other outputs nothing is read."""
    blocks, codes, shift = blocks_of(tensors, kind), 0, 0
    strip = outputs // STRIP * STRIP
    width = (blocks.N - strip).clamp(max=STRIP)
    place = places(STRIP).to(outputs.device)[outputs % STRIP]
    for plane, bits in zip(blocks.planes, blocks.kind.planes, strict=True):
        row = width * bits // 8
        stored = plane[:, strip * bits // 8 + place % row]  # [K, T]
        codes = codes | (stored >> (place // row * bits).byte() & (2**bits - 1)) << shift
        shift += bits
    return dequantize_blocks(_with(blocks, (), outputs), codes).t().to(dtype).contiguous()


def _columns_cpu(tensors: list[Tensor | None], kind: int, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    if (native := library()) is None or dtype not in TYPES:
        return _columns_torch(tensors, kind, begin, end, dtype)
    K = blocks_of(tensors, kind).K
    y = torch.empty(K, end - begin, dtype=dtype)
    part = ctypes.byref(part_of(tensors, kind, K, tensors[2].shape[1]))
    native.teal_block_columns(
        TYPES[dtype], part, c_int64(begin), c_int64(end), pointer(y), torch.get_num_threads()
    )  # fmt: skip
    return y


def _outputs_cpu(tensors: list[Tensor | None], kind: int, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    N = tensors[2].shape[1]
    if len(outputs) and not 0 <= outputs.min() <= outputs.max() < N:  # here, where values are: a compiled call has none
        raise IndexError(f"outputs from {outputs.min()} to {outputs.max()} are not all from 0 to {N - 1}")
    if (native := library()) is None or dtype not in TYPES:
        return _outputs_torch(tensors, kind, outputs, dtype)
    K, outputs = blocks_of(tensors, kind).K, outputs.contiguous()
    y = torch.empty(len(outputs), K, dtype=dtype)
    part = ctypes.byref(part_of(tensors, kind, K, N))
    native.teal_block_outputs(TYPES[dtype], part, pointer(outputs), c_int64(len(outputs)), pointer(y))
    return y


def _inputs(tensors: list[Tensor | None], kind: int) -> int:
    return blocks_of(tensors, kind).K


_block_columns = register(
    "block_columns",
    "(Tensor?[] tensors, int kind, int begin, int end, ScalarType dtype) -> Tensor",
    cuda=_columns_torch,
    cpu=_columns_cpu,
    fake=lambda tensors, kind, begin, end, dtype: tensors[2].new_empty(
        _inputs(tensors, kind), end - begin, dtype=dtype
    ),
)
_block_outputs = register(
    "block_outputs",
    "(Tensor?[] tensors, int kind, Tensor outputs, ScalarType dtype) -> Tensor",
    cuda=_outputs_torch,
    cpu=_outputs_cpu,
    fake=lambda tensors, kind, outputs, dtype: tensors[2].new_empty(len(outputs), _inputs(tensors, kind), dtype=dtype),
)


def block_columns(blocks: Blocks, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Values [K, end - begin] of outputs `begin`, in whole strips, to `end`. Raises ValueError outside the weight."""
    if begin % STRIP or not 0 <= begin < end <= blocks.N:
        raise ValueError(
            f"block_columns takes 0 <= begin < end <= {blocks.N}, begin in whole {STRIP}s: got {begin}, {end}"
        )
    return _block_columns(tensors_of(blocks), KINDS.index(blocks.kind.name), begin, end, dtype)


def block_outputs(blocks: Blocks, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [T, K] of outputs int64 [T]. Raises ValueError on others, IndexError outside the weight."""
    if outputs.dim() != 1 or outputs.dtype != torch.int64:
        raise ValueError(f"block_outputs takes outputs [T] int64, got {list(outputs.shape)} {outputs.dtype}")
    return _block_outputs(tensors_of(blocks), KINDS.index(blocks.kind.name), outputs, dtype)
