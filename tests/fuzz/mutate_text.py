"""Mutations of JSON files, templates, tokenizer models and bytes of any file. Each says what it did, in a line."""

import base64
import json
import random
from pathlib import Path
from typing import Any

DEEP = "@deep@"  # stands for what json.dumps could not write
RAW = (
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 400,  # an int that no float holds
    "9" * 5000,
    '"\\ud800"',
    "tru",
    "[" * 70 + "]" * 70,
    "[" * 1000 + "]" * 1000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" * 100_000 + "]" * 100_000,
)
WRONG = (None, True, False, -1, 0, 1, 3, 0.5, 1e-320, 1e308, 2**31, 2**63, 2**70, -(2**63), "", "text", "0", "🙂\u2028")
WRONG += ([], [None], [[1]], {}, {"a": {}}, {"content": "x"}, list(range(300)), "x" * 50_000)
THETA = {"rope_theta": 10000.0}
ROPES = (
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": ["linear"], "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default"}},
)
# Values of config.json that a file may well have, and some that none has.
FIELDS: dict[str, tuple] = {
    "rope_scaling": (*ROPES, "linear", None, {}),
    "rope_parameters": (*ROPES, *(THETA | rope for rope in ROPES), None, [], {}),
    "rope_theta": (1, 1.0, 1e6, 0, -1, "1e4", True, None, 1e308, 1e-300),
    "sliding_window": (4, 1, 0, -1, None, True, 2**40),
    "use_sliding_window": (True, False, "yes"),
    "max_window_layers": (0, 1, -1, 2**40, "1"),
    "layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"], "full", [1, 2], {}),
    "quantization_config": ({}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, "awq", []),
    "hidden_act": ("silu", "gelu", None, 3, ["silu"]),
    "head_dim": (8, 16, 32, 15, 0, None, 2**20, 16.0),
    "num_key_value_heads": (1, 2, 3, 4, 8, None, 0),
    "num_attention_heads": (1, 2, 3, 4, 8, 64, 0, 2**30),
    "num_hidden_layers": (1, 2, 3, 0, 4096, 2**31, 2.0),
    "hidden_size": (32, 63, 64, 128, 2**24, 2**40, 64.0, "64"),
    "intermediate_size": (95, 96, 97, 2**24, -96),
    "vocab_size": (1, 3, 259, 260, 261, 512, 2**24, 2**40),
    "max_position_embeddings": (1, 2, 8, 64, 2**24, 2**62, 0),
    "tie_word_embeddings": (True, False, 1, "true", None),
    "attention_bias": (True, False, 1, None),
    "mlp_bias": (True, False, "no"),
    "rms_norm_eps": (1e-5, 1, 0, -1e-5, "1e-5", True, 1e308, 1e-320),
    "model_type": ("llama", "mistral", "qwen2", "qwen3", "gemma3", "LLAMA", None, ["llama"], 3),
    "eos_token_id": (259, [259, 1], [], None, True, -1, 10**9, 2.0, "2", [[2]], {"a": 1}, [None]),
    "bos_token_id": (1, None, True, "1", 10**9),
    "dtype": ("bfloat16", "float64", "int8", None, 3, "x"),
    "torch_dtype": ("float16", {}, "auto"),
    "partial_rotary_factor": (1.0, 0.5, None, "1"),
    "pretraining_tp": (1, 2),
    "attention_dropout": (0.0, 0.5),
    "auto_map": ({"AutoConfig": "a.B"}, 1),
    "text_config": ({"hidden_size": 64}, None),
}
TEMPLATES = (
    "{{",
    "{% for m in messages %}",
    "{{ nothing.there }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception('a\nb') }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 10 ** 5000 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages | tojson(indent=-1) }}",
    "{{ strftime_now(3) }}",
    "{{ '%' % () }}",
    "{% include 'x' %}",
    "{% set messages = 3 %}{{ messages[0] }}",
    "{{ messages | map(attribute='x') | list }}",
    "{{ '\ud800' | replace('\ud800', '') }}",
    "{% generation %}a{% endgeneration %}",
    "{{ (" * 300 + "1" + ") }}" * 300,
    "{{ " + "-" * 20_000 + "1 }}",
    "",
    "\x00",
)


def mutate_bytes(rng: random.Random, path: Path) -> str:
    """Truncation, flipped bits, an overwritten, repeated or dropped stretch, bytes behind the end."""
    data = bytearray(path.read_bytes())
    size, kind = (
        len(data),
        rng.choice(("cut", "empty", "flip", "flips", "overwrite", "repeat", "drop", "append", "zero")),
    )
    place, length = rng.randrange(max(size, 1)), rng.choice((1, 2, 8, 64, 512))
    if rng.random() < 0.5:  # headers are small, and most is decided there
        place = rng.randrange(min(max(size, 1), 400))
    if kind == "cut":
        del data[rng.choice((place, size - 1, size // 2, 8, 7)) :]
    elif kind == "empty":
        data.clear()
    elif kind in ("flip", "flips") and size:
        for _ in range(1 if kind == "flip" else 8):
            data[place] ^= 1 << rng.randrange(8)
            place = rng.randrange(size)
    elif kind == "overwrite":
        data[place : place + length] = rng.randbytes(length)
    elif kind == "repeat":
        data[place:place] = data[place : place + length]
    elif kind == "drop":
        del data[place : place + length]
    elif kind == "append":
        data += rng.randbytes(length)
    else:
        data[place : place + length] = bytes(len(data[place : place + length]))
    path.write_bytes(data)
    return f"bytes: {kind} at {place} of {size}, {length}"


def mutate_json(rng: random.Random, path: Path) -> str:
    """One place in the tree is removed, renamed, swapped or gets a value of another kind."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict | list) or not tree:
        return mutate_bytes(rng, path)
    node, key, place = _walk(rng, tree)
    kind, raw = rng.choice(("wrong", "wrong", "wrong", "raw", "remove", "rename", "copy", "add", "twin")), None
    if kind == "wrong":
        node[key] = value = rng.choice(WRONG)
        place += f" = {str(value)[:40]!r}"
    elif kind == "raw":
        node[key], raw = DEEP, rng.choice(RAW)
        place += f" = {raw[:20]} of {len(raw)} characters"
    elif kind == "remove":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[rng.choice((f"{key}x", "", key.upper(), "type", "🙂"))] = node.pop(key)
    elif kind == "copy":
        other, name, there = _walk(rng, tree)
        node[key] = json.loads(json.dumps(other[name]))
        place += f" = {there}"
    elif kind == "add" and isinstance(node, dict):
        node[rng.choice(("unknown", "type", "content"))] = rng.choice(WRONG)
    elif isinstance(node, list):
        node.append(json.loads(json.dumps(node[key])))
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    if kind == "twin" and text.startswith("{"):
        name = rng.choice(sorted(tree)) if isinstance(tree, dict) and tree else "a"
        text = f"{{{json.dumps(name)}: {json.dumps(rng.choice(WRONG))}, {text[1:]}"
        place = f"{name} twice"
    path.write_text(text.replace(f'"{DEEP}"', raw or "", 1), encoding="utf-8", errors="surrogatepass")
    return f"JSON: {kind} {place}"


def _walk(rng: random.Random, tree: Any) -> tuple[Any, Any, str]:
    """A random place: its container, its key there, and its path for people."""
    node, place = tree, ""
    while True:
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        place += f".{str(key)[:30]}"
        below = node[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.25:
            return node, key, place
        node = below


def mutate_config(rng: random.Random, path: Path) -> str:
    """One or two fields that matter get values that a config.json may have, or that none has."""
    config = json.loads(path.read_text(encoding="utf-8"))
    changed = []
    for name in rng.sample(sorted(FIELDS), rng.choice((1, 1, 1, 2))):
        config[name] = value = rng.choice(FIELDS[name])
        changed.append(f"{name} = {json.dumps(value)[:120]}")
        if rng.random() < 0.1:
            del config[name]
            changed[-1] = f"{name} removed"
    path.write_text(json.dumps(config), encoding="utf-8")
    return "config: " + ", ".join(changed)


def mutate_template(rng: random.Random, path: Path) -> str:
    """A chat template that is wrong, or a program that wants more than to write a text."""
    template = rng.choice(TEMPLATES)
    if path.suffix == ".jinja":
        path.write_text(template, encoding="utf-8", errors="surrogatepass")
    else:
        config = json.loads(path.read_text(encoding="utf-8"))
        shapes = (
            template,
            [{"name": "default", "template": template}],
            {"default": template},
            [template],
            [{"name": 3}],
        )
        config["chat_template"] = rng.choice((template, template, template, *shapes))
        path.write_text(json.dumps(config), encoding="utf-8")
    return f"template: {template[:60]!r}"


def mutate_tiktoken(rng: random.Random, path: Path) -> str:
    """A line of a tiktoken file is dropped, doubled, spoiled, or gets another rank."""
    lines = path.read_bytes().splitlines()
    kind, place = (
        rng.choice(("drop", "double", "rank", "huge", "base64", "words", "blank", "same")),
        rng.randrange(len(lines)),
    )
    token, rank = lines[place].split()
    if kind == "drop":
        del lines[place]
    elif kind == "double":
        lines.insert(place, lines[place])
    else:
        other = base64.b64encode(rng.randbytes(3))
        spoiled = {"rank": b"%s %d" % (token, rng.choice((-1, 0, len(lines)))), "huge": token + b" " + b"9" * 5000}
        spoiled |= {"base64": b"\xff!" + rank, "words": b"a b c", "blank": b"", "same": other + b" " + rank}
        lines[place] = spoiled[kind]
    path.write_bytes(b"\n".join(lines))
    return f"tiktoken: {kind} in line {place}"


def mutate_sentencepiece(rng: random.Random, path: Path) -> str:
    """A field of the protobuf's top level is dropped, doubled, swapped with another or spoiled inside."""
    data, fields, place = path.read_bytes(), [], 0
    while place < len(data):
        start, place = place, place + 1
        length, shift = 0, 0
        while True:
            byte = data[place]
            length, shift, place = length | (byte & 127) << shift, shift + 7, place + 1
            if byte < 128:
                break
        place += length
        fields.append(bytearray(data[start:place]))
    kind, i, j = rng.choice(("drop", "double", "swap", "spoil", "last")), *rng.choices(range(len(fields)), k=2)
    if kind == "last":  # the trainer's and the normalizer's settings stand there
        i = len(fields) - rng.choice((1, 2))
    if kind == "drop":
        del fields[i]
    elif kind == "double":
        fields.insert(i, fields[j])
    elif kind == "swap":
        fields[i], fields[j] = fields[j], fields[i]
    else:
        fields[i][rng.randrange(2, len(fields[i]))] = rng.randrange(256)
    path.write_bytes(b"".join(fields))
    return f"sentencepiece: {kind} field {i} of {len(fields)}"
