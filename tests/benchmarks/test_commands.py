"""The benchmark commands on the CPU, from end to end, on small models."""

import json

import pytest
import torch

from teal_fast import quantize
from teal_fast.benchmarks import batch, decode, kernels, memory, prompts, quality, rounding, table
from teal_fast.benchmarks.kernels import make_cases, make_ops, time_cases, to_record
from teal_fast.benchmarks.shapes import COMMON
from teal_fast.families.config import model_args
from teal_fast.kernels.native import library


@pytest.fixture(scope="module")
def decoded(calibrated, command, tmp_path_factory):
    """The finished command on a tiny model, and the records that it wrote."""
    folder = tmp_path_factory.mktemp("decoded")
    prompts, out = ("--prompt_tokens", 5, 30), folder / "out.json"
    settings = ("--device", "cpu", "--sparsity", 0, 0.5, "--new_tokens", 9, "--rounds", 2)
    done = command("benchmarks.decode", "--checkpoint", calibrated, *prompts, *settings, "--out", out)
    assert done.returncode == 0, done.stderr
    return done, json.loads(out.read_text())


def test_decode_times_the_fast_step_without_being_told(decoded):
    done, records = decoded
    mode = "plain" if library() is None else "compiled"
    assert [(r["mode"], r["prompt_tokens"], r["sparsity"]) for r in records] == [
        (mode, 5, 0), (mode, 5, 0.5), (mode, 30, 0), (mode, 30, 0.5)
    ]  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == records
    assert "50 % after 30: " in done.stdout


def test_decode_counts_what_is_skipped_and_what_python_costs(decoded):
    _, records = decoded
    for record in records:
        assert len(record["tokens_per_s_rounds"]) == 2
        assert record["read_gb_per_s"] > 0 and record["bandwidth_share"] > 0
        assert record["achieved_sparsity"] == pytest.approx(record["sparsity"], abs=0.2)
        if record["mode"] == "compiled":
            assert 0 < record["host_share"] < 1


def test_decode_wants_the_gguf_file_of_another_checkpoint_for_peers(tiny, command):
    done = command("benchmarks.decode", "--checkpoint", tiny, "--device", "cpu", "--peers", "transformers")
    assert done.returncode == 1 and "--gguf" in done.stderr.splitlines()[-1]


def test_prompts_compares_forms_at_each_length(even, tmp_path, run_main):
    quantized, out = tmp_path / "even-int8", tmp_path / "prompts.json"
    assert run_main(quantize.main, "--checkpoint", even, "--mode", "int8", "--out", quantized)[0] == 0
    words = ["--checkpoint", even, quantized, "--device", "cpu", "--tokens", 5, 40, "--rounds", 2, "--out", out]
    code, printed, _ = run_main(prompts.main, *words)
    records = json.loads(out.read_text())
    assert code == 0 and "40 tokens" in printed
    assert [(r["format"], r["prompt_tokens"]) for r in records] == [
        ("fp32", 5), ("int8", 5), ("fp32", 40), ("int8", 40)
    ]  # fmt: skip
    assert all(len(r["seconds_rounds"]) == 2 and r["seconds"] > 0 and r["ratio"] > 0 for r in records)
    assert records[0]["ratio"] == records[2]["ratio"] == 1


def test_batch_times_sequences_together_and_looks_at_their_masks(calibrated, tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(batch, "bandwidth_meter", lambda device: lambda: 1e9)
    out = tmp_path / "batch.json"
    words = ["--checkpoint", calibrated, "--device", "cpu", "--new_tokens", 8, "--rounds", 1, "--out", out]
    code, printed, _ = run_main(batch.main, *words)
    records = json.loads(out.read_text())
    assert code == 0 and "batch 8  samples" in printed and len(records) == 2 * (4 + 3)
    sparse = [r for r in records if r["sparsity"] == 0.5 and r["sequences"] == "prompts"]
    assert [r["batch"] for r in sparse] == [1, 2, 4, 8] and all(r["tokens_per_s"] > 0 for r in records)
    reads = [r["read"]["all"] for r in sparse]
    assert reads == sorted(reads) and reads[0] == sparse[0]["kept"]["all"] == pytest.approx(0.5, abs=0.2)
    assert {r["read"]["all"] for r in records if not r["sparsity"]} == {1.0}


def test_batch_times_every_way_to_multiply(monkeypatch):
    monkeypatch.setitem(batch.COLD_BYTES, "cpu", 1 << 10)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    args = model_args(COMMON | sizes | {"num_hidden_layers": 1, "vocab_size": 10})
    records = batch.product_records(args, ["bf16", "int8", "int4"], torch.device("cpu"), rounds=1)
    assert len(records) == 3 * 4 * len(batch.WAYS) and all(record["us"] > 0 for record in records)


def test_kernels_counts_the_rows_really_kept(monkeypatch):
    monkeypatch.setitem(kernels.COLD_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(kernels, "ROUNDS", 2)
    monkeypatch.setattr(kernels, "bandwidth_meter", lambda device: lambda: 1e9)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    args = model_args(COMMON | sizes | {"num_hidden_layers": 1, "vocab_size": 10})
    ops = make_ops(args, torch.device("cpu"), torch.bfloat16)
    cases = make_cases(ops, [0.0, 0.5])
    time_cases(cases, torch.device("cpu"))
    found = {(r["op"], r["implementation"], r["sparsity"]): r for r in map(to_record, cases)}
    assert found["up", "sparse", 0]["bytes"] == 48 * 64 * 2 and found["up", "sparse", 0.5]["bytes"] == 24 * 64 * 2
    assert found["layer", "sparse", 0]["bytes"] == 2 * (48 * 96 + 48 * 48 + 48 * 128 + 64 * 48)
    assert all(len(case.seconds) == 2 and record["us"] > 0 for case, record in zip(cases, found.values(), strict=True))


def test_memory_is_that_of_the_answer_beyond_pytorchs(calibrated, tmp_path, run_main):
    out = tmp_path / "memory.json"
    words = ["--checkpoint", calibrated, "--sparsity", 0.5, "--tokens", 30, "--new_tokens", 5, "--out", out]
    code, printed, errors = run_main(memory.main, *words)
    assert code == 0, errors
    (record,) = json.loads(out.read_text())
    beyond = record["peak_bytes"] - record["import_bytes"]
    assert record["file_bytes"] == (calibrated / "model.safetensors").stat().st_size and beyond > record["file_bytes"]
    assert record["of_file"] == beyond / record["file_bytes"] and f"{record['of_file']:.2f} of the file" in printed
    assert record["new_tokens"] == [5] and 25 < record["prompt_tokens"] < 35 and record["sparsity"] == 0.5


@pytest.mark.parametrize("command", [decode, memory, prompts, quality, rounding, table])
def test_a_checkpoint_that_is_not_there_is_one_line(command, run_main, tmp_path):
    code, _, errors = run_main(command.main, "--checkpoint", tmp_path / "nowhere", "--device", "cpu")
    assert code in (1, 2) and "Traceback" not in errors
    assert "error: " in errors.splitlines()[-1]
