"""Perplexity against plain logits and transformers, which tokens are sparse, the command and its records."""

import functools
import json
import math
import shutil
from dataclasses import asdict

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm

from teal_fast.calibration.probe import measure_quantiles
from teal_fast.eval import main, print_perplexities
from teal_fast.evaluation.perplexity import Score, cut_windows, evaluate
from teal_fast.files.calibration import CALIBRATION, Calibration, set_sparsity
from teal_fast.files.checkpoint import WEIGHTS, fingerprint
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.quantization.checkpoint import read_sequences
from teal_fast.sparse_model import Phase, watch_inputs

IDS = torch.randint(3, 40_000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
SILENT = tqdm(disable=True)


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory):
    """The tiny checkpoint with a calibration file and a text to score."""
    folder = tmp_path_factory.mktemp("calibrated") / "tiny"
    shutil.copytree(tiny, folder)
    sequences = [IDS[start : start + 50] for start in range(0, 400, 50)]
    origin = {"corpus": "random"}
    Calibration(measure_quantiles(load_model(folder), sequences), fingerprint(folder), origin).save(
        folder / CALIBRATION
    )
    text = " ".join(f"The {i}th sentence is about {i * i} whales and a harpoon." for i in range(40))
    (folder.parent / "text.txt").write_text(text)
    return folder


@pytest.fixture
def run_here(run_main):
    return functools.partial(run_main, main)


def score(model, windows, dense_tokens=1, sparsity=0.0):
    return evaluate(model, windows, dense_tokens, sparsity, SILENT)


def test_cut_windows():
    ids = list(range(10))
    assert cut_windows(ids, 4, 4, None, ()) == [([0, 1, 2, 3], 1), ([4, 5, 6, 7], 1)]
    assert cut_windows(ids, 5, 5, None, ()) == [([0, 1, 2, 3, 4], 1), ([5, 6, 7, 8, 9], 1)]
    assert cut_windows(ids, 4, 3, None, ()) == [([0, 1, 2, 3], 1), ([3, 4, 5, 6], 1), ([6, 7, 8, 9], 1)]
    assert cut_windows(ids, 4, 1, None, ())[3] == ([3, 4, 5, 6], 3)
    assert cut_windows(ids, 10, 10, None, ()) == [(ids, 1)]
    assert cut_windows(ids, 11, 11, None, ()) == []
    assert [window[0] for window, _ in cut_windows(ids, 2, 2, 2, ())] == [0, 4]  # spread over the text
    assert cut_windows(ids, 2, 2, 50, ()) == cut_windows(ids, 2, 2, None, ())
    # Every window is a text of its own, whose beginning is not scored.
    assert cut_windows(ids, 4, 4, None, [-1]) == [([-1, 1, 2, 3], 1), ([-1, 5, 6, 7], 1)]
    assert cut_windows(ids, 4, 3, None, [-1, -2])[1:] == [([-1, -2, 5, 6], 2), ([-1, -2, 8, 9], 2)]


@pytest.mark.parametrize("context, stride", [(7, 7), (7, 3), (7, 6), (7, 1)])
def test_no_token_is_scored_twice_or_left_out(context, stride):
    ids = list(range(50))
    windows = cut_windows(ids, context, stride, None, ())
    scored = [token for window, unscored in windows for token in window[unscored:]]
    if stride < context:
        assert scored == list(range(1, windows[-1][0][-1] + 1))
    else:
        assert scored == [token for token in range(49) if token % context]


@pytest.mark.parametrize("context, stride", [(400, 400), (150, 150), (150, 60)])
def test_dense_perplexity_is_that_of_plain_logits_and_of_transformers(tiny, tiny_hf, context, stride):
    windows = cut_windows(IDS, context, stride, None, ())
    found = score(load_model(tiny), windows)
    plain, reference = load_model(tiny), transformers.AutoModelForCausalLM.from_pretrained(tiny_hf)
    ours, theirs = [], []
    with torch.no_grad():
        for window, unscored in windows:
            tokens = torch.tensor([window])
            logits = plain(tokens)[0, unscored - 1 : -1]
            ours.append(F.cross_entropy(logits, tokens[0, unscored:], reduction="none"))
            labels = tokens.clone()
            labels[:, :unscored] = -100
            theirs.append(reference(tokens, labels=labels).loss * len(ours[-1]))
    assert found.tokens == len(torch.cat(ours))
    assert found.perplexity == pytest.approx(torch.cat(ours).mean().exp().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(theirs).item() / found.tokens), rel=1e-5)
    assert found.achieved_sparsity == 0
    assert found.achieved_by_kind == dict.fromkeys(("qkv", "o", "gate+up", "down"), 0)
    if len(windows) == 1:
        assert found.standard_error is None
    else:
        means = torch.tensor([losses.mean() for losses in ours])
        error = found.perplexity * means.std().item() / math.sqrt(len(means))
        assert found.standard_error == pytest.approx(error, rel=1e-4)


def test_sparse_perplexity_is_that_of_masked_inputs(calibrated):
    """The masks are applied by a hook before a dense layer, not by the layer."""
    model, masked = load_model(calibrated), load_model(calibrated)
    calibration = Calibration.load(calibrated / CALIBRATION)
    set_sparsity(model, calibration, 0.5)
    windows = cut_windows(IDS, 100, 100, None, ())
    dropped, weighed = 0, 0

    def mask(name, layer, x, phase):
        nonlocal dropped, weighed
        small = x.abs() <= calibration.threshold(name, 0.5)
        small[:, 0] = False
        x.masked_fill_(small, 0)
        dropped += small.sum().item() * layer.weight.out_features
        weighed += small[:, 1:].numel() * layer.weight.out_features

    found = score(model, windows, 1, 0.5)
    with watch_inputs(masked, mask), torch.no_grad():
        losses = [
            F.cross_entropy(masked(torch.tensor([window]))[0, :-1], torch.tensor(window[1:])) for window, _ in windows
        ]
    assert found.perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert found.achieved_sparsity == pytest.approx(dropped / weighed, abs=1e-4)
    assert found.achieved_sparsity == pytest.approx(0.5, abs=0.05)
    assert abs(found.perplexity / score(load_model(calibrated), windows).perplexity - 1) > 1e-3


def test_what_is_sparsified(calibrated):
    model = load_model(calibrated)
    windows = cut_windows(IDS, 100, 100, None, ())
    dense = score(model, windows).perplexity
    set_sparsity(model, Calibration.load(calibrated / CALIBRATION), 0.9)
    none, half, full = (score(model, windows, tokens, 0.9) for tokens in (100, 50, 1))
    assert none.perplexity == dense
    assert (none.achieved_sparsity, none.achieved_by_kind) == (0, {})
    assert len({none.perplexity, half.perplexity, full.perplexity}) == 3

    window = torch.tensor([windows[0][0]])
    with torch.no_grad():
        plain = model.hidden(window)[0]
        kept = model.hidden(window, phase=Phase(50))[0]
    torch.testing.assert_close(kept[:50], plain[:50], rtol=0, atol=1e-5)
    assert ((kept[50:] - plain[50:]).abs().amax(-1) > 1e-2).all()


def test_nan_is_an_error(calibrated):
    model = load_model(calibrated)
    model.norm.weight = torch.nn.Parameter(torch.full((64,), torch.nan))
    with pytest.raises(ValueError, match=r"the loss at sparsity 0\.0 is NaN or inf"):
        score(model, cut_windows(IDS, 100, 100, None, ()))


def test_table(capsys):
    kinds = {"qkv": 0.49, "down": 0.51}
    scores = Score(0.5, 12.3456, 0.25, 100, 0.501, kinds, 321.4), Score(0.0, 9.0, None, 100, 0.0, {}, 300.0)
    print_perplexities(list(map(asdict, scores)))
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0][:5] == ["sparsity", "achieved", "perplexity", "±", "tokens/s"]
    assert table[1] == ["50%", "50.1%", "12.346", "0.250", "321", "qkv", "49.0%", "down", "51.0%"]
    assert table[2] == ["0%", "0.0%", "9.000", "-", "300"]


def test_command(command, calibrated, tmp_path):
    out = tmp_path / "new" / "records.json"
    text = calibrated.parent / "text.txt"
    arguments = ["--text", text, "--context", 64, "--stride", 32, "--windows", 3, "--sparsity", 0, 0.5, "--out", out]
    done = command("eval", "--checkpoint", calibrated, *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "perplexity on text.txt (context 64, stride 32, 3 windows, prefill full)"
    assert [line.split()[0] for line in lines[1:4]] == ["sparsity", "0%", "50%"]
    records = json.loads(lines[-1])
    assert len(lines) == 5 and len(records) == 2
    assert "evaluating" in done.stderr and "evaluating" not in done.stdout
    for record, nominal in zip(records, (0.0, 0.5), strict=True):
        assert record["benchmark"] == "eval"
        assert (record["model"], record["format"], record["sparsity"]) == ("tiny", "fp32", nominal)
        assert record["achieved_sparsity"] == pytest.approx(nominal, abs=0.1)
        assert record["tokens"] == 63 + 2 * 32
        assert record["calibration"] == {"corpus": "random"}
        assert record["peer"] is None and record["tokens_per_s"] > 0
        assert record["versions"].keys() == {"torch", "triton", "python", "commit"}
        assert {"device", "date", "perplexity", "standard_error", "achieved_by_kind"} <= record.keys()
    assert len({record["run"] for record in records}) == 1
    assert json.loads(out.read_text()) == records
    assert [path.name for path in out.parent.iterdir()] == ["records.json"]


@pytest.mark.parametrize("prefill, dense_tokens", [("dense", 64), ("half", 32), ("full", 1)])
def test_prefill_flag(run_here, calibrated, prefill, dense_tokens):
    text = calibrated.parent / "text.txt"
    arguments = ["--text", text, "--context", 64, "--windows", 1, "--sparsity", 0.8, "--prefill", prefill]
    code, out, _ = run_here("--checkpoint", calibrated, *arguments)
    assert code == 0
    # One window has no spread over windows, and strict readers of JSON know no NaN.
    record = json.loads(out.splitlines()[-1], parse_constant=pytest.fail)[0]
    assert record["standard_error"] is None
    assert record["protocol"].endswith(f"prefill {prefill}")
    model = load_model(calibrated)
    set_sparsity(model, Calibration.load(calibrated / CALIBRATION), 0.8)
    ids = Tokenizer.load(calibrated).encode(text.read_text())
    assert record["perplexity"] == score(model, [(ids[:64], 1)], dense_tokens, 0.8).perplexity


def test_an_unwritable_out_is_refused_before_the_work(run_here, calibrated, tmp_path):
    (tmp_path / "file").write_text("in the way")
    text = calibrated.parent / "text.txt"
    arguments = ["--text", text, "--context", 64, "--windows", 1, "--sparsity", 0, "--out", tmp_path / "file" / "out"]
    code, out, err = run_here("--checkpoint", calibrated, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: cannot write ") and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--context", "5000"], 1, "--context 5000: expected 2 to this model's 512"),
        (["--context", "1"], 1, "--context 1: expected 2 to"),
        (["--context", "64", "--stride", "65"], 1, "--stride 65 would skip text: expected at most the context, 64"),
        (["--text", "{short}"], 1, "the text has 2 tokens, fewer than one window of 64: use a smaller --context"),
        (["--text", "{none}"], 1, "does not exist"),
        (["--sparsity", "0.96"], 2, "--sparsity: got '0.96', expected a fraction from 0 (dense) to 0.95"),
        (["--sparsity", "0.5", "-0.1"], 2, "--sparsity"),
        (["--sparsity", "nan"], 2, "--sparsity: got 'nan'"),
        (["--checkpoint", "{none}"], 1, "none does not exist: expected a converted checkpoint"),
        (["--calibration", "{broken}", "--sparsity", "0.5"], 1, "is truncated or not a safetensors file"),
        (["--calibration", "{none}", "--sparsity", "0.5"], 1, "is missing"),
        (
            ["--calibration", "{weights}", "--sparsity", "0.5"],
            1,
            "has no metadata called calibration, with version",
        ),
        (["--device", "tpu"], 1, "--device tpu is not known here"),
    ],
)
def test_bad_input(run_here, calibrated, tmp_path, arguments, code, message):
    paths = {name: tmp_path / name for name in ("short", "none", "broken")} | {"weights": calibrated / WEIGHTS}
    paths["short"].write_text("Hello there")
    paths["broken"].write_bytes((calibrated / CALIBRATION).read_bytes()[:-1])
    options = {"--checkpoint": calibrated, "--text": calibrated.parent / "text.txt", "--context": 64}
    words = [str(word) for pair in options.items() if pair[0] not in arguments for word in pair]
    exit_code, out, err = run_here(*words, *(argument.format(**paths) for argument in arguments))
    assert (exit_code, out) == (code, "")
    assert message in err.splitlines()[-1]
    assert code == 2 or err.count("\n") == 1


def test_sequences_of_a_model_with_bos_begin_with_it(calibrated, run_here, tmp_path):
    """What is evaluated, calibrated on and rounded for: each window and sequence, not the text's first one alone."""
    folder = shutil.copytree(calibrated, tmp_path / "begun")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = TemplateProcessing(single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.prefix == [tokenizer.bos_id]
    text = calibrated.parent / "text.txt"
    assert {ids[0] for ids in read_sequences(folder, [text], 500, 100, 0)} == {tokenizer.bos_id}
    out = tmp_path / "records.json"
    code, _, _ = run_here("--checkpoint", folder, "--text", text, "--sparsity", 0, "--context", 100, "--out", out)
    assert code == 0
    (record,) = json.loads(out.read_text())
    windows = cut_windows(tokenizer.encode(text.read_text()), 100, 100, None, [tokenizer.bos_id])
    assert record["perplexity"] == pytest.approx(score(load_model(folder), windows).perplexity)
