import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

from teal_fast import generate
from teal_fast.engine.decode import Sample, achieved_sparsity, decode, decode_step, prefill
from teal_fast.engine.measure import cache_length
from teal_fast.engine.sampling import Sampling
from teal_fast.files.calibration import load_calibration, set_sparsity
from teal_fast.files.load import load_model
from teal_fast.files.paths import ROOT
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.sparse_model import leading_dense, sparse_layers

PROMPT = [504, 2217, 282, 260]
NOBODY = frozenset({-1})
GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def calibrated(tiny, command, tmp_path_factory):
    """A copy of the tiny checkpoint with a calibration file beside it."""
    folder = tmp_path_factory.mktemp("calibrated") / "tiny"
    shutil.copytree(tiny, folder)
    done = command("calibrate", "--checkpoint", folder, "--tokens", 2000, "--context", 128)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def model(calibrated):
    model = load_model(calibrated)
    model.setup_caches(1, 128)
    set_sparsity(model, load_calibration(calibrated), 0.5)
    return model


def run_decode(model, new_tokens, sampling=GREEDY, stop=NOBODY, seed=0):
    sample = Sample(len(PROMPT))
    generator = torch.Generator().manual_seed(seed)
    return list(decode(model, decode_step, PROMPT, new_tokens, sampling, generator, stop, sample)), sample


@torch.no_grad()
def recomputed(model, new_tokens):
    """Greedy tokens by running the whole sequence anew for each: no cache, no one-token kernel."""
    tokens = list(PROMPT)
    with leading_dense(model, len(PROMPT)):
        for _ in range(new_tokens):
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(PROMPT) :]


def test_dense_decoding_gives_the_tokens_of_transformers(tiny_hf, model, calibrated):
    set_sparsity(model, load_calibration(calibrated), 0)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32)
    expected = peer.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, 4), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    assert run_decode(model, 40)[0] == expected[0, len(PROMPT) :].tolist()


def test_sparse_decoding_equals_recomputing_the_sequence(model):
    tokens, _ = run_decode(model, 24)
    assert tokens == recomputed(model, 24)
    for layer in sparse_layers(model).values():
        layer.threshold.fill_(-1)
    assert tokens != recomputed(model, 24)  # the sparsity above did change something


def test_a_prompt_of_one_token_is_dense(model):
    logits = prefill(model, torch.tensor([[5]]))
    for layer in sparse_layers(model).values():
        layer.threshold.fill_(-1)
    torch.testing.assert_close(logits, model(torch.tensor([[5]]))[0, -1], rtol=0, atol=1e-5)


def test_stops_before_an_end_token(model):
    tokens, _ = run_decode(model, 20)
    stopped, sample = run_decode(model, 20, stop=frozenset({tokens[7]}))
    assert stopped == tokens[: tokens.index(tokens[7])]
    assert len(sample.decode_s) == len(stopped)


def test_times_every_step_and_fills_the_cache_to_its_end(model):
    tokens, sample = run_decode(model, 124)
    assert len(tokens) == len(sample.tokens) == 124
    assert len(sample.decode_s) == 123 and sample.tokens_per_s > 0 and sample.first_token_s > 0


def test_achieved_sparsity_is_that_of_the_decode_steps(model):
    _, sample = run_decode(model, 40)
    kept = dict.fromkeys(sparse_layers(model), 0)
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, x, name=name: kept.update({name: kept[name] + (x[0].abs() > layer.threshold).sum().item()})
        )
        for name, layer in sparse_layers(model).items()
    ]
    for position, token in enumerate(sample.tokens[:-1], start=len(PROMPT)):
        decode_step(model, torch.tensor([[token]]), torch.tensor([position]))
    for hook in hooks:
        hook.remove()
    down = [name for name in kept if name.endswith("w2")]
    expected = 1 - sum(kept[name] for name in down) / (39 * 172 * len(down))
    achieved = achieved_sparsity(model, sample)
    assert achieved["down"] == pytest.approx(expected, abs=2e-3)
    assert set(achieved) == {"qkv", "o", "gate+up", "down", "all"}


def test_seeds(model):
    hot = Sampling(1.0)
    assert run_decode(model, 20, hot, seed=1)[0] == run_decode(model, 20, hot, seed=1)[0]
    assert run_decode(model, 20, hot, seed=1)[0] != run_decode(model, 20, hot, seed=2)[0]


def test_cache_length(model):
    assert [cache_length(model, n) for n in (1, 256, 257, 500, 5000)] == [256, 256, 512, 512, 512]


def test_command_streams_text_and_reports(calibrated, command):
    arguments = ("--checkpoint", calibrated, "--sparsity", 0.5, "--prompt", "The light", "--max_new_tokens", 12)
    done = command("generate", *arguments, "--num_samples", 2, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("The light") == 2
    assert record["benchmark"] == "decode" and record["sparsity"] == 0.5 and record["format"] == "fp32"
    assert 0.4 < record["achieved_sparsity"] < 0.6
    assert record["tokens_per_s"] > 0 and record["gb_per_s"] > 0 and record["new_tokens"] == [12, 12]
    assert "tokens/s" in done.stderr and "achieved, 50% nominal" in done.stderr and "gate+up" in done.stderr
    again = command("generate", *arguments, "--num_samples", 2)
    assert done.stdout.startswith(again.stdout)


def test_command_chat_at_a_terminal(calibrated, command):
    arguments = ("--checkpoint", calibrated, "--interactive", "--chat", "--temperature", 0, "--max_new_tokens", 5)
    done = command("generate", *arguments, input="Hello\n\nAnd you?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4
    assert done.stderr.strip() == "error: the prompt is empty: give some text with --prompt"


def test_command_writes_a_profile(calibrated, command, tmp_path):
    trace = tmp_path / "trace.json"
    arguments = ("--checkpoint", calibrated, "--sparsity", 0.5, "--max_new_tokens", 4, "--profile", trace)
    done = command("generate", *arguments)
    assert done.returncode == 0, done.stderr
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("teal::decode_step") == 3  # and the first token from the prompt
    assert "teal::decode_step" in done.stderr


def test_command_compiles(calibrated, command):
    arguments = ("--checkpoint", calibrated, "--sparsity", 0.5, "--temperature", 0, "--max_new_tokens", 12, "--json")
    plain, usual, compiled = (
        command("generate", *arguments, *more, env=os.environ | env)
        for more, env in (((), {"TEAL_CPU": "torch"}), ((), {}), (("--compile",), {}))
    )
    assert compiled.returncode == 0, compiled.stderr
    texts = [done.stdout.splitlines()[:-1] for done in (plain, usual, compiled)]
    assert texts[0] == texts[1] == texts[2] != []
    modes = [json.loads(done.stdout.splitlines()[-1])["mode"] for done in (plain, usual, compiled)]
    assert modes == ["plain", "compiled", "compiled"]


def test_ctrl_c_ends_cleanly(calibrated):
    arguments = ("--checkpoint", calibrated, "--prompt", "Once", "--max_new_tokens", "500")
    words = [sys.executable, "-m", "teal_fast.generate", *map(str, arguments)]
    # A shell's background jobs ignore SIGINT, and so would their children: this one is to obey it wherever it runs.
    with subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        process.stdout.read(20)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "tokens/s" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (("--sparsity", "1.5"), 2, "argument --sparsity: got '1.5', expected a fraction from 0 (dense) to 0.95"),
        (("--sparsity", "-0.1"), 2, "expected a fraction"),
        (("--sparsity", "half"), 2, "expected a fraction"),
        (("--temperature", "nan"), 2, "argument --temperature: got 'nan'"),
        (("--max_new_tokens", "0"), 2, "expected a whole number of at least 1"),
        (("--prompt", "  "), 1, "the prompt is empty"),
        (("--prompt", "word " * 600), 1, "the prompt has 601 tokens"),
        (("--device", "tpu"), 1, "--device tpu is not known here"),
        (("--calibration", "nowhere.safetensors", "--sparsity", "0.5"), 1, "nowhere.safetensors is missing"),
        (("--checkpoint", "nowhere"), 1, "nowhere does not exist"),
        (("--profile", "/proc/nowhere/trace.json"), 1, "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line(calibrated, command, arguments, code, said):
    done = command("generate", "--checkpoint", calibrated, "--max_new_tokens", "2", *arguments)
    assert done.returncode == code
    line = done.stderr.splitlines()[-1]
    assert said in line and "error: " in line and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda_is_one_line(calibrated, command):
    done = command("generate", "--checkpoint", calibrated, "--device", "cuda")
    assert done.returncode == 1
    assert done.stderr == "error: --device cuda: this PyTorch sees 0 CUDA devices, use another or --device cpu\n"


def test_calibration_of_another_model_is_refused(calibrated, demo, command):
    if not (demo / "calibration.safetensors").exists():
        assert command("calibrate", "--checkpoint", demo).returncode == 0
    done = command(
        "generate", "--checkpoint", calibrated, "--sparsity", 0.5, "--calibration", demo / "calibration.safetensors"
    )
    assert done.returncode == 1
    assert "another model's" in done.stderr and "dim 576 (checkpoint: 64)" in done.stderr


def test_demo_answers_sensibly_dense_and_sparse(demo):
    """The demo's own question; a model that is broken does not get to these words."""
    tokenizer, model = Tokenizer.load(demo), load_model(demo)
    model.setup_caches(1, 256)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Explain how plants make food from sunlight."}])
    for sparsity in (0, 0.5):
        set_sparsity(model, load_calibration(demo), sparsity)
        sample = Sample(len(prompt))
        tokens = decode(model, decode_step, prompt, 64, GREEDY, torch.Generator(), tokenizer.eos_ids, sample)
        text = tokenizer.decode(list(tokens)).lower()
        assert "light" in text and ("photosynthesis" in text or "chlorophyll" in text), text
    assert 0.45 < achieved_sparsity(model, sample)["all"] < 0.55
    assert generate.bytes_per_token(model, 0.5) < 0.7 * generate.bytes_per_token(model, 0)
