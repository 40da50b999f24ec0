"""Losses are counted from the file itself, and the command scores and times both programs where llama.cpp is there."""

import json

import pytest

from teal_fast.benchmarks import peer_llama, tradeoff
from teal_fast.files import gguf_cache
from teal_fast.tests.files.test_gguf_kept import WIDE, q4_k_m
from teal_fast.tests.gguf_models import make_model, write_gguf


def test_losses_are_counted_window_by_window():
    found = tradeoff.loss_fields([2.0, 3.5], [1.5, 2.5])
    assert found == {"loss": 2.75, "loss_over_file": 0.75, "loss_error": pytest.approx(0.25)}
    assert tradeoff.loss_fields([2.0], [1.5])["loss_error"] is None


def test_sparsities_begin_with_dense(run_main):
    status, _, errors = run_main(tradeoff.main, "--sparsity", 0.4, 0)
    assert status == 1 and errors == "error: --sparsity begins with 0.4, expected 0: losses are counted from there\n"


def test_both_programs_are_scored_and_timed(tmp_path, monkeypatch, run_main):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setattr(gguf_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(peer_llama, "cache_folder", lambda: tmp_path / "cache")
    sizes = WIDE | {"max_position_embeddings": 1024}
    write_gguf(tmp_path / "small.gguf", make_model(**sizes), q4_k_m, metadata={"general.file_type": 15})
    (tmp_path / "text.txt").write_text("the thin inn in the thing " * 400)
    words = ("--gguf", tmp_path / "small.gguf", "--text", tmp_path / "text.txt", "--windows", 2, "--rounds", 1)
    _, out, errors = run_main(tradeoff.main, *words, "--sparsity", 0, 0.6, "--formats", "q2_k", "--new_tokens", 4)
    dense, sparse, file, coarse = json.loads(out.splitlines()[-1])
    assert [r["peer"] for r in (dense, sparse, file, coarse)] == [None, None, "llama.cpp Q4_K_M", "llama.cpp q2_k"], (
        errors
    )
    assert dense["loss_over_file"] == file["loss_over_file"] == 0 != sparse["loss_over_file"]
    assert abs(dense["loss"] - file["loss"]) < 0.3 and coarse["loss_over_file"] != 0  # random weights: 0.08 seen
    assert all(record["tokens_per_s"] > 0 for record in (dense, sparse, file, coarse))
