"""Quantiles of |x| against exact ones, sampling of the corpus, memory, and the command."""

import json
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import cli
from calibrate import DEFAULT_CORPUS, POINTS, AbsHistogram, cut_sequences, main, measure
from checkpoint import ROOT, WEIGHTS
from corpus import read_corpus
from eval import DEFAULT_TEXT, cut_windows, evaluate
from sparse_model import Calibration, load_calibration, load_model, set_sparsity, sparse_layers, watch_inputs
from tokenizer import Tokenizer

LEVELS = torch.linspace(0, 1, POINTS)


def draw(name, entries=40_000):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(entries, generator=generator)
    return {
        "normal": normal,
        "asymmetric": normal + 1,
        "heavy-tailed": normal * (normal.abs() * 3).exp(),
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "fp16": normal.half(),
    }[name]


def histogram(*parts):
    counted = AbsHistogram(torch.device("cpu"))
    for part in parts:
        counted.add(part)
    return counted.quantiles(POINTS)


@pytest.mark.parametrize("name", ["normal", "asymmetric", "heavy-tailed", "tiny", "huge", "fp16"])
def test_quantiles_of_continuous_data(name):
    x = draw(name)
    quantiles = histogram(x[:100].view(2, 5, 10), x[100:])  # any shape, in parts
    exact = torch.quantile(x.float().abs(), LEVELS)
    torch.testing.assert_close(quantiles[1:], exact[1:], rtol=0.01, atol=0)
    assert 0 <= quantiles[0] <= exact[0]
    shares = (x.float().abs()[:, None] <= quantiles).float().mean(0)
    torch.testing.assert_close(shares, LEVELS, rtol=0, atol=0.005)


def test_quantiles_of_bf16():
    x = draw("normal").bfloat16()
    quantiles = histogram(x)
    torch.testing.assert_close(quantiles[1:], torch.quantile(x.float().abs(), LEVELS)[1:], rtol=0.01, atol=0)
    # Values lie in steps of up to 0.8 %, so that a threshold can only drop a whole step or none of it.
    shares = (x.abs()[:, None] <= quantiles).float().mean(0)
    torch.testing.assert_close(shares, LEVELS, rtol=0, atol=0.01)


@pytest.mark.parametrize("value", [1.0, -0.3, 3e-38, 1e38])
def test_quantiles_of_a_constant(value):
    quantiles = histogram(torch.full((1000,), value))
    torch.testing.assert_close(quantiles[1:], torch.full((POINTS - 1,), abs(value)), rtol=0.01, atol=0)


def test_quantiles_of_zeros():
    assert histogram(torch.zeros(3, 4)).tolist() == [0] * POINTS
    assert histogram(torch.zeros(0)).tolist() == [0] * POINTS


def test_quantiles_of_many_zeros():
    x = draw("normal")
    x[: len(x) * 6 // 10] = 0
    quantiles = histogram(x)
    assert (quantiles[:121] == 0).all()  # up to 60 %
    torch.testing.assert_close(quantiles[121:], torch.quantile(x.abs(), LEVELS)[121:], rtol=0.01, atol=0)


def test_cut_sequences():
    documents = [list(range(100)), [1000], list(range(200, 235)), []]
    sequences = cut_sequences(documents, 10, 10_000, seed=0)
    assert sorted(map(len, sequences)) == [5] + [10] * 13  # a single token has none after it that counts
    pieces = [documents[0][i : i + 10] for i in range(0, 100, 10)] + [
        documents[2][i : i + 10] for i in range(0, 40, 10)
    ]
    assert sorted(sequences) == sorted(pieces)
    assert sequences != sorted(sequences)
    assert cut_sequences(documents, 10, 10_000, seed=0) == sequences
    assert cut_sequences(documents, 10, 10_000, seed=1) != sequences
    for tokens in (2, 10, 34):
        assert sum(map(len, cut_sequences(documents, 10, tokens, seed=0))) == tokens
    assert cut_sequences(documents, 10, 1, seed=0) == []


def test_measure_is_the_quantile_of_what_layers_saw(tiny):
    model = load_model(tiny)
    sequences = torch.randint(3, 40_000, (6, 50), generator=torch.Generator().manual_seed(0)).tolist()
    seen = {name: [] for name in sparse_layers(model)}
    with torch.no_grad(), watch_inputs(model, lambda name, layer, x: seen[name].append(x.abs())):
        for sequence in sequences:
            model.hidden(torch.tensor([sequence]))
    quantiles = measure(model, sequences)
    assert list(quantiles) == list(seen)
    for name, parts in seen.items():
        later = torch.cat([x[:, 1:].flatten() for x in parts])
        torch.testing.assert_close(quantiles[name][1:], torch.quantile(later, LEVELS)[1:], rtol=0.01, atol=0)
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(model).values())


def test_first_tokens_are_not_counted(tiny):
    model = load_model(tiny)
    with torch.no_grad():
        model.tok_embeddings.weight = torch.nn.Parameter(model.tok_embeddings.weight.clone())
        model.tok_embeddings.weight[7] = 0  # silences every layer at its position
    apart = measure(model, [[7, 8]])
    first, last = measure(model, [[7] + [8] * 9]), measure(model, [[8] * 9 + [7]])
    name = "layers.0.attention.wqkv"
    assert first[name][1:].min() > 0
    torch.testing.assert_close(first[name], apart[name], rtol=0.01, atol=1e-3)
    assert (last[name][1:22] == 0).all() and last[name][30] > 0  # one of nine counted tokens is silent


def test_nan_in_the_model_is_an_error(tiny):
    model = load_model(tiny)
    rows = model.layers[1].feed_forward.w13.weight.rows.clone()
    rows[0, 0] = torch.nan
    model.layers[1].feed_forward.w13.weight.rows = torch.nn.Parameter(rows)
    with pytest.raises(ValueError, match="NaN or inf on this corpus: is the checkpoint sound"):
        measure(model, [[5, 6, 7]])
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(model).values())


def test_calibrating_adds_little_memory(demo):
    """Peak memory of a process that measures, above one that runs the same model over the same tokens."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from calibrate import measure
        from checkpoint import find_checkpoint
        from sparse_model import load_model
        model = load_model(find_checkpoint("demo"))
        sequences = torch.randint(3, 40_000, (2, 1024), generator=torch.Generator().manual_seed(0)).tolist()
        if sys.argv[1] == "measure":
            measure(model, sequences)
        else:
            with torch.no_grad():
                for sequence in sequences:
                    model.hidden(torch.tensor([sequence]))
        # Not getrusage: its ru_maxrss starts with that of the process which started this one.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) // 1024)
    """)
    peaks = {}
    for what in ("run", "measure"):
        words = [sys.executable, "-c", program, what]
        peaks[what] = int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert peaks["run"] > 300  # MB: the weights alone are 270
    assert 0 < peaks["measure"] - peaks["run"] < 200


def test_demo_achieves_what_is_asked_for_on_other_text(demo):
    model = load_model(demo)
    set_sparsity(model, load_calibration(demo), 0.5)
    tokenizer = Tokenizer.load(demo)
    ids = [token for text in read_corpus([DEFAULT_TEXT]) for token in tokenizer.encode(text)]
    assert DEFAULT_TEXT != DEFAULT_CORPUS
    score = evaluate(model, cut_windows(ids, 256, 256, 2), 1, 0.5, tqdm(disable=True))
    assert 0.47 < score.achieved_sparsity < 0.53
    assert all(0.4 < share < 0.6 for share in score.achieved_by_kind.values())


@pytest.fixture
def corpus(tmp_path):
    """The same words as a text file, as .jsonl and in a folder."""
    text = " ".join(f"The {i}th sentence is about {i * i} whales and a harpoon." for i in range(60))
    folder = tmp_path / "texts"
    folder.mkdir()
    for path in (tmp_path / "words.txt", folder / "inside.md"):
        path.write_text(text)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": text}))
    return tmp_path


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs the command in this process, which saves the seconds that importing takes: exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        return ended.value.code, *capsys.readouterr()

    return call


def test_command(command, run_here, tiny, corpus, tmp_path):
    def arguments(name, out):
        words = ["--checkpoint", tiny, "--corpus", corpus / name, "--tokens", 500, "--context", 100]
        return [*words, "--out", tmp_path / "out" / out]

    done = command("calibrate", *arguments("words.txt", "first"))
    assert done.returncode == 0, done.stderr
    expected = f"wrote {tmp_path / 'out' / 'first'}: quantiles of |x| at the input of 8 layers over 500 tokens\n"
    assert done.stdout == expected
    assert "calibrating" in done.stderr
    calibration = Calibration.load(tmp_path / "out" / "first")
    calibration.check(tiny)
    sizes = {"tokens": "500", "context": "100", "seed": "1234"}
    assert calibration.origin == {"corpus": "words.txt", "allocation": "uniform"} | sizes

    assert run_here(*arguments("words.txt", "again"))[0] == 0
    assert run_here(*arguments("words.jsonl", "jsonl"))[0] == 0
    assert run_here(*arguments("texts", "folder"))[0] == 0
    assert (tmp_path / "out" / "again").read_bytes() == (tmp_path / "out" / "first").read_bytes()
    for name in ("jsonl", "folder"):  # the same text
        other = Calibration.load(tmp_path / "out" / name).quantiles
        assert all(torch.equal(other[layer], points) for layer, points in calibration.quantiles.items())
    assert run_here(*arguments("words.txt", "seed"), "--seed", 5)[0] == 0
    assert (tmp_path / "out" / "seed").read_bytes() != (tmp_path / "out" / "first").read_bytes()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"first", "again", "jsonl", "folder", "seed"}


def test_command_writes_beside_the_checkpoint_and_says_when_text_runs_out(run_here, tiny, corpus, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    code, _, err = run_here("--checkpoint", folder, "--corpus", corpus / "words.txt", "--dtype", "bf16")
    assert code == 0
    assert re.search(r"the corpus holds \d+ tokens, fewer than the 16384 asked for", err)
    Calibration.load(folder / "calibration.safetensors").check(folder)
    assert load_file(folder / WEIGHTS)["norm.weight"].dtype == torch.float32


def test_command_rejects_bad_input(run_here, tiny, corpus, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    words = corpus / "words.txt"
    for arguments, code, message in (
        (["--checkpoint", tmp_path / "none", "--corpus", words], 1, "none does not exist"),
        (["--checkpoint", tiny, "--corpus", tmp_path / "none.txt"], 1, "none.txt does not exist"),
        (["--checkpoint", tiny, "--corpus", tmp_path / "one.txt"], 1, "fewer than 2 tokens"),
        (["--checkpoint", tiny, "--corpus", words, "--tokens", 0], 2, "--tokens: got '0', expected a whole number"),
    ):
        exit_code, out, err = run_here(*arguments)
        assert (exit_code, out) == (code, "")
        assert message in err.splitlines()[-1]
