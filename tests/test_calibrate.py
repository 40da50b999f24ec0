"""Targets are hit, methods differ as they should, sampling of the corpus, resuming, and the command."""

import dataclasses
import functools
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from teal_fast.calibrate import main
from teal_fast.calibration import make
from teal_fast.calibration import passes as passes_module
from teal_fast.calibration.corpus import read_corpus
from teal_fast.calibration.make import DEFAULT_CORPUS, QUICK
from teal_fast.calibration.methods import METHODS, fit_curves
from teal_fast.calibration.passes import Journal, Passes, cut_sequences
from teal_fast.engine.accounting import tally_kept
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, cut_windows, evaluate
from teal_fast.files.calibration import Calibration, load_calibration, set_sparsity
from teal_fast.files.checkpoint import WEIGHTS
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.sparse_model import Phase, sparse_layers


def test_cut_sequences():
    documents = [list(range(100)), [1000], list(range(200, 235)), []]
    sequences = cut_sequences(documents, 10, 10_000, seed=0, prefix=())
    assert sorted(map(len, sequences)) == [5] + [10] * 13  # a single token has none after it that counts
    pieces = [documents[0][i : i + 10] for i in range(0, 100, 10)] + [
        documents[2][i : i + 10] for i in range(0, 40, 10)
    ]
    assert sorted(sequences) == sorted(pieces)
    assert sequences != sorted(sequences)
    assert cut_sequences(documents, 10, 10_000, seed=0, prefix=()) == sequences
    assert cut_sequences(documents, 10, 10_000, seed=1, prefix=()) != sequences
    for tokens in (2, 10, 34):
        assert sum(map(len, cut_sequences(documents, 10, tokens, seed=0, prefix=()))) == tokens
    assert cut_sequences(documents, 10, 1, seed=0, prefix=()) == []
    begun = cut_sequences(documents, 10, 10_000, 0, [-1, -2])
    assert [ids[:2] for ids in begun] == [[-1, -2]] * 14
    assert [ids[2:] for ids in begun] == [ids[2:] for ids in sequences]


def test_demo_achieves_what_is_asked_for_on_other_text(demo):
    model = load_model(demo)
    set_sparsity(model, load_calibration(demo), 0.5)
    tokenizer = Tokenizer.load(demo)
    ids = [token for text in read_corpus([DEFAULT_TEXT]) for token in tokenizer.encode(text)]
    assert DEFAULT_TEXT != DEFAULT_CORPUS
    score = evaluate(model, cut_windows(ids, 256, 256, 2, tokenizer.prefix), 1, 0.5, tqdm(disable=True))
    assert 0.47 < score.achieved_sparsity < 0.53
    assert all(0.3 < share < 0.7 for share in score.achieved_by_kind.values())


def passes(folder, path, tokens=512):
    sequences = torch.randint(3, 40_000, (8, 64), generator=torch.Generator().manual_seed(2)).tolist()
    return Passes(load_model(folder), sequences, tokens, Journal(path, {"seed": 2}))


@pytest.mark.parametrize("method", METHODS)
def test_targets_are_hit_by_every_method(tiny, tmp_path, method):
    made = passes(tiny, tmp_path / "journal")
    curves, factors = fit_curves(made, method)
    assert curves.keys() == sparse_layers(made.model).keys()
    assert (factors != {}) == (method == "fisher")
    assert all((layer.threshold == -1).all() for layer in sparse_layers(made.model).values())
    found = Calibration(curves, {}, {}, factors)
    windows = [(w, 1) for w in torch.randint(3, 40_000, (4, 64), generator=torch.Generator().manual_seed(3)).tolist()]
    for target in (0.25, 0.4, 0.6):
        set_sparsity(made.model, found, target)
        score = evaluate(made.model, windows, 1, target, tqdm(disable=True))
        assert score.achieved_sparsity == pytest.approx(target, abs=0.02)
        if method == "uniform":
            assert all(abs(share - target) < 0.03 for share in score.achieved_by_kind.values())


def test_layers_that_matter_less_are_dropped_more(tiny, tmp_path):
    made = passes(tiny, tmp_path / "journal")
    quiet = made.model.layers[1].feed_forward.w2
    quiet.weight.packed = torch.nn.Parameter(quiet.weight.packed * 0.01, requires_grad=False)
    for method in ("global", "measured"):
        curves, _ = fit_curves(passes_of(made, tmp_path / method), method)
        set_sparsity(made.model, Calibration(curves, {}, {}), 0.2)
        with tally_kept(made.model) as tally, torch.no_grad():
            for sequence in made.sequences:
                made.model.hidden(torch.tensor([sequence]), phase=Phase(1))
        kept = {name: (tally.kept[name] / tally.seen[name]).item() for name in tally.kept}
        assert kept["layers.1.feed_forward.w2"] < 0.5 < kept["layers.0.feed_forward.w2"]


def passes_of(made, path):
    return Passes(made.model, made.sequences, made.tokens, Journal(path, {}))


def test_a_run_that_was_cut_off_goes_on(tiny, tmp_path, monkeypatch):
    whole, _ = fit_curves(passes(tiny, tmp_path / "whole"), "measured")
    titles, observe = [], passes_module.observe

    def counted(model, part, title, *rest):
        titles.append(title)
        if len(titles) == 3:
            raise KeyboardInterrupt
        return observe(model, part, title, *rest)

    monkeypatch.setattr(passes_module, "observe", counted)
    with pytest.raises(KeyboardInterrupt):
        fit_curves(passes(tiny, tmp_path / "cut"), "measured")
    again, _ = fit_curves(passes(tiny, tmp_path / "cut"), "measured")
    assert titles.count("gradients") == 1 and titles.count("costs at 50%") == 2
    assert all(torch.equal(again[name], points) for name, points in whole.items())
    assert Journal(tmp_path / "cut", {"seed": 2}).tensors


@pytest.mark.parametrize("damage", ["another run", "garbage", "cut", "empty", "names", "value"])
def test_a_journal_that_is_of_no_use_is_replaced(tmp_path, capsys, damage):
    path, about = tmp_path / "journal", {"seed": 2}
    made = {"layer": {"quantiles": torch.arange(3.0)}}
    Journal(path, about).keep("1 dense", lambda: made)
    assert capsys.readouterr().err == ""
    whole = path.read_bytes()
    match damage:
        case "another run":
            about = {"seed": 3}
        case "names":
            save_file({"layer": torch.ones(2)}, path, {"about": json.dumps(about)})
        case "value":  # one bit, in the last value: the file stays sound for its format
            path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 64]) + whole[-1:])
        case _:
            path.write_bytes({"garbage": b"\xff" * 500, "cut": whole[:-4], "empty": b""}[damage])
    journal = Journal(path, about)
    assert journal.tensors == {}
    err = capsys.readouterr().err
    trouble = "is of another run" if damage == "another run" else "is damaged"
    assert err == f"{path} {trouble}: starting anew\n"
    journal.keep("1 dense", lambda: made)
    assert Journal(path, about).keep("1 dense", pytest.fail)["layer"]["quantiles"].tolist() == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_journal_never_goes_on_with_other_text(tiny, corpus, monkeypatch):
    """Of the same name and length: other words of as many tokens."""
    abouts = []
    monkeypatch.setattr(make, "Journal", lambda path, about: abouts.append(about) or Journal(path, about))
    for word in ("whales", "whales", "boats"):
        text = (corpus / "words.txt").read_text().replace("whales", word)
        (corpus / "again" / "words.txt").parent.mkdir(exist_ok=True)
        (corpus / "again" / "words.txt").write_text(text)
        settings = make.Settings("uniform", (corpus / "again" / "words.txt",), tokens=128, pass_tokens=64, context=64)
        make.make_calibration(tiny, corpus / "out", torch.device("cpu"), settings=settings)
    first, same, other = abouts
    assert first == same and {key for key in first if first[key] != other[key]} == {"tokens_sha256"}


def test_a_run_that_was_cut_off_and_another_text_share_nothing(tiny, corpus, monkeypatch, capsys):
    """The text's name and length stay, its words change in between: the result is a new run's, to the byte."""
    settings = make.Settings("uniform", (corpus / "words.txt",), tokens=128, pass_tokens=64, context=64)
    observe, calls = passes_module.observe, []

    def breaks_off(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return observe(*given)

    monkeypatch.setattr(passes_module, "observe", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        make.make_calibration(tiny, corpus / "out", torch.device("cpu"), settings=settings)
    assert (corpus / "out.partial").exists() and not (corpus / "out").exists()
    text = (corpus / "words.txt").read_text()
    (corpus / "words.txt").write_text(text.replace("whales", "boats"))
    for name in ("out", "fresh"):
        make.make_calibration(tiny, corpus / name, torch.device("cpu"), settings=settings)
    assert (corpus / "out").read_bytes() == (corpus / "fresh").read_bytes()
    assert "out.partial is of another run: starting anew" in capsys.readouterr().err


def test_a_journal_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*: it is a folder"):
        Journal(tmp_path, {})


@pytest.fixture
def corpus(tmp_path):
    """The same words as a text file, as .jsonl and in a folder, which is called as the file is."""
    text = " ".join(f"The {i}th sentence is about {i * i} whales and a harpoon." for i in range(60))
    folder = tmp_path / "folder" / "words.txt"
    folder.mkdir(parents=True)
    for path in (tmp_path / "words.txt", folder / "inside.md"):
        path.write_text(text)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": text}))
    return tmp_path


@pytest.fixture
def run_here(run_main):
    return functools.partial(run_main, main)


def test_command(command, run_here, tiny, corpus, tmp_path):
    def arguments(name, out):
        words = ["--checkpoint", tiny, "--method", "measured", "--corpus", corpus / name, "--tokens", 200]
        return [*words, "--context", 50, "--out", tmp_path / "out" / out]

    done = command("calibrate", *arguments("words.txt", "first"))
    assert done.returncode == 0, done.stderr
    expected = f"wrote {tmp_path / 'out' / 'first'}: thresholds of 8 layers by the method measured over 200 tokens\n"
    assert done.stdout == expected
    assert "costs at 30%" in done.stderr
    calibration = Calibration.load(tmp_path / "out" / "first")
    calibration.check(tiny)
    sizes = {"tokens": "200", "pass_tokens": "4096", "context": "50", "seed": "1234"}
    assert len(text := calibration.origin.pop("tokens_sha256")) == 16 and int(text, 16)
    assert calibration.origin == {"corpus": "words.txt", "method": "measured"} | sizes

    assert run_here(*arguments("words.jsonl", "jsonl"))[0] == 0
    assert run_here(*arguments("folder/words.txt", "folder"))[0] == 0
    assert (tmp_path / "out" / "folder").read_bytes() == (tmp_path / "out" / "first").read_bytes()  # the same text
    other = Calibration.load(tmp_path / "out" / "jsonl").curves
    assert all(torch.equal(other[layer], points) for layer, points in calibration.curves.items())
    assert run_here(*arguments("words.txt", "seed"), "--seed", 5)[0] == 0
    assert (tmp_path / "out" / "seed").read_bytes() != (tmp_path / "out" / "first").read_bytes()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"first", "jsonl", "folder", "seed"}


def test_command_writes_beside_the_checkpoint_and_says_when_text_runs_out(run_here, tiny, corpus, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    code, _, err = run_here("--checkpoint", folder, "--corpus", corpus / "words.txt", "--dtype", "bf16")
    assert code == 0
    assert re.search(r"the corpus holds \d+ tokens, fewer than the 16384 asked for", err)
    Calibration.load(folder / "calibration.safetensors").check(folder)
    assert load_file(folder / WEIGHTS)["norm.weight"].dtype == torch.float32


def test_quick_reads_less_and_flags_count_more(run_here, tiny, tmp_path):
    for more, expected in (
        ((), QUICK),
        (("--tokens", 600, "--pass_tokens", 100), dataclasses.replace(QUICK, tokens=600, pass_tokens=100)),
    ):
        code, out, err = run_here("--checkpoint", tiny, "--quick", "--out", tmp_path / "out", *more)
        assert code == 0 and f"by the method {expected.method} over {expected.tokens} tokens" in out, err
        origin = Calibration.load(tmp_path / "out").origin
        about = ("method", "tokens", "pass_tokens", "context", "seed")
        assert all(origin[name] == str(getattr(expected, name)) for name in about)


def test_command_rejects_bad_input(run_here, tiny, corpus, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    words = corpus / "words.txt"
    for arguments, code, message in (
        (["--checkpoint", tmp_path / "none", "--corpus", words], 1, "none does not exist"),
        (["--checkpoint", tiny, "--corpus", tmp_path / "none.txt"], 1, "none.txt does not exist"),
        (["--checkpoint", tiny, "--corpus", tmp_path / "one.txt"], 1, "fewer than 2 tokens"),
        (["--checkpoint", tiny, "--corpus", words, "--method", "best"], 2, "invalid choice: 'best'"),
        (["--checkpoint", tiny, "--corpus", words, "--tokens", 0], 2, "--tokens: got '0', expected a whole number"),
    ):
        exit_code, out, err = run_here(*arguments)
        assert (exit_code, out) == (code, "")
        assert message in err.splitlines()[-1]
