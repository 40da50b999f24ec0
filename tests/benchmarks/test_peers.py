"""Peers: their names, what is said when one is missing, and transformers on a small random model."""

import sys

import pytest
import torch

from teal_fast.benchmarks.peers import check_installed, parse_peers, peer_rows
from teal_fast.benchmarks.rows import Task, random_prompt
from teal_fast.benchmarks.shapes import COMMON

CONFIG = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
}


@pytest.mark.parametrize(
    "words, peers",
    [
        ([], []),
        (["llama.cpp"], [("llama.cpp", "bf16")]),
        (["llama.cpp,transformers"], [("llama.cpp", "bf16"), ("transformers", "")]),
        (["transformers", "llama.cpp", "q8_0"], [("transformers", ""), ("llama.cpp", "q8_0")]),
        (["llama.cpp, llama.cpp q4_0"], [("llama.cpp", "bf16"), ("llama.cpp", "q4_0")]),
        (["llama.cpp bf16 q8_0", "llama.cpp"], [("llama.cpp", "bf16"), ("llama.cpp", "q8_0")]),
    ],
)
def test_peers_are_named_by_words_apart_by_commas_or_spaces(words, peers):
    assert parse_peers(words) == peers


@pytest.mark.parametrize("words", [["vllm"], ["q8_0"], ["transformers q8_0"], ["llama.cpp q5_0"]])
def test_an_unknown_peer_is_named_with_those_there_are(words):
    with pytest.raises(ValueError, match=r"llama\.cpp bf16, llama\.cpp q8_0, llama\.cpp q4_0, transformers"):
        parse_peers(words)


def test_a_missing_package_is_one_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValueError, match="pip install --no-binary llama-cpp-python llama-cpp-python"):
        check_installed([("llama.cpp", "bf16")])


def test_transformers_decodes_the_same_tokens_each_time(monkeypatch):
    prompts = [random_prompt(500, tokens) for tokens in (5, 20)]
    task = Task(CONFIG, 500, prompts, 8, torch.device("cpu"), "fp32")
    drawn, argmax = [], torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *a, **k: drawn.append(argmax(*a, **k)) or drawn[-1])
    rows = list(peer_rows([("transformers", "")], task))
    assert [row.about["prompt_tokens"] for row in rows] == [5, 20]
    for row in rows:
        assert row.about["peer"] == "transformers fp32"
        drawn.clear()
        assert row.decode() > 0 and row.decode() > 0
        tokens = torch.cat(drawn).flatten().tolist()
        assert len(tokens) == 16 and tokens[:8] == tokens[8:]


def test_llama_cpp_wants_a_gguf_file_on_the_cpu():
    task = Task(CONFIG, 500, [[1, 2]], 8, torch.device("cpu"), "bf16")
    with pytest.raises(ValueError, match="--checkpoint"):
        list(peer_rows([("llama.cpp", "bf16")], task))
