"""Mutations of a checkpoint: every tensor and every metadata key damaged in every way gives one line that names it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal_fast.files.checkpoint import CONFIG, METADATA, WEIGHTS, fingerprint
from teal_fast.files.load import load_model
from teal_fast.quantization.checkpoint import make_quantized
from teal_fast.sparse_model import sparse_layers
from teal_fast.weights.formats import Format
from teal_fast.weights.quantized import Int4Weight

VOCABULARY = 64  # instead of 49,152: files of 1 MB are written quickly
FORMATS = {"dense": None, "int8": Format("int8"), "int4": Format("int4", 64)}
each_format = pytest.mark.parametrize("format", FORMATS)
DEEP = "[" * 100_000


@pytest.fixture(scope="session")
def folders(even, tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint with a small vocabulary in every format."""
    root = tmp_path_factory.mktemp("formats")
    folder = root / "dense"
    folder.mkdir()
    tensors = load_file(even / WEIGHTS)
    tensors["tok_embeddings.weight"] = tensors["tok_embeddings.weight"][:VOCABULARY].clone()
    save_file(tensors, folder / WEIGHTS, METADATA)
    config = json.loads((even / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"vocab_size": VOCABULARY}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(even / name, folder)
    for name, format in FORMATS.items():
        if format:
            (root / name).mkdir()
            make_quantized(folder, root / name, format)
    return {name: root / name for name in FORMATS}


def metadata_of(format: str) -> dict[str, str]:
    return METADATA | (FORMATS[format].metadata() if FORMATS[format] else {})


def as_version_1(tensors: dict, metadata: dict) -> tuple[dict, dict]:
    """The same checkpoint as version 1 stored it."""
    old = {name.replace(".packed", ".weight"): tensor for name, tensor in tensors.items()}
    scales = {"row_scales": "at most 1"} if metadata.get("weights") == "int4" else {}
    return old, metadata | {"version": "1"} | scales


def refusal(folder: Path, **options) -> str:
    """The one line with which load_model refuses the folder."""
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_model(folder, **options)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 600
    return line


def tensor_names(format: str) -> list[str]:
    """Of the files, spelled out."""
    packed = "weight" if format == "dense" else "packed"
    names = ["tok_embeddings.weight", "norm.weight"]
    for i in range(2):
        names += [f"layers.{i}.attention_norm.weight", f"layers.{i}.ffn_norm.weight"]
        for layer in ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2"):
            names += [f"layers.{i}.{layer}.{packed}"] + ([f"layers.{i}.{layer}.scale"] if format != "dense" else [])
    return names + (["output.packed", "output.scale"] if format != "dense" else [])


OTHER_TYPE = {torch.float32: torch.bfloat16, torch.int8: torch.uint8, torch.uint8: torch.int8}
MUTATIONS = {
    "dtype": lambda tensors, name: tensors.update({name: tensors[name].to(OTHER_TYPE[tensors[name].dtype])}),
    "integers": lambda tensors, name: tensors.update({name: tensors[name].to(torch.int64)}),
    "shape": lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}),
    "dimensions": lambda tensors, name: tensors.update({name: tensors[name][None].clone()}),
    "scalar": lambda tensors, name: tensors.update({name: tensors[name].flatten()[0].clone()}),
    "missing": lambda tensors, name: tensors.pop(name),
    "renamed": lambda tensors, name: tensors.update({f"{name}.extra": tensors[name].clone()}),
}
CASES = [(format, name) for format in FORMATS for name in tensor_names(format)]


VERSIONS = [(*case, "2") for case in CASES] + [(*case, "1") for case in CASES if case[0] == "int4"]  # in other names


@pytest.mark.parametrize("format, name, version", VERSIONS, ids=map("-".join, VERSIONS))
def test_every_tensor_is_checked(folders, tmp_path, format, name, version):
    shutil.copy(folders[format] / CONFIG, tmp_path)
    whole, metadata = load_file(folders[format] / WEIGHTS), metadata_of(format)
    if version == "1":
        whole, metadata = as_version_1(whole, metadata)
        name = name.replace(".packed", ".weight")
    for mutation, mutate in MUTATIONS.items():
        tensors = dict(whole)
        mutate(tensors, name)
        save_file(tensors, tmp_path / WEIGHTS, metadata)
        line = refusal(tmp_path)
        assert name in line and WEIGHTS in line, (mutation, line)


OTHERS = [torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]
OTHERS += [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_one_tensor_of_another_type_in_a_bf16_model(folders, tmp_path, dtype):
    """As a C++ step that takes all layers for bf16 would read it: 42 % off, or a signal."""
    shutil.copy(folders["dense"] / CONFIG, tmp_path)
    whole = {name: tensor.bfloat16() for name, tensor in load_file(folders["dense"] / WEIGHTS).items()}
    save_file(whole, tmp_path / WEIGHTS, METADATA)
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.bfloat16}
    for name in tensor_names("dense"):
        save_file(whole | {name: (50 * whole[name]).to(dtype)}, tmp_path / WEIGHTS, METADATA)
        assert f"{name} is " in (line := refusal(tmp_path)) and "expected BF16 as most others are" in line


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("format, name", CASES, ids=map("-".join, CASES))
def test_nan_and_inf_are_refused(folders, tmp_path, format, name, value):
    shutil.copy(folders[format] / CONFIG, tmp_path)
    tensors = load_file(folders[format] / WEIGHTS)
    if tensors[name].is_floating_point():
        tensors[name].view(-1)[-3] = value
    elif format == "int4" and "feed_forward" in name and name.endswith("packed"):
        tensors[name].view(-1)[-32:] = torch.full((16,), value).bfloat16().view(torch.uint8)  # row scales, then zeros
        tensors[name].view(-1)[-32 + 2 * (128 // 64) :] = 0
    else:
        return  # bytes can hold neither
    save_file(tensors, tmp_path / WEIGHTS, metadata_of(format))
    assert f"{name} holds NaN or inf" in refusal(tmp_path, thorough=True)
    if tensors[name].is_floating_point() and not name.endswith("scale"):
        assert f"{name} holds NaN or inf" in refusal(tmp_path, dtype=torch.bfloat16)  # the pass that converts
    if tensors[name].ndim == 1:
        assert f"{name} holds NaN or inf" in refusal(tmp_path)
    else:
        load_model(tmp_path)  # documented: what stays memory-mapped is not read


def test_values_that_the_type_asked_for_cannot_hold_are_refused(folders, tmp_path):
    shutil.copy(folders["dense"] / CONFIG, tmp_path)
    tensors = load_file(folders["dense"] / WEIGHTS)
    tensors["layers.1.feed_forward.w2.weight"][3, 4] = 1e6
    save_file(tensors, tmp_path / WEIGHTS, METADATA)
    load_model(tmp_path, dtype=torch.bfloat16, thorough=True)
    assert "layers.1.feed_forward.w2.weight holds" in refusal(tmp_path, dtype=torch.float16)


@each_format
def test_version_1_loads_as_the_same_model(folders, tmp_path, format):
    shutil.copy(folders[format] / CONFIG, tmp_path)
    tensors, metadata = as_version_1(load_file(folders[format] / WEIGHTS), metadata_of(format))
    assert not any("packed" in name for name in tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    old, new = (dict(load_model(folder).named_parameters()) for folder in (tmp_path, folders[format]))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in new)


# --- metadata


def with_metadata(folder: Path, out: Path, change: dict) -> Path:
    """A copy whose header has other metadata: any JSON, text as it is, or None for a key that is absent."""
    shutil.copy(folder / CONFIG, out)
    data = (folder / WEIGHTS).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header["__metadata__"] = {k: v for k, v in (header["__metadata__"] | change).items() if v is not None}
    text = json.dumps(header)
    text = text.replace('"NESTED"', DEEP).encode()
    (out / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[size:])
    return out


KEYS = [(format, key) for format in FORMATS for key in metadata_of(format)]


@pytest.mark.parametrize("format, key", KEYS, ids=map("-".join, KEYS))
@pytest.mark.parametrize(
    "value", [None, "", "3", "teal", "[N, K]", "-64", "0", "6e1", "٦٤", "9" * 5000, DEEP, "x" * 10_000_000]
)
def test_every_metadata_key_is_checked(folders, tmp_path, format, key, value):
    line = refusal(with_metadata(folders[format], tmp_path, {key: value}))
    if (key, value) == ("weights", None):  # then it is a dense one, of other tensors
        assert "lacks layers.0.attention.wqkv.weight" in line
    else:
        assert f"{WEIGHTS}: {key} " in line


@pytest.mark.parametrize("value", [1, True, [], {}, 1.5, "NESTED"], ids=repr)
@pytest.mark.parametrize("format, key", KEYS, ids=map("-".join, KEYS))
def test_metadata_that_are_no_text_are_refused_by_the_library(folders, tmp_path, format, key, value):
    assert "is truncated or not a safetensors file" in refusal(with_metadata(folders[format], tmp_path, {key: value}))


def test_version_1_of_int4_needs_row_scales(folders, tmp_path):
    shutil.copy(folders["int4"] / CONFIG, tmp_path)
    tensors, metadata = as_version_1(load_file(folders["int4"] / WEIGHTS), metadata_of("int4"))
    save_file(tensors, tmp_path / WEIGHTS, metadata | {"row_scales": "any"})
    assert "row_scales is 'any', expected 'at most 1'" in refusal(tmp_path)


@pytest.mark.parametrize("group", ["128", "192", "32"])  # as many bytes a row as the file has, or none that fit
def test_another_group_is_refused(folders, tmp_path, group):
    line = refusal(with_metadata(folders["int4"], tmp_path, {"group": group}))
    assert f"group {group} does not fit" in line or "feed_forward.w13.packed" in line


# --- config.json


CONFIG_KEYS = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
CONFIG_KEYS += ["head_dim", "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps"]
CONFIG_KEYS += ["rope_parameters", "tie_word_embeddings", "hidden_act"]
WRONG = {"list": [1], "text": "x" * 1000, "long": "9" * 1_000_000, "huge": 10**400, "infinite": 1e999, "nested": "deep"}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_every_key_of_the_config_is_checked(folders, tmp_path, key, wrong):
    shutil.copy(folders["dense"] / WEIGHTS, tmp_path)
    config = json.loads((folders["dense"] / CONFIG).read_text()) | {key: WRONG[wrong]}
    text = json.dumps(config).replace('"deep"', "[" * 50 + "]" * 50).replace("Infinity", "1e999")
    (tmp_path / CONFIG).write_text(text)
    assert key in refusal(tmp_path)


# --- commands, and the fingerprint


@pytest.mark.parametrize(
    "format, name", [("dense", "layers.1.feed_forward.w2.weight"), ("int4", "layers.0.attention.wo.packed")]
)
def test_the_command_ends_in_one_line(folders, tmp_path, command, format, name):
    folder = shutil.copytree(folders[format], tmp_path / "copy")
    tensors = load_file(folder / WEIGHTS)
    MUTATIONS["dtype"](tensors, name)
    save_file(tensors, folder / WEIGHTS, metadata_of(format))
    done = command("generate", "--checkpoint", folder, "--device", "cpu", "--max_new_tokens", 2)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and name in done.stderr, done.stderr


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.ones(2, 2, 2), torch.ones(2, dtype=torch.int64)], ids=str)
def test_the_fingerprint_takes_weights_only(folders, tmp_path, tensor):
    shutil.copy(folders["dense"] / CONFIG, tmp_path)
    save_file(load_file(folders["dense"] / WEIGHTS) | {"norm.weight": tensor}, tmp_path / WEIGHTS, METADATA)
    with pytest.raises(ValueError, match=r"norm\.weight' is .*, no weight"):
        fingerprint(tmp_path)


def test_row_scales_come_out_of_the_rows(folders):
    layers = sparse_layers(load_model(folders["int4"])).values()
    weights = [layer.weight for layer in layers if isinstance(layer.weight, Int4Weight)]
    assert len(weights) == 4
    for weight in weights:
        scales, rest = weight.row_scales()
        assert scales.shape == (weight.in_features, weight.out_features // 64)
        assert 0 < scales.abs().max() <= 1 and not rest.any()
