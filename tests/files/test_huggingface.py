"""Hugging Face folders of every layout give the same checkpoint; damaged ones one clear line and nothing on disk."""

import json
import os
import resource
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from teal_fast.files.checkpoint import CONFIG, WEIGHTS
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.tests.memory import peak_bytes
from teal_fast.tests.models import write_tokenizer

CONFIG_FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
PREFIX = "model.layers.0."


def make_model(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG_FIELDS | fields)).to(dtype)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama as transformers saves it. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    make_model().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def damaged(source, tmp_path):
    """A copy of the source, for a test to change."""
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "model"
    convert_huggingface(source, out, None)
    return out


def same_files(one, other):
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    for name in os.listdir(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def write_bins(folder, state, parts):
    """The weights as PyTorch's pickles, in one file or, with an index, in several."""
    names = sorted(state)
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        where = {}
        for part in range(parts):
            shard = f"pytorch_model-{part}.bin"
            torch.save({name: state[name] for name in names[part::parts]}, folder / shard)
            where |= dict.fromkeys(names[part::parts], shard)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def write_shards(folder, tensors, first):
    """Two safetensors files and their index: the names in `first`, and all others."""
    save_file({name: tensors[name] for name in first}, folder / "a.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in first}, folder / "b.safetensors")
    where = {name: "a.safetensors" if name in first else "b.safetensors" for name in tensors}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))


# --- layouts


def test_sharded_safetensors(expected, source, tmp_path):
    make_model().save_pretrained(tmp_path / "hf", max_shard_size="5KB")
    where = json.loads((tmp_path / "hf" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert len({where[f"{PREFIX}self_attn.{part}_proj.weight"] for part in "qkv"}) > 1
    assert any(len(load_file(tmp_path / "hf" / shard)) == 1 for shard in where.values())
    for name in (CONFIG, "tokenizer.json"):
        shutil.copyfile(source / name, tmp_path / "hf" / name)
    convert_huggingface(tmp_path / "hf", tmp_path / "out", None)
    same_files(tmp_path / "out", expected)


@pytest.mark.parametrize("parts", [1, 3])
def test_pickled_weights(expected, damaged, tmp_path, parts):
    (damaged / WEIGHTS).unlink()
    write_bins(damaged, make_model().state_dict(), parts)
    convert_huggingface(damaged, tmp_path / "out", None)
    same_files(tmp_path / "out", expected)


def test_a_shard_without_matrices(expected, damaged, tmp_path):
    tensors = load_file(damaged / WEIGHTS)
    write_shards(damaged, tensors, [name for name, tensor in tensors.items() if tensor.ndim == 1])
    (damaged / WEIGHTS).unlink()
    convert_huggingface(damaged, tmp_path / "out", None)
    same_files(tmp_path / "out", expected)


def test_parameters_in_a_pickle_and_buffers_of_old_models(expected, damaged, tmp_path):
    state = {name: torch.nn.Parameter(tensor) for name, tensor in load_file(damaged / WEIGHTS).items()}
    state[f"{PREFIX}self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (damaged / WEIGHTS).unlink()
    torch.save(state, damaged / "pytorch_model.bin")
    convert_huggingface(damaged, tmp_path / "out", None)
    same_files(tmp_path / "out", expected)


def test_tokenizer_files_come_along(demo, damaged, tmp_path):
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
    for name in copied:
        (damaged / name).write_text("{}" if name.endswith("map.json") else name)
    for name in copied[:2]:
        shutil.copyfile(demo / name, damaged / name)
    (damaged / "tokenizer.model").write_text("tokenizer.json counts")
    convert_huggingface(damaged, tmp_path / "out", None)
    for name in [*copied, "tokenizer.model"]:
        assert (tmp_path / "out" / name).read_bytes() == (damaged / name).read_bytes(), name


# --- which files


def test_transformers_and_we_take_the_same_file_of_several(expected, damaged, tmp_path):
    """A single file before an index, even one that is stale; safetensors before .bin."""
    other = make_model(initializer_range=0.5)
    torch.save(other.state_dict(), damaged / "pytorch_model.bin")
    (damaged / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    theirs = transformers.LlamaForCausalLM.from_pretrained(damaged)
    assert torch.equal(theirs.lm_head.weight, make_model().lm_head.weight)
    convert_huggingface(damaged, tmp_path / "out", None)
    same_files(tmp_path / "out", expected)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("present", [0, 1])  # of the shards that the safetensors index names
def test_an_index_without_its_shards_gives_way_to_a_whole_set(expected, damaged, tmp_path, capsys, parts, present):
    state = load_file(damaged / WEIGHTS)
    (damaged / WEIGHTS).unlink()
    shards = [f"model-{part}-of-3.safetensors" for part in (1, 2, 3)]
    for shard in shards[:present]:
        save_file({"lm_head.weight": torch.ones(2, 2)}, damaged / shard)
    (damaged / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
    write_bins(damaged, state, parts)
    convert_huggingface(damaged, tmp_path / "out", None)
    same_files(tmp_path / "out", expected)
    lines = [line for line in capsys.readouterr().err.splitlines() if "index" in line]
    first = "pytorch_model.bin" if parts == 1 else "pytorch_model-0.bin"
    missing = f"{damaged / shards[present]} is missing, though the index names it ({3 - present} of 3 such)"
    assert lines == [f"{missing}: reading {first} instead"]


def test_indexes_without_shards_name_the_first_that_is_missing(damaged, tmp_path):
    (damaged / WEIGHTS).unlink()
    for single, shard in ((WEIGHTS, "model-1.safetensors"), ("pytorch_model.bin", "pytorch_model-1.bin")):
        (damaged / f"{single}.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    refuses(damaged, tmp_path, "model-1.safetensors is missing, though the index names it (1 of 1 such): download")


@pytest.mark.parametrize("size", [0, 100, -1])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_damaged_shard_is_named(damaged, tmp_path, kind, size):
    state = load_file(damaged / WEIGHTS)
    (damaged / WEIGHTS).unlink()
    if kind == "bin":
        write_bins(damaged, state, 2)
        shard = damaged / "pytorch_model-1.bin"
    else:
        write_shards(damaged, state, ["lm_head.weight"])
        shard = damaged / "b.safetensors"
    os.truncate(shard, size if size >= 0 else shard.stat().st_size // 2)
    refuses(damaged, tmp_path, f"{shard} is ")


def test_an_index_that_assigns_tensors_wrongly_does_not_matter(expected, damaged, tmp_path):
    write_shards(damaged, load_file(damaged / WEIGHTS), ["lm_head.weight", "model.norm.weight"])
    (damaged / WEIGHTS).unlink()
    index = {"weight_map": {"lm_head.weight": "b.safetensors", "no.such": "a.safetensors"}}
    (damaged / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    convert_huggingface(damaged, tmp_path / "out", None)
    same_files(tmp_path / "out", expected)


# --- types


def stored_types(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_stored_type_is_kept(tmp_path, dtype, stored):
    model = make_model(dtype)
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    convert_huggingface(tmp_path / "hf", tmp_path / "out", None)
    assert stored_types(tmp_path / "out") == {stored}
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(found["output.weight"], model.lm_head.weight)
    assert torch.equal(found["layers.1.attention.wo.weight"].t(), model.model.layers[1].self_attn.o_proj.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_rounds_once(source, tmp_path, dtype):
    convert_huggingface(source, tmp_path / "out", dtype)
    model = load_model(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    original = load_file(source / WEIGHTS)[f"{PREFIX}mlp.down_proj.weight"]
    assert torch.equal(model.layers[0].feed_forward.w2.weight.packed, original.to(dtype).t())


def test_the_widest_matrix_decides(damaged, tmp_path):
    tensors = load_file(damaged / WEIGHTS)
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or "embed" in name:
            continue  # a file may start with any: norms are often fp32 beside bf16 matrices
        tensors[name] = tensor.half() if "q_proj" in name else tensor.bfloat16()
    save_file(tensors, damaged / WEIGHTS)
    convert_huggingface(damaged, tmp_path / "wide", None)
    assert stored_types(tmp_path / "wide") == {"F32"}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, damaged / WEIGHTS)
    convert_huggingface(damaged, tmp_path / "narrow", None)
    assert stored_types(tmp_path / "narrow") == {"BF16"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_quantized_weights_are_refused(damaged, tmp_path, dtype):
    change(damaged, lambda tensors: tensors.update({f"{PREFIX}mlp.up_proj.weight": torch.ones(64, 32).char()}))
    refuses(damaged, tmp_path, "mlp.up_proj.weight' in torch.int8, expected bf16, fp16, fp32", dtype)


INT, BYTE, HALF, FP8 = torch.int32, torch.uint8, torch.float16, torch.float8_e4m3fn
LAYERS = {  # what stands in the place of a layer's weight, by what quantized it
    "GPTQ": {"qweight": INT, "qzeros": INT, "scales": HALF, "g_idx": INT},
    "GPTQ or AWQ": {"qweight": INT, "qzeros": INT, "scales": HALF},
    "compressed-tensors": {"weight_packed": INT, "weight_scale": HALF, "weight_shape": torch.int64},
    "bitsandbytes": {"weight": BYTE, "weight.absmax": torch.float32, "weight.quant_map": torch.float32},
    "FP8": {"weight": FP8, "weight_scale_inv": torch.float32},
    "FP8 or compressed-tensors": {"weight": torch.int8, "weight_scale": HALF},
    "MLX": {"weight": torch.uint32, "scales": HALF, "biases": HALF},
    "something": {"weight": FP8},
}


@pytest.mark.parametrize("method", LAYERS)
def test_quantized_weights_that_no_field_tells_of_are_refused(damaged, tmp_path, method):
    layer = f"{PREFIX}mlp.up_proj"

    def alter(tensors):
        del tensors[f"{layer}.weight"]
        tensors |= {f"{layer}.{name}": torch.zeros(8, 8, dtype=dtype) for name, dtype in LAYERS[method].items()}

    change(damaged, alter)
    refuses(damaged, tmp_path, f"it seems that {method} quantized them; convert the unquantized model")


def test_wider_floats_are_not_taken_for_quantized(damaged, tmp_path):
    change(damaged, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].double()}))
    refuses(damaged, tmp_path, "'lm_head.weight' in torch.float64, expected bf16, fp16, fp32: store the weights")


def test_a_quantized_model_is_refused_before_its_weights_are_read(command, damaged, tmp_path):
    config = json.loads((damaged / CONFIG).read_text())
    (damaged / CONFIG).write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    (damaged / WEIGHTS).write_bytes(b"")
    done = command("scripts.convert_hf_checkpoint", damaged, "--out", tmp_path / "out")
    fails(done, "AWQ (4 bits) quantized the weights: convert the unquantized model that it was made from")
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 190


# --- the end


def test_what_no_command_could_open_is_not_left(damaged, tmp_path):
    """A tokenizer that is none, and weights whose products are out of range."""
    (damaged / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    refuses(damaged, tmp_path, "tokenizer.json")
    write_tokenizer(damaged)
    (damaged / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(ValueError, match="chat_template is a int"):
        convert_huggingface(damaged, tmp_path / "out", None)
    (damaged / "tokenizer_config.json").unlink()
    change(damaged, lambda tensors: [tensor.mul_(3e4) for name, tensor in tensors.items() if "mlp" in name])
    with pytest.raises(
        ValueError, match="the converted model computes NaN or inf in fp16: convert with another --dtype"
    ):
        convert_huggingface(damaged, tmp_path / "out", torch.float16)
    assert sorted(os.listdir(tmp_path)) == ["model", "parent"]
    convert_huggingface(damaged, tmp_path / "out", torch.bfloat16)


def test_a_model_without_tokenizer_is_refused_before_the_work(damaged, tmp_path):
    (damaged / "tokenizer.json").unlink()
    (damaged / WEIGHTS).write_bytes(b"")
    refuses(damaged, tmp_path, "has no tokenizer.json or tokenizer.model: copy them from the original model")


# --- bad input


def change(folder, alter):
    tensors = load_file(folder / WEIGHTS)
    alter(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def refuses(folder, tmp_path, message, dtype=None):
    """The conversion raises one error with `message` in it and leaves nothing behind."""
    parent = tmp_path / "parent"
    parent.mkdir()
    with pytest.raises((ValueError, OSError)) as error:
        convert_huggingface(folder, parent / "out", dtype)
    assert message in str(error.value)
    assert os.listdir(parent) == []


def fails(done, message):
    """A finished command that printed one line of error and no traceback."""
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in done.stderr


def test_command_converts_and_says_what_is_next(command, source, expected, tmp_path):
    done = command("scripts.convert_hf_checkpoint", source, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'out'}\nnext: python calibrate.py --checkpoint {tmp_path / 'out'}\n"
    same_files(tmp_path / "out", expected)
    fails(command("scripts.convert_hf_checkpoint", source, "--out", tmp_path / "out"), "exists already: remove it")
    same_files(tmp_path / "out", expected)
    assert os.listdir(tmp_path) == ["out"]


def test_command_prints_one_line_for_a_bad_source(command, damaged, tmp_path):
    os.truncate(damaged / WEIGHTS, 5000)
    done = command("scripts.convert_hf_checkpoint", damaged, "--out", tmp_path / "out")
    fails(done, "model.safetensors is truncated or not a safetensors file")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 4, 8, 200, 10_000, -1])
def test_truncated_weights(damaged, tmp_path, size):
    whole = (damaged / WEIGHTS).stat().st_size
    os.truncate(damaged / WEIGHTS, size if size >= 0 else whole + size)
    refuses(damaged, tmp_path, "model.safetensors is truncated or not a safetensors file")


def test_garbage_weights(damaged, tmp_path):
    (damaged / WEIGHTS).write_bytes(b"\x10" * 5000)
    refuses(damaged, tmp_path, "model.safetensors is truncated or not a safetensors file")


def test_missing_weights(damaged, tmp_path):
    (damaged / WEIGHTS).unlink()
    refuses(damaged, tmp_path, "has no model.safetensors or pytorch_model.bin")


def test_missing_config(damaged, tmp_path):
    (damaged / CONFIG).unlink()
    refuses(damaged, tmp_path, "has no config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}', '{"model_type": "gemma3"}', "{}"])
def test_bad_config(damaged, tmp_path, text):
    (damaged / CONFIG).write_text(text)
    refuses(damaged, tmp_path, "config.json")


INDEXES = ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": [], "b": ""}}']
INDEXES += [
    '{"weight_map": {}}',
    json.dumps({"weight_map": {"a": "x" * 50_000}}),
    '{"weight_map": {"a": {"b": {"c": "d"}}}}',
    '{"weight_map": ' + "[" * 10**5,
    "[" * 10**5,
]


@pytest.mark.parametrize("text", INDEXES, ids=range(len(INDEXES)))
def test_corrupt_index(damaged, tmp_path, text):
    (damaged / WEIGHTS).unlink()
    (damaged / f"{WEIGHTS}.index.json").write_text(text)
    refuses(damaged, tmp_path, "index.json is not a weight index")


def test_index_never_leaves_the_folder(damaged, tmp_path):
    (damaged / WEIGHTS).rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (damaged / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(FileNotFoundError, match=r"model/outside\.safetensors is missing"):
            convert_huggingface(damaged, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_run_no_code(damaged, tmp_path):
    (damaged / WEIGHTS).unlink()
    made = tmp_path / "made by a pickle"
    torch.save({"lm_head.weight": Payload(made)}, damaged / "pytorch_model.bin")
    refuses(damaged, tmp_path, "pytorch_model.bin is refused: it holds more than tensors")
    assert not made.exists()
    torch.load(damaged / "pytorch_model.bin", weights_only=False)
    assert made.exists()  # so the payload works


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 500, 100, 5000, [torch.ones(2)], {"state": {"a": 1}}, {1: 2}], ids=str
)
def test_bad_pickles(damaged, tmp_path, content):
    path = damaged / "pytorch_model.bin"
    torch.save(load_file(damaged / WEIGHTS) if isinstance(content, int) else content, path)
    if isinstance(content, int):
        os.truncate(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    (damaged / WEIGHTS).unlink()
    refuses(damaged, tmp_path, "pytorch_model.bin is ")


def move_rows(giving, taking):
    """Moves an output of one part to another, so that their sum stays as it is."""

    def alter(tensors):
        first, second = tensors[PREFIX + giving], tensors[PREFIX + taking]
        tensors[PREFIX + giving], tensors[PREFIX + taking] = first[:-1].clone(), torch.cat((second, first[-1:]))

    return alter


@pytest.mark.parametrize(
    "giving, taking",
    [
        ("self_attn.q_proj.weight", "self_attn.v_proj.weight"),
        ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    ],
)
def test_each_part_has_its_own_size(damaged, tmp_path, giving, taking):
    change(damaged, move_rows(giving, taking))
    first = taking if "mlp.gate" in taking else giving  # parts are looked at in order
    refuses(damaged, tmp_path, f"has {PREFIX}{first} [")


def set_nan(tensors):
    tensors[f"{PREFIX}mlp.down_proj.weight"][3, 4] = float("nan")


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}mlp.up_proj.weight"), f"lacks {PREFIX}mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda t: t.update({"score.weight": torch.ones(2, 2)}), "holds score.weight (1 such)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "model.norm.weight [31]"),
        (lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}), "model.norm.weight []"),
        (lambda t: t.update({f"{PREFIX}self_attn.k_proj.weight": torch.ones(16, 31)}), "k_proj.weight [16, 31]"),
        (lambda t: t.update({f"{PREFIX}self_attn.k_proj.weight": torch.ones(17, 32)}), "k_proj.weight [17, 32]"),
        (lambda t: t.update({f"{PREFIX}self_attn.k_proj.weight": torch.ones(16)}), "k_proj.weight [16]"),
        (lambda t: t.clear(), "lacks model.embed_tokens.weight"),
        (set_nan, "layers.0.feed_forward.w2.weight holds NaN"),
    ],
    ids=["missing", "no_head", "extra", "short", "scalar", "columns", "rows", "vector", "empty", "nan"],
)
def test_tensors_that_do_not_fit(damaged, tmp_path, alter, message):
    change(damaged, alter)
    refuses(damaged, tmp_path, message)


# --- tied


def as_tied(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_stored_output_that_differs_is_kept_as_transformers_keeps_it(damaged, tmp_path, capsys, dtype):
    as_tied(damaged)
    convert_huggingface(damaged, tmp_path / "out", dtype)
    said = [line for line in capsys.readouterr().err.splitlines() if "ties" in line]
    assert said == [
        f"{damaged}: config.json ties lm_head.weight to model.embed_tokens.weight, but they differ: not tied"
    ]
    theirs = transformers.LlamaForCausalLM.from_pretrained(damaged, dtype=dtype or torch.float32)
    model = load_model(tmp_path / "out")
    assert torch.equal(model.output.weight, theirs.lm_head.weight)
    assert torch.equal(model.tok_embeddings.weight, theirs.model.embed_tokens.weight)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert not model.args.tie_embeddings


@pytest.mark.parametrize("kept", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]], ids=str)
def test_a_tied_model_is_stored_once(damaged, expected, tmp_path, capsys, kept):
    """Whichever of the two is stored, it is both; so transformers reads it as well."""
    as_tied(damaged)

    def alter(tensors):
        embeddings = tensors["model.embed_tokens.weight"]
        del tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
        names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
        tensors.update({names[name]: embeddings.clone() for name in kept})

    change(damaged, alter)
    convert_huggingface(damaged, tmp_path / "tied", None)
    assert "ties" not in capsys.readouterr().err
    found, whole = load_file(tmp_path / "tied" / WEIGHTS), load_file(expected / WEIGHTS)
    assert found.keys() == whole.keys() - {"output.weight"}
    assert all(torch.equal(found[name], whole[name]) for name in found)


@pytest.mark.parametrize("blocked", ["file/out", "/proc/out"])
def test_unwritable_output(command, source, tmp_path, blocked):
    (tmp_path / "file").write_text("")
    fails(command("scripts.convert_hf_checkpoint", source, "--out", tmp_path / blocked), "out")
    assert os.listdir(tmp_path) == ["file"]


def test_full_disk(command, source, tmp_path):
    """The kernel refuses to let a file grow: the same write error as on a full disk, at the same place."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = command("scripts.convert_hf_checkpoint", source, "--out", tmp_path / "out", preexec_fn=limit)
    fails(done, "File too large")
    assert os.listdir(tmp_path) == []


# --- memory


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory):
    """A Llama of 1 GB in bf16, in shards of two layers. Its layers share their values: only the bytes count."""
    folder = tmp_path_factory.mktemp("gigabyte")
    dim, ffn, layers, vocab, kv = 2048, 5632, 10, 16384, 512
    sizes = {"hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    transformers.LlamaConfig(**CONFIG_FIELDS | sizes | heads, dtype="bfloat16").save_pretrained(folder)
    write_tokenizer(folder)
    torch.manual_seed(0)
    values = (torch.randn(vocab, dim, dtype=torch.float32) * 0.02).bfloat16()
    shapes = {"q_proj": (dim, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, dim)}
    shapes = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    shapes |= {"mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim), "mlp.down_proj": (dim, ffn)}
    block = {f"{name}.weight": values.flatten()[: a * b].view(a, b).clone() for name, (a, b) in shapes.items()}
    block |= {f"{name}_layernorm.weight": torch.ones(dim).bfloat16() for name in ("input", "post_attention")}
    parts = [
        {"model.embed_tokens.weight": values, "lm_head.weight": values.clone(), "model.norm.weight": values[0].clone()}
    ]
    for first in range(0, layers, 2):
        two = {f"model.layers.{i}.{name}": tensor for i in (first, first + 1) for name, tensor in block.items()}
        parts.append({name: tensor.clone() for name, tensor in two.items()})
    where = {}
    for i, tensors in enumerate(parts):
        save_file(tensors, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(tensors, f"model-{i}.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    yield folder
    shutil.rmtree(folder)


def test_a_gigabyte_takes_hardly_more_memory_than_its_size(gigabyte, source, expected, tmp_path):
    """Resident memory counts the mapped files: all of the checkpoint, and on top of it what is being built."""
    size = sum(path.stat().st_size for path in gigabyte.iterdir())
    assert 0.9e9 < size < 1.2e9
    converting = "huggingface.convert_huggingface(Path({!r}), Path({!r}), None)".format
    small = converting(str(source), str(tmp_path / "small"))
    try:
        assert peak_bytes(converting(str(gigabyte), str(tmp_path / "out")), warm_up=small) < 1.2 * size
        assert peak_bytes(f"forward({str(tmp_path / 'out')!r})", warm_up=f"forward({str(expected)!r})") < 1.2 * size
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
