"""Comparisons on a small file with llama.cpp, where it is installed, and transformers, and what counts as apart."""

import json

import pytest

from teal_fast.benchmarks import agree, agree_tokens, agree_transformers, peer_llama
from teal_fast.files import gguf_cache
from teal_fast.tests.files.test_gguf_kept import WIDE, q4_k_m
from teal_fast.tests.gguf_models import make_model, write_gguf


def test_windows_are_spread_and_begin_with_bos():
    ids = [*range(agree.WINDOW * 4 + 5)]
    assert [window[0] for window in agree.cut(ids, 2, None)] == [0, 2 * agree.WINDOW]
    ((first, *_),) = agree.cut(ids, 1, -7)
    assert first == -7 and all(len(window) == agree.WINDOW for window in agree.cut(ids, None, -7))
    with pytest.raises(ValueError, match="fewer than one window"):
        agree.cut(ids[:100], None, None)


@pytest.mark.parametrize("apart, margin, said", [(0.003, 0, "+0.300% apart"), (-0.0019, 0.31, "margin is 0.310")])
def test_what_is_apart_is_an_error(apart, margin, said):
    with pytest.raises(ValueError) as error:
        agree.check({"apart": apart, "answers": [{"parted": 3, "margin": margin}]})
    assert said in str(error.value)
    agree.check({"apart": -0.0019, "answers": [{"parted": 3, "margin": 0.29}]})


def test_both_programs_score_and_continue_the_same_file(tmp_path, monkeypatch, run_main):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setattr(gguf_cache, "cache_folder", lambda: tmp_path / "cache")
    sizes = WIDE | {"max_position_embeddings": 1024}
    write_gguf(tmp_path / "small.gguf", make_model(**sizes), q4_k_m, metadata={"general.file_type": 15})
    (tmp_path / "text.txt").write_text("the thin inn in the thing " * 400)
    words = ("--gguf", tmp_path / "small.gguf", "--text", tmp_path / "text.txt", "--windows", 2, "--prompts", 2)
    monkeypatch.setattr(peer_llama, "cache_folder", lambda: tmp_path / "cache")
    exact = ("--dtype", "fp32", "--format", "bf16", "--new_tokens", 4)
    _, out, errors = run_main(agree.main, *words, *exact)
    (record,) = json.loads(out.splitlines()[-1])
    assert (record["peer"], record["dtype"]) == ("llama.cpp BF16", "fp32")
    assert record["tokens"] == 2 * 255 and len(record["answers"]) == 2
    pairs = zip(record["losses"], record["llama_cpp_losses"], strict=True)
    assert all(abs(ours - theirs) < 0.03 for ours, theirs in pairs), errors  # random weights: 0.014 seen


def test_a_record_is_printed(capsys):
    """Without llama.cpp, which makes records."""
    answers = [{"parted": 3, "margin": 0.29}, {"parted": None, "margin": 0.0}]
    scores = {"perplexity": 5.0, "llama_cpp_perplexity": 5.0, "apart": 0.0, "apart_error": None}
    words = {"model": "m", "format": "Q4_K_M", "protocol": "windows"}
    agree.print_record(words | scores | {"new_tokens": 64, "answers": answers})
    assert "64 tokens: 1 of 2 texts equal; others part at token (margin in nats): 3 (0.290)" in capsys.readouterr().out


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cache, "cache_folder", lambda: tmp_path / "cache")
    write_gguf(tmp_path / "small.gguf", make_model(**WIDE), q4_k_m, metadata={"general.file_type": 15})
    (tmp_path / "text.txt").write_text("the thin inn in the thing " * 40)
    return ("--gguf", tmp_path / "small.gguf", "--text", tmp_path / "text.txt")


def test_transformers_scores_the_same_file_alike(small, run_main, monkeypatch):
    monkeypatch.setattr(agree_transformers, "MOST_APART", 0.2)  # of random weights, where the step rounds inputs
    _, out, errors = run_main(agree_transformers.main, *small, "--windows", 2, "--context", 32)
    (record,) = json.loads(out.splitlines()[-1])
    assert record["peer"] == "transformers" and record["dtype"] == "fp32"
    assert record["largest_apart"] < 1e-3 and 0 < abs(record["by_token"]["apart"]) < 0.2, errors


def test_what_is_apart_from_transformers_is_an_error():
    agree_transformers.check({"apart": 0.004, "by_token": {"apart": -0.004}})
    with pytest.raises(ValueError, match=r"\+0.600% apart"):
        agree_transformers.check({"apart": 0.006, "by_token": None})
    with pytest.raises(ValueError, match=r"-0.600% apart"):
        agree_transformers.check({"apart": 0.0, "by_token": {"apart": -0.006}})


def test_ids_are_compared_with_llama_cpp(small, run_main, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, out, _ = run_main(agree_tokens.main, *small)
    assert json.loads(out.splitlines()[-1]) == [] and f"of {len(agree_tokens.TEXTS) + 1} texts" in out
    monkeypatch.setattr(agree_tokens, "their_ids", lambda vocabulary, text: [1, 2, 3])
    (parted,) = agree_tokens.compare(small[1], ["the thing"])
    assert parted["llama_cpp"] == [1, 2, 3] != parted["ours"] and parted["after"] == ""
