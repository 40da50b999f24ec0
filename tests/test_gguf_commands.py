"""Commands on a GGUF file as it is: they run on its own values, or say in one line why not."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from teal_fast import calibrate, cli, generate, quantize
from teal_fast import eval as evaluate
from teal_fast.benchmarks import decode
from teal_fast.calibration.make import QUICK
from teal_fast.calibration.methods import METHODS
from teal_fast.engine.load import load
from teal_fast.engine.prefill import prompt_logits
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.steps import PlainStep, fast_step
from teal_fast.files import gguf_cache
from teal_fast.files.calibration import CALIBRATION, load_calibration
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.load import load_model
from teal_fast.files.paths import ROOT
from teal_fast.report.page import main as report
from teal_fast.report.plot_activations import main as plot_activations
from teal_fast.scripts.convert_gguf import main as convert
from teal_fast.sparse_model import DENSE, sparse_layers
from teal_fast.tests.files.test_gguf_kept import WIDE, q4_k_m
from teal_fast.tests.gguf_models import make_model, write_gguf

SETTINGS = ("--tokens", 1024, "--pass_tokens", 512, "--context", 64)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands") / "coder.Q4_K_M.gguf"
    number = {"general.file_type": int(LlamaFileType.MOSTLY_Q4_K_M)}
    write_gguf(path, make_model(**WIDE), q4_k_m, metadata=number)
    return path


@pytest.fixture
def file(written, monkeypatch):
    """A GGUF file beside which its cache lies, for as long as this module is tested."""
    monkeypatch.setattr(gguf_cache, "cache_folder", lambda: written.parent / "cache")
    return written


@pytest.fixture
def calibrated(file, run_main):
    """The same, with a calibration in its entry of the cache."""
    if not list(file.parent.glob(f"cache/gguf/*/*/{CALIBRATION}")):
        code, out, errors = run_main(calibrate.main, "--checkpoint", file, *SETTINGS)
        assert code == 0 and CALIBRATION in out, errors
    return file


def test_a_file_without_calibration_gets_the_quick_one(tmp_path, monkeypatch, run_main):
    path = tmp_path / "coder.gguf"
    write_gguf(path, make_model(**WIDE), q4_k_m)
    monkeypatch.setattr(gguf_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(cli, "QUICK", replace(QUICK, tokens=300, pass_tokens=100, context=50))
    words = ("--checkpoint", path, "--prompt", "the in", "--max_new_tokens", 3, "--sparsity", 0.4)
    code, _, errors = run_main(generate.main, *words)
    assert code == 0, errors
    said = [line for line in errors.splitlines() if line.startswith("calibrating, once: ")]
    assert len(said) == 1 and "--quick (in full, without --quick, it loses less)" in said[0]
    (made,) = tmp_path.glob(f"cache/gguf/*/*/{CALIBRATION}")
    assert load_calibration(made.parent).origin["tokens"] == "300"
    code, _, errors = run_main(generate.main, *words)
    assert code == 0 and "calibrating" not in errors


def test_generate(calibrated, run_main):
    words = ("--checkpoint", calibrated, "--prompt", "the in", "--max_new_tokens", 8, "--temperature", 0, "--json")
    texts = set()
    for more in ((), ("--eager",), ("--dtype", "fp32"), ("--sparsity", 0.5)):
        code, out, errors = run_main(generate.main, *words, *more)
        assert code == 0, errors
        record = json.loads(out.splitlines()[-1])
        assert (record["model"], record["format"]) == ("coder.Q4_K_M", "Q4_K_M")
        texts.add(out.splitlines()[0])
    assert 0.3 < record["achieved_sparsity"] < 0.7
    assert len(texts) <= 3 and all(text.startswith("the in") for text in texts)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_calibrates_as_on_the_dequantized_weights(file, tmp_path, method, run_main):
    """In fp32: the same thresholds up to the order of sums, where rows weigh as much in both."""
    convert_gguf(file, tmp_path / "kept", torch.float32, keep=True)
    convert_gguf(file, tmp_path / "dequantized", torch.float32)
    for name in ("kept", "dequantized"):
        words = ("--checkpoint", tmp_path / name, "--method", method, *SETTINGS)
        code, _, errors = run_main(calibrate.main, *words)
        assert code == 0, errors
    kept, dequantized = (load_calibration(tmp_path / name) for name in ("kept", "dequantized"))
    assert kept.curves.keys() == dequantized.curves.keys()
    if method == "uniform":  # the others weigh layers by bytes, which differ
        for name, points in kept.curves.items():
            torch.testing.assert_close(points, dequantized.curves[name], rtol=0.02, atol=1e-3)


def test_gradients_are_those_of_the_dequantized_weights(file, tmp_path):
    """Which calibrations start from; nothing dequantized is kept for them."""
    gradients = []
    for name, keep in (("kept", True), ("dequantized", False)):
        convert_gguf(file, tmp_path / name, torch.float32, keep=keep)
        model, found = load_model(tmp_path / name), []
        x = model.tok_embeddings(torch.arange(20)[None]).requires_grad_()
        model.layers[0].register_forward_pre_hook(lambda layer, given, x=x: (x, *given[1:]))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, found=found: found.append(t.numel()) or t, lambda t: t):
            model.hidden(torch.arange(20)[None]).square().sum().backward()
        gradients.append((x.grad, sum(found)))
    (kept, held), (dequantized, other) = gradients
    torch.testing.assert_close(kept, dequantized, rtol=0, atol=1e-4 * dequantized.abs().max().item())
    sizes = [layer.weight.in_features * layer.weight.out_features for layer in sparse_layers(model).values()]
    assert other - held > 0.5 * sum(sizes)


def test_eval(calibrated, tmp_path, run_main):
    text = tmp_path / "text.txt"
    text.write_text("the thin inn " * 100)
    words = ("--checkpoint", calibrated, "--text", text, "--context", 64, "--windows", 2)
    code, out, errors = run_main(evaluate.main, *words, "--sparsity", 0, 0.5)
    assert code == 0, errors
    records = json.loads(out.splitlines()[-1])
    assert {record["format"] for record in records} == {"Q4_K_M"} and records[1]["achieved_sparsity"] > 0.3
    code, _, errors = run_main(evaluate.main, *words, "--sparsity", 0.5, "--baseline", "magnitude")
    assert code == 1 and errors.splitlines()[-1].endswith("prunes bf16, fp16 and fp32 weights, these are Q4_K_M")


def test_eval_scores_tasks(calibrated, tmp_path, run_main):
    (tmp_path / "task.jsonl").write_text('{"ctx": "the", "conts": [" in", " thin"], "gold": 0}\n')
    words = ("--tasks", "task", "--task_data", tmp_path, "--sparsity", 0, 0.5)
    code, out, errors = run_main(evaluate.main, "--checkpoint", calibrated, *words)
    assert code == 0 and "acc" in out, errors


def test_quantize_refuses_and_warns(file, tmp_path, run_main, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert_gguf(file, tmp_path / "kept", torch.bfloat16, keep=True)
    capsys.readouterr()
    for name, what in ((file, "is a file with values of its own"), ("kept", "own values, in Q4_K_M")):
        code, out, errors = run_main(quantize.main, "--checkpoint", name, "--out", "out")
        assert (code, out, len(errors.splitlines())) == (1, "", 1)
        assert what in errors and "quantize the model in full precision or, to round these values" in errors
    assert run_main(convert, file, "--out", "dequantized", "--dequantize")[0] == 0
    code, _, errors = run_main(quantize.main, "--checkpoint", "dequantized", "--out", "out")
    assert code == 0 and "these weights were rounded to 'Q4_K_M' before: what this loses comes on top" in errors
    write_gguf(tmp_path / "full.gguf", make_model(), Type.F16)
    assert run_main(convert, "full.gguf", "--out", "full")[0] == 0
    code, _, errors = run_main(quantize.main, "--checkpoint", "full", "--out", "other")
    assert code == 0 and "rounded" not in errors


def test_report(calibrated, tmp_path, run_main):
    words, record = ("--checkpoint", calibrated), tmp_path / "record.json"
    code, _, errors = run_main(plot_activations, *words, "--out", record, "--tokens", 256, "--context", 64)
    assert code == 0, errors
    code, _, errors = run_main(report, *words, "--activations", record, "--out", tmp_path / "page.html")
    assert code == 0, errors
    assert "coder.Q4_K_M" in (tmp_path / "page.html").read_text()


def test_engine_scores_and_streams(calibrated):
    engine, tokenizer = load(calibrated, "cpu")
    request = Request(tokenizer.encode("the in"), Sampling(temperature=0), 0.5, 5)
    with torch.no_grad():
        assert len(list(engine.stream(request))) > 0


def test_the_fast_step_says_what_the_plain_one_does(calibrated):
    """In fp32, at a sparsity: the same logits up to rounding, by whatever step this machine has for it."""
    engine, _ = load(calibrated, "cpu", "fp32")
    model = engine.model
    caches = [model.new_cache(1, 16) for _ in range(2)]
    steps = [make(model, cache) for make, cache in zip((PlainStep, fast_step), caches, strict=True)]
    with torch.inference_mode():
        for position, token in enumerate((5, 70, 33)):
            given = torch.tensor([[token]]), torch.tensor([position])
            plain, fast = (step(*given).flatten() for step in steps)
            torch.testing.assert_close(fast, plain, rtol=0, atol=0.05 * plain.std().item())


def test_a_compiled_prompt_is_one_graph(calibrated):
    """As --compile_prefill makes it, but for the code in the end."""
    model = load(calibrated, "cpu")[0].model
    tokens, last = torch.arange(20)[None], torch.tensor([19])
    caches = [model.new_cache(1, 32) for _ in range(2)]
    compiled = torch.compile(prompt_logits, dynamic=True, fullgraph=True, backend="eager")
    with torch.inference_mode():
        expected, found = (
            compute(model, cache, tokens, None, last, DENSE)
            for compute, cache in zip((prompt_logits, compiled), caches, strict=True)
        )
    assert torch.equal(found, expected)


def test_decode_times_the_file(calibrated, tmp_path, run_main):
    out = tmp_path / "out.json"
    settings = ("--device", "cpu", "--new_tokens", 5, "--rounds", 1, "--sparsity", 0, 0.5, "--prompt_tokens", 3, 40)
    code, printed, errors = run_main(decode.main, "--gguf", calibrated, *settings, "--out", out)
    assert code == 0, errors
    records = json.loads(out.read_text())
    assert {(record["model"], record["format"]) for record in records} == {("coder.Q4_K_M", "Q4_K_M")}
    assert [r["prompt_tokens"] for r in records if r.get("first_token_s", 0) > 0] == [3, 40]  # once an engine
    assert "first token" in printed


def test_decode_wants_something_to_time(run_main):
    code, _, errors = run_main(decode.main, "--device", "cpu")
    assert code == 2 and "name a --checkpoint, a --gguf file or --shapes" in errors.splitlines()[-1]


def test_the_peers_file_is_the_checkpoint_or_named(file):
    peers, other = [("llama.cpp", "file")], file.parent / "other"
    assert decode.find_weights(peers, [str(file)], None) == decode.find_weights(peers, [str(other)], file) == file
    with pytest.raises(ValueError, match="name it with --gguf"):
        decode.find_weights(peers, [str(other)], None)


def test_plain_pytorch_when_it_is_asked_for(calibrated):
    code = (
        "from teal_fast.files import gguf_cache; from pathlib import Path; from teal_fast import generate, cli; "
        f"gguf_cache.cache_folder = lambda: Path({str(calibrated.parent / 'cache')!r}); cli.run(generate.main)"
    )
    words = ("--checkpoint", calibrated, "--prompt", "the in", "--max_new_tokens", 3, "--sparsity", 0.4)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"TEAL_CPU": "torch"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
