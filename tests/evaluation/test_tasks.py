"""Log-likelihoods against plain forward passes and transformers; what is sparsified; metrics by hand and by lm-eval."""

import functools
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from teal_fast import eval as evaluation
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.evaluation.tasks import (
    PREFILLS,
    Likelihood,
    TaskItem,
    TaskScore,
    encode_pair,
    judge,
    likelihoods,
    read_task,
    score_task,
    summarize,
)
from teal_fast.files.calibration import CALIBRATION, Calibration, set_sparsity
from teal_fast.files.checkpoint import fingerprint
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.sparse_model import Phase
from teal_fast.weights.output import output_weight

IDS = torch.randint(3, 40_000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
SILENT = tqdm(disable=True)
CONTEXT, CONTINUATIONS = IDS[:9], [IDS[20:25], IDS[30:31], IDS[40:52], IDS[60:62]]
CHOICES = [
    {"ctx": f"The answer to question {i} is:", "conts": [" a whale", " harpoon", " the long sea"], "gold": i % 3}
    for i in range(6)
]
CLOZES = [{"ctx": f"Call me Ishmael, said number {i}, and", "cont": " again"} for i in range(4)]
EITHER = [{"ctx": ["Ann saw Eve so Ann", "Ann saw Eve so Eve"], "conts": [" ran.", " ran."], "gold": 1}] * 2


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("calibrated") / "tiny")
    sequences = [IDS[start : start + 50] for start in range(0, 400, 50)]
    Calibration(measure_quantiles(load_model(folder), sequences), fingerprint(folder), {}).save(folder / CALIBRATION)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, items in (("choices", CHOICES), ("clozes", CLOZES), ("either", EITHER)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture
def run_here(run_main):
    return functools.partial(run_main, evaluation.main)


def whole_sequence(model, context, continuation, dense):
    """Log-likelihood and greediness from one pass over both, without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation]), phase=Phase(dense))[0, len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return -F.cross_entropy(logits, target, reduction="sum").item(), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("prefill, dense", [("full", 1), ("half", 4), ("dense", 9)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_likelihoods_are_those_of_a_whole_pass(calibrated, prefill, dense, sparsity):
    model = load_model(calibrated)
    set_sparsity(model, Calibration.load(calibrated / CALIBRATION), sparsity)
    with torch.no_grad():
        greedy = [model(torch.tensor([CONTEXT]), phase=Phase(dense))[0, -1].argmax().item()]
    expected = [whole_sequence(model, CONTEXT, ids, dense) for ids in [*CONTINUATIONS, greedy]]
    cache = model.new_cache(1, 30)
    output = output_weight(model.output)
    found = list(likelihoods(model, cache, output, CONTEXT, [*CONTINUATIONS, greedy], PREFILLS[prefill]))
    assert [f.log_likelihood for f in found] == pytest.approx([e[0] for e in expected], rel=1e-4)
    assert [f.greedy for f in found] == [e[1] for e in expected]
    assert found[-1].greedy and not found[0].greedy


def test_what_is_sparsified_moves_the_score(calibrated):
    model = load_model(calibrated)
    set_sparsity(model, Calibration.load(calibrated / CALIBRATION), 0.8)
    cache = model.new_cache(1, 30)
    totals = set()
    for dense in PREFILLS.values():
        output = output_weight(model.output)
        totals.add(next(likelihoods(model, cache, output, CONTEXT, [IDS[20:25]], dense)).log_likelihood)
    assert len(totals) == 3


def test_dense_likelihood_is_that_of_transformers(tiny, tiny_hf):
    model = load_model(tiny)
    cache = model.new_cache(1, 30)
    found = likelihoods(model, cache, output_weight(model.output), CONTEXT, CONTINUATIONS, PREFILLS["full"])
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_hf)
    for likelihood, ids in zip(found, CONTINUATIONS, strict=True):
        labels = torch.tensor([[-100] * len(CONTEXT) + ids])
        with torch.no_grad():
            loss = reference(torch.tensor([CONTEXT + ids]), labels=labels).loss.item()
        assert likelihood.log_likelihood == pytest.approx(-loss * len(ids), rel=1e-5)


def test_metrics_by_hand():
    def scored(*totals):
        return [Likelihood(total, False) for total in totals]

    item = TaskItem(("q", "q"), (" no", " a long answer"), 1)
    assert judge(item, scored(-3.0, -9.0)) == {"acc": 0, "acc_norm": 1}  # -3 / 2 characters, -9 / 13
    assert judge(item, scored(-9.0, -3.0)) == {"acc": 1, "acc_norm": 1}
    assert judge(item, scored(-1.0, -9.0)) == {"acc": 0, "acc_norm": 0}
    assert judge(TaskItem(("a", "b"), (" x", " x"), 0), scored(-1.0, -2.0)) == {"acc": 1}
    assert judge(TaskItem(("q",), (" x",), None), [Likelihood(-2.5, True)]) == {"acc": 1, "loss": 2.5}


def test_errors_are_of_the_mean_and_changes_are_paired():
    dense = TaskScore({"acc": torch.tensor([1.0, 1, 0, 0]).double()}, {})
    sparse = TaskScore({"acc": torch.tensor([1.0, 0, 0, 0]).double()}, {"all": 0.5, "o": 0.4})
    fields = summarize(sparse, dense)
    assert fields["items"] == 4
    assert (fields["acc"], fields["acc_change"]) == (0.25, -0.25)
    assert fields["acc_error"] == pytest.approx(0.5 / math.sqrt(4))  # deviations .75, -.25 x3: variance .75 / 3
    assert fields["acc_change_error"] == pytest.approx(0.5 / math.sqrt(4))
    assert (fields["achieved_sparsity"], fields["achieved_by_kind"]) == (0.5, {"o": 0.4})
    assert "acc_change" not in summarize(sparse, None)
    same = summarize(dense, dense)
    assert same["acc_error"] > 0 and same["acc_change_error"] == 0
    single = summarize(TaskScore({"loss": torch.tensor([2.0]).double()}, {}), None)
    assert single["loss_error"] is None and single["perplexity"] == pytest.approx(math.exp(2))


def test_score_task(tiny, data):
    """The items' metrics, in order, from whole passes; one context's choices share it, two contexts do not."""
    model, tokenizer = load_model(tiny), Tokenizer.load(tiny)
    plain = load_model(tiny)
    for name in ("choices", "clozes", "either"):
        items = read_task(data, name)
        score = score_task(model, tokenizer, items, PREFILLS["full"], SILENT)
        for i, item in enumerate(items):
            pairs = [encode_pair(tokenizer, *pair) for pair in zip(item.contexts, item.continuations, strict=True)]
            expected = judge(item, [Likelihood(*whole_sequence(plain, *pair, 1)) for pair in pairs])
            assert {key: values[i].item() for key, values in score.metrics.items()} == pytest.approx(expected, rel=1e-4)
        assert score.achieved["all"] == 0
        assert len(score.metrics["acc"]) == len(items)


def test_pairs_are_cut_as_the_harness_cuts_them(tiny):
    tokenizer = Tokenizer.load(tiny)
    context, continuation = encode_pair(tokenizer, "The sea was  ", "calm")
    assert context == tokenizer.encode("The sea was")
    assert context + continuation == tokenizer.encode("The sea was  calm")
    for pair in (("", " x"), ("x", "")):
        with pytest.raises(ValueError, match="no tokens are left"):
            encode_pair(tokenizer, *pair)


def test_limit_spreads_over_the_file(data):
    assert [item.contexts[0][23] for item in read_task(data, "choices", 3)] == ["0", "2", "4"]
    assert read_task(data, "choices", 50) == read_task(data, "choices")
    assert read_task(data, "clozes")[0] == TaskItem((CLOZES[0]["ctx"],), (" again",), None)
    assert read_task(data, "either")[0].contexts == tuple(EITHER[0]["ctx"])


def test_command(run_here, calibrated, data, tmp_path):
    arguments = ["--checkpoint", calibrated, "--task_data", data, "--limit", 4, "--out", tmp_path / "out.json"]
    code, out, err = run_here(*arguments, "--tasks", "choices", "clozes", "--sparsity", 0, 0.6)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "tasks (zero-shot, prefill full, continuations sparse)"
    assert [line.split()[:2] for line in lines[1:5]] == [[t, s] for t in ("choices", "clozes") for s in ("0%", "60%")]
    records = json.loads(lines[-1], parse_constant=pytest.fail)
    assert json.loads((tmp_path / "out.json").read_text()) == records
    dense, sparse, _, cloze = records
    assert (dense["benchmark"], dense["task"], dense["items"], dense["sparsity"]) == ("eval", "choices", 4, 0)
    assert sparse["achieved_sparsity"] == pytest.approx(0.6, abs=0.15)
    assert sparse["acc_change"] == pytest.approx(sparse["acc"] - dense["acc"])
    assert cloze["loss_change"] != 0 and cloze["perplexity"] == pytest.approx(math.exp(cloze["loss"]))
    assert "acc_norm" in dense and "acc_norm" not in cloze
    assert "(change " in lines[2] and "(change " not in lines[1]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no items"),
        ("[]", "line 1: expected"),
        ('{"ctx": "a", "conts": [" b"]}', "line 1: expected"),
        ('{"ctx": "a", "cont": " b"}\n{"ctx": "a", "conts": [" b", " c"], "gold": 2}', "line 2: expected"),
        ('{"ctx": ["a"], "conts": [" b", " c"], "gold": 0}', "line 1: expected"),
        ('{"ctx": "a", "cont": ""}', "line 1: expected"),
        ('{"ctx": "' + "word " * 600 + '", "cont": " b"}', "exceeds this model's 512"),
    ],
)
def test_bad_data(run_here, calibrated, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    arguments = ["--checkpoint", calibrated, "--task_data", tmp_path, "--sparsity", 0]
    code, out, err = run_here(*arguments, "--tasks", "bad")
    assert (code, out) == (1, "") and message in err.splitlines()[-1] and "Traceback" not in err
    code, out, err = run_here(*arguments, "--tasks", "none")
    assert (code, out) == (1, "") and f"no task none in {tmp_path}, it has bad" in err
