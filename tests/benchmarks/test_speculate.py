"""The benchmark of lossless decoding: what it predicts, texts that part are found, and all of it on a tiny model."""

import json
import shutil

import pytest
import torch

from teal_fast.benchmarks import speculate
from teal_fast.benchmarks.asked import read_prompts
from teal_fast.benchmarks.speculate import Bench, predict, refuse_parted
from teal_fast.calibration.make import Settings, make_calibration
from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION
from teal_fast.files.checkpoint import read_config
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.kernels.native import library
from teal_fast.quantization.checkpoint import make_quantized
from teal_fast.weights.formats import Format

pytestmark = pytest.mark.skipif(library() is None, reason="needs the C++ step")
WORDS = ("--device", "cpu", "--prompts", "repeat", "--tokens", 12, "--draft_sparsity", 0, 0.4)


@pytest.fixture(scope="module")
def beside(even, tmp_path_factory):
    """A calibrated checkpoint called even, and its copy even-int8 beside it."""
    folder = shutil.copytree(even, tmp_path_factory.mktemp("speculate") / "even")
    settings = Settings("uniform", tokens=1000, pass_tokens=500, context=100)
    make_calibration(folder, folder / CALIBRATION, torch.device("cpu"), None, settings)
    (copy := folder.with_name("even-int8")).mkdir()
    make_quantized(folder, copy, Format("int8"))
    return folder


def speculated(run_main, folder, *words):
    """The records of the command, its exit code and its last line on stderr."""
    code, out, errors = run_main(speculate.main, "--checkpoint", folder, *WORDS, *words)
    return json.loads(out.splitlines()[-1]), code, errors.splitlines()[-1]


def test_hard_prompts_begin_with_random_ids(even):
    tokenizer, args = Tokenizer.load(even), model_args(read_config(even))
    prompts = read_prompts(["repeat", "hard"], tokenizer, args)
    assert len(prompts) == 6 and "river" in tokenizer.decode(prompts[0])
    args.check_ids(prompts[1])
    assert len(prompts[1]) == 64 and len(set(prompts[1])) > 60
    assert prompts == read_prompts(["repeat", "hard"], tokenizer, args)


def test_a_prediction_counts_what_stands_over_what_it_costs():
    verify = {1: 1.0, 2: 1.1, 3: 1.2}
    found = predict([0.8, 0.5], 0.3, verify)
    assert found == {"1": pytest.approx(1.8 / 1.4), "2": pytest.approx(2.2 / 1.8)}
    half = predict([0.8], 0.3, verify, drafting=0.5)  # every other cycle is a dense step
    assert half == {"1": pytest.approx((1.8 + 1) / (1.4 + 1))}


def test_every_drafter_is_swept_and_auto_compared(beside, run_main):
    records, code, _ = speculated(run_main, beside, "--rounds", 1)
    *swept, compared = records
    assert code == 0 and [(r["draft"], r["draft_sparsity"]) for r in swept] == [
        ("ngram", None), ("self", 0.4), ("even-int8", 0), ("even-int8", 0.4)
    ]  # fmt: skip
    for record in swept:
        assert record["parted"] == [None] and 0 <= record["stood"] <= 1 and len(record["acceptance"]) <= 7
        verify = {int(count): cost for count, cost in record["verify_cost"].items()}
        assert list(verify) == list(range(1, 9)) and verify[1] == 1
        how = (record["acceptance"], record["draft_cost"], verify, record["drafting"])
        assert record["predicted"] == predict(*how)
    assert swept[0]["draft_cost"] == 0 < swept[2]["draft_cost"] and swept[2]["stood"] > 0.3
    assert compared["draft"] == "auto" and compared["ratio"] > 0 and compared["lossless"]["cycles"]


def test_a_check_is_of_every_drafter_and_of_auto(beside, run_main):
    records, code, _ = speculated(run_main, beside, "--check")
    assert code == 0 and [r["draft"] for r in records] == ["ngram", "self", "even-int8", "even-int8", "auto"]
    assert all(r["parted"] == [None] and "predicted" not in r and "ratio" not in r for r in records)
    records, code, _ = speculated(run_main, beside, "--check", "--temperature", 1, "--draft", "self")
    assert code == 0 and [(r["draft"], r["draft_sparsity"], r["parted"]) for r in records] == [("self", 0.4, None)]


def test_a_check_says_where_a_text_parts(beside, run_main, monkeypatch):
    usual = Bench.dense
    monkeypatch.setattr(Bench, "dense", lambda bench: [[*text[:7], -1, *text[8:]] for text in usual(bench)])
    records, code, said = speculated(run_main, beside, "--check", "--draft", "ngram")
    assert code == 1 and [r["parted"] for r in records] == [[7]]
    assert said == "error: 1 texts by ngram differ from the dense ones, prompt 1's at token 7: a mistake of ours"
    with pytest.raises(ValueError, match="prompt 2's at token 3"):
        refuse_parted({"draft": "self", "parted": [None, 3, 9]})
