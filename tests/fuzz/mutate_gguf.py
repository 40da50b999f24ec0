"""Mutations of GGUF files: metadata in place, metadata written anew, tensors' entries, counts, quantized blocks."""

import os
import random
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType as Kind

NUMBERS = (0, 1, 2, 3, 7, 63, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
REPLACED = ((Kind.UINT32, 3), (Kind.INT32, -1), (Kind.UINT64, 2**63), (Kind.FLOAT32, 0.5), (Kind.FLOAT32, float("nan")))
REPLACED += (
    (Kind.FLOAT64, 1e300),
    (Kind.BOOL, True),
    (Kind.STRING, ""),
    (Kind.STRING, "text"),
    (Kind.STRING, "x" * 9000),
)
REPLACED += (
    (Kind.ARRAY, [1, 2]),
    (Kind.ARRAY, ["a"]),
    (Kind.ARRAY, [True]),
    (Kind.ARRAY, [0.5] * 300),
    (Kind.UINT8, 1),
)
NAMED = {  # values that a file may well have, and some that none has
    "tokenizer.ggml.model": ("gpt2", "llama", "bert", "t5", "rwkv", "no_vocab"),
    "tokenizer.ggml.pre": ("default", "gpt-2", "smollm", "qwen2", "llama-bpe", "llama3", "tekken", "unknown"),
    "general.architecture": ("llama", "qwen2", "qwen3", "mistral", "gemma3", "a\nb"),
    "tokenizer.chat_template": ("{{", "{{ 10 ** 5000 }}", "{% for m in messages %}{{ m.content }}{% endfor %}"),
}
OFFSET = 5  # the part of a tensor's entry that says where its data are: right behind those before it, says llama.cpp
IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")


def mutate_entry(rng: random.Random, path: Path) -> str:
    """A number of the file's own bookkeeping changes where it stands: counts, lengths, types, shapes, offsets."""
    reader = gguf.GGUFReader(path, "r+")
    fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
    tensors = [tensor.field for tensor in reader.tensors]
    field = rng.choice(tensors if rng.random() < 0.5 else fields)
    places = [i for i, part in enumerate(field.parts) if len(part)][:12]
    place = rng.choice(places)
    part = field.parts[place]
    most = 2 ** (8 * part.dtype.itemsize) - 1
    index, number = rng.randrange(len(part)), rng.choice(NUMBERS)
    if part.dtype.kind in "ui":
        signed = part.dtype.kind == "i"
        part[index] = min(number, most >> signed)
    elif part.dtype.kind == "f":
        part[index] = number = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30))
    else:
        part[index] = number = not part[index]
    reader.data.flush()
    moved = "offset" if field in tensors and place == OFFSET else "entry"
    return f"{moved}: part {place}[{index}] of {field.name[:60]} = {number}"


def mutate_metadata(rng: random.Random, path: Path) -> str:
    """A key is removed, replaced by a value of another kind or by a plausible one, or a special token is moved."""
    fields, named = gguf.GGUFReader(path).fields, [key for key in sorted(NAMED)]
    keys = sorted(key for key in fields if not key.startswith("GGUF."))
    kind, key = rng.choice(("remove", "replace", "replace", "named", "id", "list", "list")), rng.choice(keys)
    value: Any = None
    if kind == "replace":
        value = rng.choice(REPLACED)
    elif kind == "named":
        key = rng.choice(named)
        value = (Kind.STRING, rng.choice(NAMED[key]))
    elif kind == "id":
        key = f"tokenizer.ggml.{rng.choice(IDS)}_token_id"
        value = rng.choice(
            ((Kind.UINT32, rng.choice((0, 1, 100, 259, 260, 2**32 - 1))), (Kind.INT32, -1), (Kind.UINT64, 2**63))
        )
    elif kind == "list":
        key = rng.choice([key for key in keys if isinstance(fields[key].contents(), list)])
        value = (Kind.ARRAY, _other_list(rng, fields[key].contents()))
    rewrite(path, {key: value})
    return f"metadata: {kind} {key} = {str(value)[:80]}"


def _other_list(rng: random.Random, found: list) -> list:
    """A list of the same kind: longer, shorter, empty, of twins, or with one entry that is another."""
    other, place = list(found), rng.randrange(len(found))
    kind = rng.choice(("short", "long", "twin", "entry", "entry", "reverse", "one"))
    if kind == "short":
        return other[:-1]
    if kind == "long":
        return [*other, other[0]]
    if kind == "one":
        return other[:1]
    if kind == "reverse":
        return other[::-1]
    if kind == "twin":
        other[place] = other[place - 1]
    elif isinstance(found[0], str):
        other[place] = rng.choice(("", " ", "\n", "🙂", "<0x0A>", "a b c", "x" * 3000, "</s>", "<|im_end|>"))
    elif isinstance(found[0], float):
        other[place] = rng.choice((float("nan"), float("inf"), -1e30, 0.0))
    else:
        other[place] = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 99, -1))
    return other


def mutate_blocks(rng: random.Random, path: Path) -> str:
    """Bytes of a tensor's data change: weights, or the scales of quantized blocks."""
    reader = gguf.GGUFReader(path)
    tensor = rng.choice(reader.tensors)
    start, size, name = tensor.data_offset, tensor.n_bytes, tensor.name
    with open(path, "r+b") as file:
        kind = rng.choice(("bit", "NaN", "ones", "zeros"))
        place = start + rng.randrange(size) // 4 * 4
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(
            {"bit": bytes([byte ^ 128]), "NaN": b"\x00\x7e\xc0\x7f", "ones": b"\xff" * 4, "zeros": bytes(64)}[kind]
        )
        file.truncate(max(os.path.getsize(path), start))
    return f"blocks: {kind} at {place - start} of {name}"


def rewrite(path: Path, changes: dict[str, tuple[Kind, Any] | None]) -> None:
    """Writes the file anew with other metadata; None removes a key."""
    reader = gguf.GGUFReader(path)
    copy = path.with_name("copy.gguf")
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    given = {key: (field.types[0], field.contents()) for key, field in fields.items()}
    subs = {key: field.types[-1] for key, field in fields.items() if field.types[0] == Kind.ARRAY}
    given |= changes
    architecture = (given.get("general.architecture") or (Kind.STRING, "llama"))[1]
    writer = gguf.GGUFWriter(copy, str(architecture))
    writer.kv_data[0].clear()
    for key, value in given.items():
        if value is not None:
            same = key in subs and key not in changes
            writer.add_key_value(key, value[1], value[0], subs[key] if same else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    copy.replace(path)
