import argparse
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from teal_fast import calibrate, cli, generate, quantize
from teal_fast import eval as evaluate
from teal_fast.calibration.probe import POINTS
from teal_fast.files.calibration import CALIBRATION, SHIPPED
from teal_fast.files.checkpoint import CONFIG, WEIGHTS
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.paths import ROOT
from teal_fast.tests.models import write_llama


def finish(body: str, **streams: int) -> subprocess.CompletedProcess:
    """Runs `cli.run` on a main made of `body`; streams: other places for its output."""
    code = f"from teal_fast import cli\ndef main():\n    {body}\ncli.run(main)"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=buffered, text=True, check=False, **streams)


@pytest.mark.parametrize(
    "body, code, said",
    [
        ("pass", 0, ""),
        ("raise ValueError('got 3,\\n  expected 4')", 1, "error: got 3, expected 4\n"),
        ("open('/nowhere/file')", 1, "error: [Errno 2] No such file or directory: '/nowhere/file'\n"),
        ("raise ValueError('a' * 5000 + 'end')", 1, f"error: {'a' * 700} … {'a' * 197}end\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise BrokenPipeError", 1, ""),
        (
            "import torch; torch.empty(1 << 50, dtype=torch.uint8)",
            1,
            "error: out of memory (1,125,899.9 GB more were refused): take shorter texts, a narrower type (--dtype) or "
            "another --device\n",
        ),
    ],
)
def test_run_ends_in_one_line(body, code, said):
    done = finish(body)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("body", ["print(1)", "print(1, flush=True)"])
def test_output_that_nobody_takes(body):
    with open("/dev/full", "wb") as full:
        done = finish(body, stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = finish(body, stdout=writer)
    assert (done.returncode, done.stderr) == (1, "")
    assert finish(f"import sys; sys.stderr.write('1'); {body}", stdout=writer, stderr=writer).returncode == 1
    os.close(writer)


@pytest.mark.parametrize("mistake", ["AssertionError", "RuntimeError('shapes')"])
def test_run_does_not_hide_our_own_mistakes(mistake):
    assert "Traceback" in finish(f"raise {mistake}").stderr


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (cli.sparsity, {"0": 0, "0.5": 0.5, "0.95": 0.95}, ["-0.01", "0.96", "nan", "half", ""]),
        (cli.probability, {"0": 0, "1": 1}, ["1.1", "-1", "nan"]),
        (cli.temperature, {"0": 0, "2.5": 2.5}, ["-1", "inf", "nan"]),
        (cli.positive_int, {"1": 1, "20": 20}, ["0", "-3", "1.5", "x"]),
        (cli.count, {"0": 0, "20": 20}, ["-1", "1.5", "x", ""]),
    ],
)
def test_argument_types(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            parse(text)


def test_what_is_missing_is_made_with_a_word_or_refused(tiny, tmp_path, capfd, little_calibration):
    folder = shutil.copytree(tiny, tmp_path / "fresh")
    with pytest.raises(FileNotFoundError, match="has no calibration: run"):
        cli.open_calibration(folder, prepare=False)
    made = cli.open_calibration(folder)
    output = capfd.readouterr()
    assert output.out == ""
    assert f"calibrating, once: python calibrate.py --checkpoint {folder} --device cpu\n" in output.err
    assert all(len(points) == POINTS for points in made.curves.values()) and made.origin["corpus"] == "calibration"
    assert cli.open_calibration(folder, prepare=False).curves.keys() == made.curves.keys()
    assert capfd.readouterr().err == ""  # found, not made again


def test_a_missing_demo_is_made_with_a_word_or_refused(tmp_path, monkeypatch, capfd):
    """Only that it is made: what comes of it is tested through the `demo` fixture, which may have come this way."""
    folder, calls = tmp_path / "demo", []
    monkeypatch.setattr("teal_fast.files.checkpoint.demo_folder", lambda: folder)
    monkeypatch.setattr(cli, "demo_folder", lambda: folder)

    def convert(source, out, dtype):
        calls.append((source.suffix, out))
        out.mkdir()
        for name in (CONFIG, WEIGHTS):
            (out / name).write_text("")

    monkeypatch.setattr(cli, "convert_gguf", convert)
    with pytest.raises(FileNotFoundError, match=r"run `python -m teal_fast\.scripts\.prepare_demo`"):
        cli.open_checkpoint("demo", prepare=False)
    assert cli.open_checkpoint("demo") == folder and calls == [(".gguf", folder)]
    assert capfd.readouterr().err.startswith("preparing the demo model, once")


def test_the_demo_comes_with_a_calibration(demo, tmp_path):
    """It is the one that ships with the project, and what calibrate.py finds on the same text now."""
    bare = tmp_path / "demo"
    shutil.copytree(demo, bare, ignore=shutil.ignore_patterns(CALIBRATION))
    shipped = cli.open_calibration(bare, prepare=False)
    assert (shipped.origin["method"], shipped.origin["tokens"]) == ("measured", "16384")
    assert cli.open_calibration(bare, SHIPPED, prepare=False).curves.keys() == shipped.curves.keys()


@pytest.fixture(scope="module")
def small_table(demo, tmp_path_factory):
    """A checkpoint of 1,000 embeddings with the demo's tokenizer of 49,152 tokens; a text and a task of larger ids."""
    folder = tmp_path_factory.mktemp("table")
    convert_huggingface(write_llama(folder / "hf", demo, 128, 256, 1, vocab_size=1000), folder / "small", None)
    (folder / "text.txt").write_text("Call me Ishmael. " * 50)
    (folder / "task.jsonl").write_text('{"ctx": "Call me", "cont": " Ishmael"}\n')
    return folder


@pytest.mark.parametrize(
    "module, arguments",
    [
        (generate, ("--prompt", "Call me Ishmael")),
        (generate, ("--prompt", "Call me Ishmael", "--chat")),
        (calibrate, ("--corpus", "text.txt", "--out", "new.safetensors")),
        (evaluate, ("--text", "text.txt", "--context", 16, "--sparsity", 0)),
        (evaluate, ("--tasks", "task", "--task_data", ".", "--sparsity", 0)),
        (evaluate, ("--text", "text.txt", "--baseline", "wanda", "--wanda_text", "text.txt", "--context", 16)),
        (quantize, ("--calibrated", "--corpus", "text.txt", "--out", "new")),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else " ".join(map(str, value)),
)
def test_a_token_without_embedding_is_one_line(small_table, module, arguments, run_main, monkeypatch):
    monkeypatch.chdir(small_table)
    code, _, errors = run_main(module.main, "--checkpoint", small_table / "small", *arguments)
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(said) == 1 and "Traceback" not in errors
    assert re.match(r"error: token id \d{4,5} is outside the model's vocabulary of 1000: leave that token out", said[0])
    assert not list(small_table.glob("new*"))


def test_a_prompt_of_known_tokens_is_answered(small_table, run_main):
    code, text, errors = run_main(generate.main, "--checkpoint", small_table / "small", "--prompt", "a", "--top_k", 0)
    assert (code, text[:1]) == (0, "a"), errors


@pytest.mark.parametrize(
    "module, arguments, what, todo",
    [
        (generate, ("--prompt", "a b c " * 20), "for a prompt of 61 tokens and its answer ", "shorten the prompt"),
        (
            calibrate,
            ("--corpus", "text.txt", "--context", 64),
            "for calibrating on sequences of 64 tokens ",
            "lower --con",
        ),
        (
            evaluate,
            ("--text", "text.txt", "--context", 16, "--sparsity", 0),
            "for windows of 16 tokens ",
            "lower --context",
        ),
        (evaluate, ("--tasks", "task", "--task_data", ".", "--sparsity", 0), "", "take shorter texts, a narrower type"),
        (
            quantize,
            ("--calibrated", "--corpus", "text.txt", "--out", "new"),
            "for the hidden states of ",
            "lower --tokens",
        ),
    ],
    ids=["generate", "calibrate", "eval", "tasks", "quantize"],
)
def test_memory_that_is_refused_is_one_line(even, small_table, module, arguments, what, todo, run_main, monkeypatch):
    """The allocator really refuses, in the first layer; the line says what was asked for and what to lower."""
    monkeypatch.chdir(small_table)
    monkeypatch.setattr("teal_fast.model.Attention.forward", lambda *given: torch.empty(1 << 50, dtype=torch.uint8))
    if module is quantize:
        monkeypatch.setattr("teal_fast.quantize.open_calibration", lambda *given: None)
    code, _, errors = run_main(module.main, "--checkpoint", even, *arguments)
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(said) == 1 and "Traceback" not in errors
    assert said[0].startswith(f"error: out of memory {what}") and f" GB more were refused): {todo}" in said[0]


def test_weights_that_do_not_fit_are_one_line(tiny, run_main, monkeypatch):
    def refused(*given):
        raise MemoryError

    monkeypatch.setattr("teal_fast.files.load.check_finite", refused)
    code, _, errors = run_main(generate.main, "--checkpoint", tiny, "--dtype", "bf16")
    assert code == 1 and errors.splitlines()[-1] == (
        f"error: out of memory for the weights of {tiny} on cpu (more was refused): take a quantized copy "
        "(quantize.py), a narrower type (--dtype bf16) or another --device"
    )
