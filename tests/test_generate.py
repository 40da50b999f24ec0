import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from teal_fast import generate
from teal_fast.engine.accounting import bytes_per_token
from teal_fast.engine.load import load
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.text import stream_text
from teal_fast.files.calibration import SHIPPED
from teal_fast.files.paths import ROOT
from teal_fast.generate import main


def test_command_streams_text_and_reports(calibrated, command, run_main):
    arguments = ("--checkpoint", calibrated, "--sparsity", 0.5, "--prompt", "The light", "--max_new_tokens", 12)
    done = command("generate", *arguments, "--num_samples", 2, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("The light") == 2
    assert record["benchmark"] == "decode" and record["sparsity"] == 0.5 and record["format"] == "fp32"
    assert 0.4 < record["achieved_sparsity"] < 0.6
    assert record["tokens_per_s"] > 0 and record["gb_per_s"] > 0 and record["new_tokens"] == [12, 12]
    assert "tokens/s" in done.stderr and "achieved, 50% nominal" in done.stderr and "gate+up" in done.stderr
    _, again, _ = run_main(main, *arguments, "--num_samples", 2)
    assert done.stdout.startswith(again)


def test_samples_of_one_batch_are_those_of_their_seeds(calibrated, run_main):
    arguments = ("--checkpoint", calibrated, "--prompt", "The light", "--max_new_tokens", 12, "--temperature", 1.5)
    _, together, said = run_main(main, *arguments, "--num_samples", 3, "--seed", 7)
    apart = [run_main(main, *arguments, "--seed", seed)[1] for seed in (7, 8, 9)]
    assert together == "".join(apart) and len(set(apart)) == 3
    assert "tokens/s (median of 3), " in said and " together" in said and "GB/s" in said
    stop = apart[1].removeprefix("The light")[5:8]
    _, stopped, _ = run_main(main, *arguments, "--num_samples", 3, "--seed", 7, "--stop", stop)
    one_by_one = [run_main(main, *arguments, "--seed", seed, "--stop", stop)[1] for seed in (7, 8, 9)]
    assert stopped == "".join(one_by_one) != together


def test_command_chat_at_a_terminal(calibrated, command):
    arguments = ("--checkpoint", calibrated, "--interactive", "--chat", "--temperature", 0, "--max_new_tokens", 5)
    done = command("generate", *arguments, input="Hello\n\nAnd you?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4
    lines = done.stderr.splitlines()
    assert lines[0].startswith("loading ") and lines.count("error: the prompt is empty: give some text") == 1
    assert sum("tokens/s" in line for line in lines) == 2  # what each turn cost
    known = [int(line.split()[3]) - int(line.split()[1]) for line in lines if line.startswith("reading")]
    assert known[0] == 0 < known[1]  # the second turn reads only what is new


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
        (("--top_k", "-1"), 2, "argument --top_k: got '-1', expected a whole number of at least 0"),
        (("--prompt", "  "), 1, "the prompt is empty"),
        (("--prompt", "word " * 600), 1, "the prompt has 601 tokens"),
        (("--fim", "a"), 2, "argument --fim: expected 2 arguments"),
        (("--fim", "a", "b", "--prompt", "c"), 2, "--fim has a prompt of its own: drop --prompt"),
        (("--fim", "a", "b", "--chat"), 2, "--fim has a prompt of its own"),
        (("--fim", "a", "b", "--interactive"), 2, "--fim has a prompt of its own"),
        (("--fim", "a", "b"), 1, "this checkpoint has no tokens to fill a gap with: drop --fim or use a model of code"),
        (("--device", "tpu"), 1, "--device tpu is not known here"),
        (("--calibration", "nowhere.safetensors", "--sparsity", "0.5"), 1, "nowhere.safetensors is missing"),
        (("--checkpoint", "nowhere"), 1, "nowhere does not exist"),
        (("--profile", "/proc/nowhere/trace.json"), 1, "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line(calibrated, run_main, arguments, code, said):
    ended, _, errors = run_main(main, "--checkpoint", calibrated, "--max_new_tokens", "2", *arguments)
    assert ended == code
    line = errors.splitlines()[-1]
    assert said in line and "error: " in line and "Traceback" not in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda_is_one_line(calibrated, run_main):
    code, _, errors = run_main(main, "--checkpoint", calibrated, "--device", "cuda")
    assert code == 1
    assert errors == "error: --device cuda: this PyTorch sees 0 CUDA devices, use another or --device cpu\n"


def test_calibration_of_another_model_is_refused(calibrated, run_main):
    code, _, errors = run_main(main, "--checkpoint", calibrated, "--sparsity", 0.5, "--calibration", SHIPPED)
    assert code == 1
    assert "another model's" in errors and "dim '576' (checkpoint: '64')" in errors


def test_demo_answers_sensibly_dense_and_sparse(demo):
    """The demo's own question; a model that is broken does not get to these words."""
    engine, tokenizer = load(demo)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Explain how plants make food from sunlight."}])
    for sparsity in (0, 0.5):
        tokens = engine.stream(Request(prompt, Sampling(0.0), sparsity, 64))
        text = "".join(stream_text(tokens, tokenizer, prompt)).lower()
        assert "light" in text and ("photosynthesis" in text or "chlorophyll" in text), text
    assert 0.45 < engine.achieved_sparsity()["all"] < 0.55
    assert bytes_per_token(engine.model, 0.5) < 0.7 * bytes_per_token(engine.model, 0)


def test_stop_takes_tokens_and_texts(calibrated, run_main):
    arguments = (
        "--checkpoint",
        calibrated,
        "--temperature",
        0,
        "--max_new_tokens",
        12,
        "--prompt",
        "The light",
        "--json",
    )
    code, out, err = run_main(generate.main, *arguments)
    assert not code, err
    text, record = out.rsplit("\n", 2)[0].removeprefix("The light"), json.loads(out.splitlines()[-1])
    assert record["stop_ids"] == [0, 2, 4] and record["stop"] == [] and record["finish_reason"] == "length"
    end = text[len(text) // 2 :][:3]
    code, out, err = run_main(generate.main, *arguments, "--stop", end, "--stop", "<|im_start|>", "--stop", "zebra")
    assert not code, err
    record = json.loads(out.splitlines()[-1])
    assert out.rsplit("\n", 2)[0] == "The light" + text[: text.index(end)]
    assert record["stop_ids"] == [0, 1, 2, 4] and record["stop"] == [end, "zebra"]
    assert record["finish_reason"] == "stop" and record["new_tokens"][0] < 12
    code, out, err = run_main(generate.main, *arguments, "--stop", "")
    assert code == 2 and err.splitlines()[-1].endswith("error: argument --stop: got an empty text, expected some")


def test_a_chat_prints_the_answer_alone_and_a_text_its_prompt(calibrated, run_main):
    arguments = ("--checkpoint", calibrated, "--temperature", 0, "--max_new_tokens", 5, "--prompt", "The light")
    texts = [run_main(main, *arguments, *more)[1] for more in ((), ("--chat",), ("--eager",))]
    assert texts[0].startswith("The light") and texts[2] == texts[0]
    assert "The light" not in texts[1] and texts[1]


def test_fim_prints_what_fills_the_gap(calibrated, tmp_path, run_main):
    """By tokens that the folder names; the answer is that of the same ids."""
    folder = shutil.copytree(calibrated, tmp_path / "coder")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = {"prefix_token": "<gh_stars>", "suffix_token": "<issue_start>", "middle_token": "<jupyter_text>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    arguments = ("--checkpoint", folder, "--temperature", 0, "--max_new_tokens", 5, "--json")
    code, out, errors = run_main(main, *arguments, "--fim", "The light", " of the sea")
    assert code == 0, errors
    engine, tokenizer = load(folder)
    ids = tokenizer.encode("<gh_stars>The light<issue_start> of the sea<jupyter_text>")
    tokens = engine.stream(Request(ids, Sampling(0.0), 0, 5))
    assert out.rsplit("\n", 2)[0] == "".join(stream_text(tokens, tokenizer, ids))
    assert json.loads(out.splitlines()[-1])["prompt_tokens"] == len(ids)


def test_an_answer_that_the_context_cuts_says_so(calibrated, run_main):
    """The model's context is 512. Filters that are off and the smallest temperature draw as greedy decoding does."""
    arguments = (
        "--checkpoint",
        calibrated,
        "--prompt",
        "The light",
        "--max_new_tokens",
        600,
        "--json",
        "--temperature",
    )
    off = ("--top_k", 0, "--top_p", 1, "--min_p", 0)
    (code, text, errors), (_, again, _) = (run_main(main, *arguments, t, *off) for t in ("0", "1e-310"))
    record = json.loads(text.splitlines()[-1])
    (tokens,) = record["new_tokens"]
    assert code == 0 and tokens + record["prompt_tokens"] == 512
    assert record["finish_reason"] == "length" and record["cut_by_context"] == 1
    assert f"the context of 512 tokens is full: cut after {tokens} of 600 tokens\n" in errors
    assert again.splitlines()[:-1] == text.splitlines()[:-1]
