"""A GGUF file's own values in our model.safetensors: quantized tensors in another order, nothing rounded again.

Tensors of one type that stand beside each other in a layer of ours (q and k; gate and up) become one part of it. A
linear layer may also be dense as a whole; norms and biases are kept in fp32. A few outputs at a time are in memory
besides the part that is written.
"""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from teal_fast.files.checkpoint import METADATA, WEIGHTS
from teal_fast.files.conversion import find_sources, stack, stored_shape
from teal_fast.files.gguf_blocks import to_blocks
from teal_fast.files.load import stored_as
from teal_fast.files.store import write_safetensors
from teal_fast.kernels.block_operand import tensors_of
from teal_fast.kernels.block_planes import STRIP
from teal_fast.kernels.block_values import some_outputs
from teal_fast.kernels.blocks import BLOCK_TYPES
from teal_fast.model import ModelArgs, Transformer
from teal_fast.sparse_model import sparsify
from teal_fast.weights.blocks import BlockPart
from teal_fast.weights.formats import BlockFormat

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TODO = "convert the file with `python -m teal_fast.scripts.convert_gguf --dequantize`"
BYTES_AT_ONCE = 2**21  # of the file: what they become on the way takes some ten times as much


class Source(NamedTuple):
    """The tensors of a GGUF file by name: types, shapes, values of such a dtype, and rows as they are stored."""

    types: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, torch.dtype], Tensor]
    read_stored: Callable[[str], Tensor]


class Part(NamedTuple):
    """Tensors of the file that make a part of a layer."""

    kind: str
    sources: tuple[str, ...]


def write_kept(
    folder: Path,
    args: ModelArgs,
    names: dict[str, tuple[str, ...]],
    source: Source,
    file_type: str,
    dtype: torch.dtype,
) -> None:
    """Writes model.safetensors with the file's own values. names: see `find_sources`; dtype: of what is computed.

    Raises ValueError naming a tensor of a type that has no layout here.
    """
    expected, made_of = find_sources(args, names, source.shapes)
    parts = {}
    for name, shape in expected.items():
        if len(shape) == 2 and (found := find_parts(source.types, made_of[name])):
            parts[name.removesuffix(".weight")] = found
    outputs = {
        module: tuple((part.kind, sum(source.shapes[name][0] for name in part.sources)) for part in found)
        for module, found in parts.items()
    }
    format = BlockFormat(file_type, outputs, dtype)
    with torch.device("meta"):
        model = sparsify(Transformer(args), format)
    writer = Writer(source, made_of, parts)
    layout = {}
    for name, parameter in model.named_parameters():
        stored = stored_as(name)
        if stored in expected:
            layout[stored] = (writer.dtype(stored), stored_shape(stored, expected[stored]))
        else:
            layout[stored] = (parameter.dtype, parameter.shape)
    write_safetensors(folder / WEIGHTS, layout, writer.read, METADATA | format.metadata())


def find_parts(types: dict[str, str], sources: tuple[str, ...]) -> list[Part]:
    """The parts of a matrix of ours that these tensors make, none where it is dense."""
    for name in sources:
        if types[name] not in BLOCK_TYPES and types[name] not in FLOATS:
            raise ValueError(f"{name} is of type {types[name]}, which is not kept as it is: {TODO}")
    if all(types[name] in FLOATS for name in sources):
        return []
    if dense := [name for name in sources if types[name] in FLOATS]:
        raise ValueError(f"{dense[0]} is {types[dense[0]]} beside quantized weights of its layer: {TODO}")
    return [Part(kind, tuple(group)) for kind, group in groupby(sources, types.__getitem__)]


class Writer:
    """The tensors of the checkpoint by stored name, made one part at a time."""

    def __init__(self, source: Source, made_of: dict[str, tuple[str, ...]], parts: dict[str, list[Part]]):
        self.source, self.made_of, self.parts = source, made_of, parts
        self.made: dict[str, Tensor] = {}  # of the part whose tensors are being written

    def dtype(self, name: str) -> torch.dtype:
        """That of a dense tensor: the file's, and fp32 for vectors and where the file has several."""
        types = {self.source.types[part] for part in self.made_of[name]}
        matrix = len(self.source.shapes[self.made_of[name][0]]) == 2
        return FLOATS[types.pop()] if matrix and len(types) == 1 else torch.float32

    def read(self, name: str) -> Tensor:
        if name in self.made_of:
            return stack(name, [self.source.read(part, self.dtype(name)) for part in self.made_of[name]])
        if name not in self.made:
            prefix, _ = name.rsplit(".", 1)
            module, number = prefix.split(".weight.parts.")
            part = self.lay_out(self.parts[module][int(number)])
            self.made = {f"{prefix}.{tensor}": parameter.data for tensor, parameter in part.named_parameters()}
        return self.made[name]

    def lay_out(self, part: Part) -> BlockPart:
        stored = [self.source.read_stored(name) for name in part.sources]
        rows = stored[0] if len(stored) == 1 else torch.cat(stored)
        K = self.source.shapes[part.sources[0]][1]
        made = BlockPart.empty(BLOCK_TYPES[part.kind], K, len(rows))
        step = max(BYTES_AT_ONCE // rows.shape[1] // STRIP, 1) * STRIP
        for begin in range(0, len(rows), step):
            found = to_blocks(rows[begin : begin + step], part.kind, K)
            places = some_outputs(made.blocks, begin, begin + step)
            for place, tensor in zip(tensors_of(places), tensors_of(found), strict=True):
                if place is not None:
                    place.copy_(tensor)
        return made
