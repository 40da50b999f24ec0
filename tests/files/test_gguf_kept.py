"""GGUF files that keep their own values: the same model as their dequantized copy, in every type and mixture."""

import json
import os
import shutil

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType
from safetensors.torch import load_file, save_file

from teal_fast.engine.accounting import bytes_per_token
from teal_fast.files.checkpoint import CONFIG, METADATA, WEIGHTS, fingerprint
from teal_fast.files.demo import find_gguf
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.load import load_model
from teal_fast.files.store import open_safetensors
from teal_fast.scripts.convert_gguf import main
from teal_fast.sparse_model import dtype_name, format_of, sparse_layers
from teal_fast.tests.files.test_load import MUTATIONS
from teal_fast.tests.gguf_models import make_model, write_gguf
from teal_fast.tests.memory import peak_bytes
from teal_fast.weights.blocks import in_blocks

OLD = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")  # of 32 inputs
NESTED = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS")  # of 256
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def q4_k_m(name):
    """What llama.cpp's Q4_K_M does to some layers; and what stays dense in other mixtures."""
    if "attn_v" in name or "blk.0.ffn_down" in name:
        return Type.Q6_K
    if "blk.1.ffn_down" in name:
        return Type.F16
    return Type.Q8_0 if name == "token_embd.weight" else Type.Q4_K


def convert_both(path, tmp_path, dtype=torch.float32):
    """The models of the file's own values and of its dequantized copy."""
    convert_gguf(path, tmp_path / "kept", dtype, keep=True)
    convert_gguf(path, tmp_path / "dequantized", dtype)
    return load_model(tmp_path / "kept"), load_model(tmp_path / "dequantized")


@torch.inference_mode()
def check_same(kept, dequantized):
    """The same bits of all weights, and logits up to the order of sums."""
    for (name, layer), other in zip(sparse_layers(kept).items(), sparse_layers(dequantized).values(), strict=True):
        assert torch.equal(layer.weight.dequantize(), other.weight.dequantize()), name
        assert (layer.bias is None) == (other.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, other.bias), name
    tokens = torch.randint(kept.args.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    assert torch.equal(kept.tok_embeddings(tokens), dequantized.tok_embeddings(tokens))
    expected = dequantized(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(kept(tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OLD + NESTED)
def test_every_type(name, tmp_path):
    model = make_model(**(WIDE if name in NESTED else {}))
    write_gguf(tmp_path / "model.gguf", model, Type[name])
    kept, dequantized = convert_both(tmp_path / "model.gguf", tmp_path)
    check_same(kept, dequantized)
    types = {part.kind.name for layer in sparse_layers(kept).values() for part in layer.weight.parts}
    assert types == {name} and all(len(layer.weight.parts) == 1 for layer in sparse_layers(kept).values())
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        torch.testing.assert_close(kept(tokens), model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "llama_biases", "llama3_rope", "qwen2", "qwen3"])
def test_every_architecture_in_a_mixture(case, tmp_path):
    heads = {"head_dim": 64} if case in ("llama_biases", "qwen3") else {}
    write_gguf(tmp_path / "model.gguf", make_model(case, **WIDE, **heads), q4_k_m)
    kept, dequantized = convert_both(tmp_path / "model.gguf", tmp_path)
    check_same(kept, dequantized)
    layers = sparse_layers(kept)
    parts = [(part.kind.name, part.N) for part in layers["layers.0.attention.wqkv"].weight.parts]
    assert [kind for kind, _ in parts] == ["Q4_K", "Q6_K"] and parts[0][1] == 3 * parts[1][1]
    assert [part.kind.name for part in layers["layers.0.feed_forward.w13"].weight.parts] == ["Q4_K"]
    assert layers["layers.1.feed_forward.w2"].weight.format == "dense"
    assert kept.tok_embeddings.weight.parts[0].kind.name == "Q8_0"
    assert (kept.output.weight is kept.tok_embeddings.weight) == (case == "llama3_rope")


def test_dense_embeddings_beside_quantized_layers(tmp_path):
    write_gguf(
        tmp_path / "model.gguf", make_model("llama3_rope"), lambda name: Type["BF16" if "embd" in name else "Q8_0"]
    )
    kept, dequantized = convert_both(tmp_path / "model.gguf", tmp_path)
    check_same(kept, dequantized)
    assert kept.output.weight is kept.tok_embeddings.weight and isinstance(kept.output.weight, torch.Tensor)
    assert load_file(tmp_path / "kept" / WEIGHTS)["tok_embeddings.weight"].dtype == torch.bfloat16


def test_a_file_without_quantized_weights_is_an_ordinary_checkpoint(tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model(), Type.F16)
    convert_both(tmp_path / "model.gguf", tmp_path)
    kept, dequantized = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("kept", "dequantized"))
    assert kept == dequantized


# --- what the model says of itself


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with the file's own values in several types."""
    folder = tmp_path_factory.mktemp("mixed")
    number = {"general.file_type": int(LlamaFileType.MOSTLY_Q4_K_M)}
    write_gguf(folder / "model.gguf", make_model(**WIDE), q4_k_m, metadata=number)
    convert_gguf(folder / "model.gguf", folder / "kept", torch.bfloat16, keep=True)
    return folder / "kept"


def test_format_and_type(mixed):
    model = load_model(mixed)
    assert (format_of(model), dtype_name(model), in_blocks(model)) == ("Q4_K_M", "bf16", True)
    wide = load_model(mixed, dtype=torch.float32)
    assert (format_of(wide), dtype_name(wide)) == ("Q4_K_M", "fp32")
    tokens = torch.arange(8)[None]
    assert (model(tokens).dtype, wide(tokens).dtype) == (torch.bfloat16, torch.float32)
    half = load_model(mixed, dtype=torch.float16)
    assert {half.norm.weight.dtype, half.layers[1].feed_forward.w2.weight.packed.dtype} == {torch.float16}
    assert half.layers[0].attention.wqkv.weight.parts[0].super_scale.dtype == torch.float16


def test_a_release_before_these_refuses_the_file(mixed):
    with open_safetensors(mixed / WEIGHTS) as file:
        assert file.metadata()["version"] == "3" != METADATA["version"]


def test_tensors_are_memory_mapped_as_they_are(mixed):
    model, stored = load_model(mixed), load_file(mixed / WEIGHTS)
    for name, parameter in model.named_parameters():
        if ".parts." in name:
            assert torch.equal(parameter, stored[name]) and parameter.dtype == stored[name].dtype


def test_bytes_of_a_token(mixed):
    model = load_model(mixed)
    whole, half = bytes_per_token(model, 0), bytes_per_token(model, 0.5)
    weights = [layer.weight for layer in sparse_layers(model).values()]
    assert whole == sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("tok_embeddings"))
    assert whole - half == round(sum(weight.row_bytes * weight.in_features for weight in weights) / 2)
    w13 = model.layers[0].feed_forward.w13.weight
    assert w13.row_bytes * 256 == w13.parts[0].plane0.nbytes  # no scales


def test_fingerprint_knows_the_values(mixed, tmp_path):
    shutil.copytree(mixed, tmp_path, dirs_exist_ok=True)
    assert fingerprint(tmp_path) == fingerprint(mixed)
    with open_safetensors(mixed / WEIGHTS) as file:
        metadata = file.metadata()
    tensors = load_file(mixed / WEIGHTS)
    tensors["layers.1.attention.wo.weight.parts.0.plane0"][1, 3] ^= 1
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    assert fingerprint(tmp_path) != fingerprint(mixed)


# --- bad input: files


def refuses(path, tmp_path, message):
    (tmp_path / "parent").mkdir()
    with pytest.raises(ValueError) as error:
        convert_gguf(path, tmp_path / "parent" / "out", torch.float32, keep=True)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert os.listdir(tmp_path / "parent") == []


def test_types_that_are_not_kept_name_the_way(tmp_path, run_main):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(**WIDE), lambda name: Type["Q2_K" if name == "blk.1.ffn_up.weight" else "Q4_K"])
    said = "blk.1.ffn_up.weight is of type Q2_K, which is not kept as it is: convert the file with `python -m "
    refuses(path, tmp_path, said + "teal_fast.scripts.convert_gguf --dequantize`")
    code, _, errors = run_main(main, path, "--out", tmp_path / "out")
    assert code == 1 and said in errors.splitlines()[-1] and "Traceback" not in errors
    assert run_main(main, path, "--out", tmp_path / "out", "--dequantize")[0] == 0
    assert format_of(load_model(tmp_path / "out")) == "bf16"


def test_a_layer_that_is_dense_in_part(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(), lambda name: Type["F16" if name == "blk.1.attn_v.weight" else "Q8_0"])
    refuses(path, tmp_path, "blk.1.attn_v.weight is F16 beside quantized weights of its layer: convert the file with")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_nan_scales_of_a_file(tmp_path):
    path = tmp_path / "model.gguf"
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[5, 6] = float("nan")
    write_gguf(path, model, Type.Q8_0)
    refuses(path, tmp_path, "layers.1.feed_forward.w13.weight.parts.0.scale holds NaN")


# --- bad input: checkpoints


def refusal(mixed, tmp_path, tensors, metadata):
    shutil.copy(mixed / CONFIG, tmp_path)
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    with pytest.raises(ValueError) as refused:
        load_model(tmp_path)
    line = str(refused.value)
    assert len(line.splitlines()) == 1 and len(line) < 600
    return line


@pytest.fixture(scope="module")
def whole(mixed):
    with open_safetensors(mixed / WEIGHTS) as file:
        return load_file(mixed / WEIGHTS), file.metadata()


LAYER_PARTS = ("plane0", "scale", "minimum", "super_scale", "super_minimum")
NAMES = [f"layers.0.attention.wqkv.weight.parts.0.{name}" for name in LAYER_PARTS]
NAMES += ["layers.0.attention.wqkv.weight.parts.1.plane1", "tok_embeddings.weight.parts.0.scale", "norm.weight"]
NAMES += ["layers.1.feed_forward.w2.weight", "output.weight.parts.0.plane0"]
OTHER_TYPE = {
    torch.uint8: torch.int8,
    torch.int8: torch.uint8,
    torch.float16: torch.bfloat16,
    torch.float32: torch.float64,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_checked(mixed, whole, tmp_path, name):
    mutations = MUTATIONS | {"dtype": lambda tensors, name: tensors.update({name: tensors[name].to(other)})}
    for mutation, mutate in mutations.items():
        tensors = dict(whole[0])
        other = torch.float64 if "parts" not in name else OTHER_TYPE[tensors[name].dtype]
        mutate(tensors, name)
        line = refusal(mixed, tmp_path, tensors, whole[1])
        assert name in line and WEIGHTS in line, (mutation, line)


@pytest.mark.parametrize("name", [name for name in NAMES if "plane" not in name and not name.endswith(".0.minimum")])
def test_nan_is_refused(mixed, whole, tmp_path, name):
    tensors = dict(whole[0])
    if not tensors[name].is_floating_point() or (tensors[name].ndim == 2 and "parts" not in name):
        return
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-3] = torch.nan
    assert f"{name} holds NaN or inf" in refusal(mixed, tmp_path, tensors, whole[1])


W2, EMBEDDINGS = "layers.0.feed_forward.w2", "tok_embeddings"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "2"}, "version is '2', expected '3' where weights is 'gguf', and nowhere else"),
        ({"version": "4"}, "version is '4', expected '1' or '2' or '3'"),
        ({"weights": "int8"}, "version is '3', expected '3' where weights is 'gguf'"),
        ({"weights": None}, "version is '3', expected '3' where weights is 'gguf'"),
        ({"dtype": "int8"}, "dtype is 'int8', expected bf16 or fp16 or fp32"),
        ({"dtype": None}, "dtype is None"),
        ({"name": "a b"}, "name is 'a b', expected that of a GGUF file's types"),
        ({"parts": None}, "parts holds a NoneType, expected an object"),
        ({"parts": "{"}, "parts is not valid JSON"),
        ({W2: []}, f"parts of '{W2}' are [], expected types with their outputs"),
        ({W2: 5}, "are 5, expected types"),
        ({W2: [["Q6_K"]]}, "are [['Q6_K']], expected types"),
        ({W2: [[["Q6_K"], 256]]}, "expected types"),
        ({W2: [["Q2_K", 256]]}, "expected types"),
        ({W2: [["Q6_K", True]]}, "expected types"),
        ({W2: [["Q6_K", 256.0]]}, "expected types"),
        ({W2: [["Q6_K", -256], ["Q6_K", 512]]}, "expected types"),
        ({W2: 4 * [["Q6_K", 64]]}, "expected types"),
        ({EMBEDDINGS: [["Q8_0", 256], ["Q8_0", 4]]}, "expected types"),
        ({W2: [["Q6_K", 255]]}, f"does not fit its config.json ({W2} has 255 outputs, expected 256)"),
        ({W2: [["Q8_0", 256]]}, f"holds '{W2}.weight.parts.0.plane1'"),
        ({W2: None}, f"lacks {W2}.weight, which its config.json calls for"),
        ({"layers.7.attention.wo": [["Q6_K", 256]]}, "('layers.7.attention.wo' is no layer of it)"),
    ],
    ids=str,
)
def test_every_key_is_checked(mixed, whole, tmp_path, change, said):
    metadata, parts = dict(whole[1]), json.loads(whole[1]["parts"])
    for key, value in change.items():
        target = parts if "." in key or key == EMBEDDINGS else metadata
        target.pop(key, None)
        target |= {} if value is None else {key: value}
    if "parts" not in change:
        metadata["parts"] = json.dumps(parts)
    assert said in refusal(mixed, tmp_path, whole[0], metadata)


# --- the demo model's file


def test_the_demos_file(tmp_path):
    """Q4_1 with a Q8_0 head: the dequantized checkpoint's bits, at a quarter of its bytes."""
    kept, dequantized = convert_both(find_gguf(), tmp_path)
    assert format_of(kept) == "Q4_1" and kept.tok_embeddings.weight.parts[0].kind.name == "Q8_0"
    check_same(kept, dequantized)
    stored = (tmp_path / "kept" / WEIGHTS).stat().st_size
    assert stored < 1.08 * find_gguf().stat().st_size


def test_conversion_takes_hardly_more_memory_than_the_file(tmp_path):
    """Resident memory counts the mapped files; the GGUF file's own pages are given back, tensor by tensor."""
    write_gguf(tmp_path / "small.gguf", make_model(), Type.Q8_0)
    converting = "gguf.convert_gguf(Path({!r}), Path({!r}), torch.bfloat16, keep=True)".format
    small = converting(str(tmp_path / "small.gguf"), str(tmp_path / "small"))
    taken = peak_bytes(converting(str(find_gguf()), str(tmp_path / "out")), warm_up=small)
    assert taken < (tmp_path / "out" / WEIGHTS).stat().st_size + 8e7, taken
