"""Peers: their names, what is said when one is missing, and transformers on a small random model."""

import sys

import pytest
import torch

from teal_fast.benchmarks import peer_llama
from teal_fast.benchmarks.peers import check_installed, parse_peers, peer_rows
from teal_fast.benchmarks.rows import Task, random_prompt
from teal_fast.benchmarks.shapes import COMMON
from teal_fast.tests.files.test_gguf_kept import WIDE, q4_k_m
from teal_fast.tests.gguf_models import SIZES, make_model, write_gguf

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
        (["llama.cpp", "file", "q8_0"], [("llama.cpp", "file"), ("llama.cpp", "q8_0")]),
        (["llama.cpp bf16 q8_0", "llama.cpp"], [("llama.cpp", "bf16"), ("llama.cpp", "q8_0")]),
    ],
)
def test_peers_are_named_by_words_apart_by_commas_or_spaces(words, peers):
    assert parse_peers(words) == peers


@pytest.mark.parametrize("words", [["vllm"], ["q8_0"], ["transformers q8_0"], ["llama.cpp q5_0"]])
def test_an_unknown_peer_is_named_with_those_there_are(words):
    with pytest.raises(
        ValueError, match=r"llama\.cpp bf16, llama\.cpp q8_0, llama\.cpp q4_0, llama\.cpp file, transformers"
    ):
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


@pytest.fixture
def file(tmp_path):
    """A small GGUF file that llama.cpp loads, where it is installed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    write_gguf(tmp_path / "small.gguf", make_model(**WIDE), q4_k_m, metadata={"general.file_type": 15})
    return tmp_path / "small.gguf"


def test_llama_cpp_decodes_the_very_file_and_announces_a_copy(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peer_llama, "cache_folder", lambda: tmp_path / "cache")
    vocab_size = WIDE.get("vocab_size", SIZES["vocab_size"])
    task = Task(file, vocab_size, [[1, 2], [3] * 20], 8, torch.device("cpu"), "bf16")
    rows = list(peer_rows([("llama.cpp", "file")], task))
    assert [row.about["format"] for row in rows] == ["Q4_K_M"] * 2 and rows[0].about["peer"] == "llama.cpp Q4_K_M"
    assert all(row.read() > 0 and row.decode() > 0 for row in rows)
    assert not (tmp_path / "cache").exists() and "copy" not in capsys.readouterr().err
    list(peer_rows([("llama.cpp", "q8_0")], task))
    (copy,) = (tmp_path / "cache").iterdir()
    assert f"a copy for llama.cpp in q8_0 is kept, remove it at will: {copy}" in capsys.readouterr().err


def test_a_damaged_file_is_one_line(file):
    file.write_bytes(file.read_bytes()[:5000])
    task = Task(file, 500, [[1, 2]], 8, torch.device("cpu"), "bf16")
    with pytest.raises(ValueError, match=r"llama\.cpp cannot load .*: take another file"):
        list(peer_rows([("llama.cpp", "file")], task))


def test_llama_cpp_wants_a_gguf_file_on_the_cpu():
    task = Task(CONFIG, 500, [[1, 2]], 8, torch.device("cpu"), "bf16")
    with pytest.raises(ValueError, match="--checkpoint"):
        list(peer_rows([("llama.cpp", "bf16")], task))
