"""Shards put together are the whole model, in every format, and no rank reads much that is not its own."""

import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers

from teal_fast.families.config import model_args
from teal_fast.files import load
from teal_fast.files.checkpoint import WEIGHTS, read_config
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.files.store import open_safetensors
from teal_fast.quantization.checkpoint import make_quantized
from teal_fast.quantization.mixtures import make_format
from teal_fast.sparse_model import format_of, sparse_layers
from teal_fast.tests.models import write_tokenizer
from teal_fast.weights.formats import Format
from teal_fast.weights.output import output_weight
from teal_fast.weights.shards import Cut, Shard

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "attention_bias": True,
    "mlp_bias": True,
}
MODES = ("dense", "int8", "int4", "output8", "q4_k", "q5_k", "q8_0")
Q, KV, FFN, VOCAB = 512, 128, 1024, 301  # outputs of a layer's parts; q4_k's v is in another type than q and k


def format_named(mode: str, args):
    if mode.startswith("q"):
        return make_format(mode, args, torch.float32)[0]
    return None if mode == "dense" else Format(mode, 64 if mode == "int4" else 0)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=request.param)
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(root / "hf")
    write_tokenizer(root / "hf")
    convert_huggingface(root / "hf", root / "dense", None)
    args = model_args(read_config(root / "dense"))
    for mode in MODES[1:]:
        (root / mode).mkdir()
        make_quantized(root / "dense", root / mode, format_named(mode, args))
    return root


def halves(rank: int, *sizes: int) -> torch.Tensor:
    """The half of each of some runs of channels that a rank of two has."""
    return torch.cat([run.chunk(2)[rank] for run in torch.arange(sum(sizes)).split(sizes)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_has_the_values_of_the_whole(folders, mode, rank):
    whole, shard = load_model(folders / mode), load_model(folders / mode, shard=Shard(rank, 2))
    assert format_of(shard) == format_of(whole)
    outputs = {"wqkv": halves(rank, Q, KV, KV), "w13": halves(rank, FFN, FFN)}
    inputs = {"wo": halves(rank, Q), "w2": halves(rank, FFN)}
    for name, layer in sparse_layers(shard).items():
        other, kind = sparse_layers(whole)[name], name.rsplit(".", 1)[1]
        expected = other.weight.dequantize()
        expected = expected[:, outputs[kind]] if kind in outputs else expected[inputs[kind]]
        assert torch.equal(layer.weight.dequantize(), expected), name
        assert torch.equal(layer.bias, other.bias[outputs[kind]] if kind in outputs else other.bias), name
        assert len(layer.threshold) == layer.weight.in_features == len(expected)
    tokens = torch.arange(VOCAB)
    assert torch.equal(shard.tok_embeddings(tokens), whole.tok_embeddings(tokens))
    share = slice(0, 151) if rank == 0 else slice(151, VOCAB)
    assert torch.equal(output_weight(shard.output), output_weight(whole.output)[share])


class Watched:
    """An open file, or a tensor of it, of which bytes are counted that are read."""

    def __init__(self, inner, read: list[int]):
        self.inner, self.read = inner, read

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def get_slice(self, name):
        return Watched(self.inner.get_slice(name), self.read)

    def __getitem__(self, at):
        found = self.inner[at]
        self.read.append(found.nbytes)
        return found


@pytest.mark.parametrize("mode", MODES)
def test_no_rank_reads_the_whole_file(folders, monkeypatch, mode):
    read: list[int] = []

    @contextmanager
    def watched(path):
        with open_safetensors(path) as file:
            yield Watched(file, read)

    monkeypatch.setattr(load, "open_safetensors", watched)
    load_model(folders / mode)
    whole = sum(read)
    assert abs(whole - (folders / mode / WEIGHTS).stat().st_size) < 0.02 * whole
    for rank in (0, 1):
        read.clear()
        own = sum(parameter.nbytes for parameter in load_model(folders / mode, shard=Shard(rank, 2)).parameters())
        assert own < 0.65 * whole  # embeddings are every rank's
        assert own <= sum(read) + 64 * 1024 and sum(read) < (1.15 if mode.startswith("q") else 1.02) * own


@pytest.mark.parametrize(
    "ranks, change, format, said",
    [
        (3, {}, None, "3 ranks cannot share this model (its 8 heads do not divide by 3): start 1 or 2 or 4"),
        (4, {"n_kv_heads": 2}, None, "(its 2 key/value heads do not divide by 4): start 1 or 2"),
        (4, {"ffn_dim": 1026}, None, "(its 1026 channels of the MLP do not divide by 4): start 1 or 2"),
        (4, {"vocab_size": 9}, None, "(its 9 tokens leave a rank without any): start 1 or 2"),
        (2, {"qk_norm": "whole"}, None, "(its norms over all of q and of k span the ranks): start 1"),
        (4, {}, Format("int4", 512), "(256 outputs of a rank cut groups of 512): start 1 or 2"),
        (2, {"head_dim": 3}, Format("int8"), "(24 outputs are no multiple of 16, as int8 needs): start 1"),
        (4, {"head_dim": 64}, "q4_k", "(128 inputs are no multiple of 256, as Q4_K needs): start 1 or 2"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(folders, ranks, change, format, said):
    args = replace(model_args(read_config(folders / "dense")), n_kv_heads=4)
    args = replace(args, **change)
    format = make_format(format, args, torch.float32)[0] if isinstance(format, str) else format
    with pytest.raises(ValueError, match=re.escape(said)):
        Cut(Shard(0, ranks), args, format).check()


def test_the_door_refuses_a_shard_before_it_reads_weights(folders):
    (data := bytearray((folders / "dense" / WEIGHTS).read_bytes()))[-4:] = b"\xff\xff\xff\x7f"  # NaN
    broken = folders / "broken"
    broken.mkdir(exist_ok=True)
    (broken / WEIGHTS).write_bytes(data)
    (broken / "config.json").write_bytes((folders / "dense" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="3 ranks cannot share"):
        load_model(broken, shard=Shard(0, 3))


def test_wrong_layouts_are_refused_of_the_whole(folders, tmp_path):
    (tmp_path / WEIGHTS).write_bytes((folders / "int8" / WEIGHTS).read_bytes())
    (tmp_path / "config.json").write_text((folders / "int8" / "config.json").read_text().replace("1024", "2048"))
    with pytest.raises(ValueError, match=r"w13.bias is \[2048\], config.json calls for \[4096\]"):
        load_model(tmp_path, shard=Shard(0, 2))
