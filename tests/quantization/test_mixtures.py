"""Mixtures of block types: those of llama.cpp, and what stands in where sizes do not fit."""

import dataclasses

import pytest
import torch

from teal_fast.model import ModelArgs
from teal_fast.quantization.mixtures import make_format, needs_more

ARGS = ModelArgs("LlamaForCausalLM", 512, 8, 8, 2, 64, 768, 1000, 128, 1e-5, (), (0,) * 8, (None,) * 8, 64)


def make(mode="q4_k", **sizes):
    return make_format(mode, dataclasses.replace(ARGS, **sizes), torch.bfloat16)


def test_which_layers_need_more():
    # What llama.cpp's file of Qwen2.5-Coder-1.5B, 28 layers, in Q4_K_M has in Q6_K
    assert [i for i in range(28) if needs_more(i, 28)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]


def test_q4_k_is_a_mixture():
    format, note = make()
    assert note is None and (format.name, format.dtype) == ("q4_k", torch.bfloat16)
    assert format.parts["layers.0.attention.wqkv"] == (("Q4_K", 640), ("Q6_K", 128))
    assert format.parts["layers.1.attention.wqkv"] == (("Q4_K", 768),)
    assert [format.parts[f"layers.{i}.feed_forward.w2"][0][0] for i in (0, 1, 3, 7)] == ["Q6_K", "Q4_K", "Q6_K", "Q6_K"]
    assert format.parts["layers.3.feed_forward.w13"] == (("Q4_K", 1536),)
    assert (format.parts["tok_embeddings"], format.parts["output"]) == ((("Q4_K", 1000),), (("Q6_K", 1000),))


def test_tied_embeddings_are_the_output_layer():
    format, _ = make(tie_embeddings=True)
    assert format.parts["tok_embeddings"] == (("Q6_K", 1000),) and "output" not in format.parts


def test_types_that_stand_in():
    format, note = make("q5_k", dim=576, head_dim=72)
    assert format.parts["layers.0.attention.wqkv"] == (("Q5_1", 720), ("Q8_0", 144))
    assert format.parts["layers.0.feed_forward.w2"] == (("Q6_K", 576),)
    assert note == "29 matrices of 576 inputs in Q5_1 instead of Q5_K, 5 matrices of 576 inputs in Q8_0 instead of Q6_K"


def test_layers_that_stay_as_they_are():
    format, note = make(ffn_dim=172)
    assert "layers.0.feed_forward.w2" not in format.parts and "layers.0.feed_forward.w13" in format.parts
    assert note == "8 matrices of 172 inputs as they are"
    with pytest.raises(ValueError, match="no layer's inputs are a multiple of 32, as --mode q8_0 needs"):
        make("q8_0", dim=90, head_dim=18, ffn_dim=100)
