"""Mutations of safetensors files: of the header's entries, of the header as bytes, of values, and of stored types."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SIZES = (-1, 0, 1, 2, 63, 2**31, 2**62, 2**64, 1.5, "64", None, [4], True)
DTYPES = ("F32", "BF16", "F16", "F64", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "F4", "X", "", None, 3)
NAMES = (
    "",
    "x",
    "a/b",
    "..",
    "layers.99.attention.wqkv.weight",
    "output.weight",
    "🙂",
    "a\nb",
    "x" * 5000,
    "__metadata__",
)
METADATA = (None, {}, [], "text", {"format": "pt"}, {"format": 3}, {"a": {"b": "c"}}, {"format": None})
VALUES = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45, 0.0, -0.0, 65504.0)


def mutate_header(rng: random.Random, path: Path) -> str:
    """One entry of the header says something else: type, shape, offsets, name, metadata. The data stay."""
    header, data = _read(path)
    names = sorted(name for name in header if name != "__metadata__")
    name, other = rng.choices(names, k=2)
    entry = header[name]
    kind = rng.choice(("dtype", "shape", "offsets", "name", "metadata", "metadata", "drop", "extra", "swap", "entry"))
    if kind == "dtype":
        entry["dtype"] = value = rng.choice(DTYPES)
    elif kind == "shape":
        value = _other_shape(rng, entry["shape"])
        entry["shape"] = value
    elif kind == "offsets":
        begin, end = entry["data_offsets"]
        value = rng.choice(((begin, end + 4), (begin + 2, end), (end, begin), (-4, end), (begin, 2**63), (begin,)))
        value = rng.choice(
            (value, [begin, end, end], "0", None, [begin, 2**70], [float(begin), end], [begin + 1, end + 1])
        )
        entry["data_offsets"] = value
    elif kind == "name":
        value = rng.choice((*NAMES, name.upper(), f"{name}2", f"model.{name}"))
        header[value] = header.pop(name)
    elif kind == "metadata":
        value = _other_metadata(rng, header.get("__metadata__"))
        header["__metadata__"] = value
    elif kind == "drop":
        value = header.pop(name)
    elif kind == "extra":
        value = rng.choice((*NAMES, f"{name}.scale"))
        header[value] = dict(entry)
    elif kind == "swap":
        value = other
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    else:
        header[name] = value = rng.choice((None, [], 3, {}, {"dtype": "F32"}, "x"))
    _write(path, json.dumps(header).encode(), data)
    return f"header: {kind} of {name[:60]} = {str(value)[:60]!r}"


def _other_shape(rng: random.Random, shape: list[int]) -> Any:
    split = [shape[0] // 2, 2, *shape[1:]]
    choices = [shape[::-1], [*shape, 1], [1, *shape], split, [], None, "x", {}, [[*shape]]]
    changed = list(shape)
    if changed:
        changed[rng.randrange(len(changed))] = rng.choice(SIZES)
    return rng.choice((*choices, changed, changed, changed))


def _other_metadata(rng: random.Random, found: dict[str, str] | None) -> Any:
    if not found or rng.random() < 0.3:
        return rng.choice(METADATA)
    key = rng.choice(sorted(found))
    changed = dict(found)
    inner = found[key]
    if inner.startswith("{") and rng.random() < 0.9:  # a calibration's, as JSON
        about = json.loads(inner)
        part = about
        while isinstance(part[name := rng.choice(sorted(part))], dict) and part[name] and rng.random() < 0.7:
            part = part[name]
        part[name] = rng.choice((None, True, 3, [], {}, ["a"], "x", 2**70, "x" * 9000))
        if rng.random() < 0.2:
            del part[name]
        changed[key] = json.dumps(about)
    else:
        changed[key] = rng.choice(
            ("", "3", "x", "9" * 5000, "[" * 9000, "null", "[]", "{}", "1" * 8, "0", "-1", "64.0")
        )
        if rng.random() < 0.3:
            del changed[key]
    return changed


def mutate_length(rng: random.Random, path: Path) -> str:
    """The header's length is another, or the header is no JSON object."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        other = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8))
        path.write_bytes(other.to_bytes(8, "little") + data[8:])
        return f"header: length {other} instead of {size}"
    text = rng.choice(
        (b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"a":' * 5000, b"[" * 100_000, b'{"\\ud800": 1}')
    )
    _write(path, text, data[8 + size :])
    return f"header: {text[:20]!r} of {len(text)} bytes"


def mutate_values(rng: random.Random, path: Path) -> str:
    """One value or all of one tensor become NaN, inf, huge or nothing; a curve turns around."""
    tensors, metadata = load_file(path), _read(path)[0].get("__metadata__")
    name = rng.choice(sorted(tensors))
    flat, value = tensors[name].flatten(), rng.choice(VALUES)
    kind = rng.choice(("one", "one", "all", "reverse", "negative"))
    if not flat.is_floating_point():
        kind, value = (
            rng.choice(("one", "all", "reverse")),
            rng.choice((-128, 127, 0)) % (256 if flat.dtype == torch.uint8 else 128),
        )
    if kind == "one":
        flat[rng.randrange(len(flat))] = value
    elif kind == "all":
        flat[:] = value
    elif kind == "reverse":
        flat = flat.flip(0)
    else:
        flat = -flat
    tensors[name] = flat.reshape(tensors[name].shape).contiguous()
    save_file(tensors, path, metadata)
    return f"values: {kind} of {name} = {value}"


def mutate_stored(rng: random.Random, path: Path) -> str:
    """One tensor, or all, are soundly stored in another type or in another shape."""
    tensors, metadata = load_file(path), _read(path)[0].get("__metadata__")
    dtype = rng.choice(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64)
    )
    chosen = sorted(tensors) if rng.random() < 0.2 else [rng.choice(sorted(tensors))]
    kind = rng.choice(("type", "type", "transpose", "row less", "row more", "flat"))
    for name in chosen:
        tensor = tensors[name]
        changed = {
            "type": lambda x: x.to(dtype),
            "transpose": lambda x: x.t() if x.ndim == 2 else x[None],
            "row less": lambda x: x[:-1],
            "row more": lambda x: torch.cat((x, x[:1])),
            "flat": lambda x: x.flatten(),
        }[kind](tensor)
        tensors[name] = changed.contiguous().clone()
    save_file(tensors, path, metadata)
    return f"stored: {kind} {dtype if kind == 'type' else ''} of {chosen[0] if len(chosen) == 1 else 'all'}"


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _write(path: Path, text: bytes, data: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
