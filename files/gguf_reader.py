"""Reading GGUF files: what the gguf package takes and should not is refused, and tensors become floats."""

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from teal_fast.files.store import one_line, short

# By id: what files hold that llama.cpp reads no longer (ggml/include/ggml.h).
REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
REMOVED_TYPES |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
VALUES_AT_ONCE = 2**22  # dequantized at a time: 16 MB of fp32, where an embedding table may take gigabytes


class UnreadableTypeError(ValueError):
    """A tensor is stored in a type that the gguf package cannot dequantize."""


class Reader(gguf.GGUFReader):
    """Refuses what gguf.GGUFReader 0.19 takes or never finishes, and llama.cpp's gguf.cpp refuses.

    That is a list or value that is longer than the file, lists within lists, tensors elsewhere than behind one another,
    and, by the tensor's name, types that cannot be dequantized.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        found = super()._get(offset, dtype, count, override_order)
        self._check_length(len(found), count, offset)
        return found

    def _check_length(self, found: int, expected: int, offset: int) -> None:
        if found < expected:
            raise ValueError(f"it ends at byte {len(self.data)}, within what begins at {offset}")

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple:
        """Of a list the entries alone, numbers in one array: gguf's two arrays an entry were 0.8 GB of Gemma 3's."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
        if kind == gguf.GGUFValueType.ARRAY:
            raise ValueError("it has lists within lists")
        self._get(orig_offs, np.uint8, count)  # an entry has at least a byte
        place, kind = orig_offs + 12, gguf.GGUFValueType(kind)
        if kind != gguf.GGUFValueType.STRING:
            values = self._get(place, self.gguf_scalar_to_np[kind], count)
            return 12 + values.nbytes, [values], [0], [gguf.GGUFValueType.ARRAY, kind]
        data, texts = memoryview(self.data), []
        for _ in range(count):
            size, place = int(self._get(place, np.uint64)[0]), place + 8
            texts.append(data[place : place + size])
            self._check_length(len(texts[-1]), size, place)
            place += size
        return place - orig_offs, texts, [*range(count)], [gguf.GGUFValueType.ARRAY, kind]

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            _, name, _, _, kind, _ = field.parts
            if problem := type_problem(int(kind[0])):
                name = short(bytes(name).decode("utf-8", "replace"))
                raise UnreadableTypeError(f"tensor {name} is of type {problem}: take a file in another quantization")
        super()._build_tensors(start_offs, fields)
        place = start_offs
        for tensor in self.tensors:
            if tensor.data_offset != place:
                raise ValueError(f"tensor {short(tensor.name)} lies at byte {tensor.data_offset}, expected {place}")
            place += -(-tensor.n_bytes // self.alignment) * self.alignment


@cache
def type_problem(kind: int) -> str | None:
    """Names a tensor type that cannot be dequantized and says why; None for one that can."""
    if kind not in iter(gguf.GGMLQuantizationType):
        known = f"{REMOVED_TYPES[kind]}, which llama.cpp has dropped" if kind in REMOVED_TYPES else "unknown here"
        return f"{kind} ({known})"
    kind = gguf.GGMLQuantizationType(kind)
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return f"{kind} ({kind.name}), which the gguf package cannot dequantize"
    return None


def open_gguf(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a GGUF file")
    try:
        return Reader(path)
    except UnreadableTypeError as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        raise ValueError(f"{path} is truncated or not a GGUF file ({one_line(error)}): download it again") from error


def find_value(reader: gguf.GGUFReader, key: str, kind: type, default: Any = None) -> Any:
    """The metadata at `key`. Raises ValueError when it is missing without a default, or not of type `kind`."""
    field = reader.get_field(key)
    found = default if field is None else field.contents()
    if kind is int and isinstance(found, list) and len({*map(str, found)}) == 1:
        found = found[0]  # some converters give one for each layer, as Granite 4's
    if found is None:
        raise ValueError(f"the GGUF metadata lacks {key[:80]}: cannot tell the model's shape")
    if not isinstance(found, kind):
        raise ValueError(f"the GGUF metadata has {key[:80]} {str(found)[:80]!r}, expected {kind.__name__}")
    return found


def file_type(reader: gguf.GGUFReader) -> str:
    """What the file calls its mixture of tensor types, as Q4_K_M."""
    return file_type_name(find_value(reader, "general.file_type", int, -1))


def file_type_name(number: int) -> str:
    """The name of a mixture of tensor types."""
    known = {kind.value: kind.name.removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    return known.get(number, "gguf")


def dequantize(tensor: gguf.ReaderTensor, dtype: torch.dtype) -> Tensor:
    """The tensor's values in PyTorch's order of dimensions, a few rows at a time so that fp32 takes little memory."""
    weight = torch.empty([int(size) for size in reversed(tensor.shape)], dtype=dtype)
    stored, rows = np.atleast_2d(tensor.data), torch.atleast_2d(weight)
    step = max(VALUES_AT_ONCE // rows[0].numel(), 1)
    for first in range(0, len(rows), step):
        values = gguf.quants.dequantize(stored[first : first + step], tensor.tensor_type)
        rows[first : first + step] = torch.from_numpy(np.array(values, dtype=np.float32))
    return weight
