"""The harness itself, when installed, over our model: against its own transformers backend, and against tasks.py."""

import dataclasses
import importlib.util
import json
import shutil
import sys
import types

import pytest
import torch
from tqdm import tqdm

from teal_fast.calibration.probe import measure_quantiles
from teal_fast.engine.load import load
from teal_fast.evaluation.tasks import PREFILLS, read_task, score_task
from teal_fast.files.calibration import CALIBRATION, Calibration
from teal_fast.files.checkpoint import fingerprint
from teal_fast.files.load import load_model

INSTALLED = importlib.util.find_spec("lm_eval") is not None
with_harness = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: it is optional")
ITEMS = {
    "choices": [
        {"ctx": f"The answer to question {i} is:", "conts": [" a whale", " harpoon", " the long sea"], "gold": i % 3}
        for i in range(9)
    ],
    "clozes": [{"ctx": f"Call me Ishmael, said number {i}, and", "cont": " again"} for i in range(5)],
}


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_harness_one_line_says_how_to_get_it(command):
    done = command("integrations.lm_eval", "--help")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the harness is not installed") and "pip install lm-eval==" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_an_import_without_the_harness_fails_as_imports_do():
    with pytest.raises(ImportError, match=r"the harness is not installed \(.*\): pip install lm-eval=="):
        importlib.import_module("teal_fast.integrations.lm_eval")


def test_a_token_without_embedding_is_refused(tiny, monkeypatch):
    """The tokenizer's ids 1,000 and more, as if the model's table ended there; what is used of the harness is faked."""
    if not INSTALLED:
        names = ("get_rolling_token_windows", "make_disjoint_window", "make_table")
        fakes = {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.utils": dict.fromkeys(names)}
        for name, contents in (fakes | {"lm_eval.api.model": {"TemplateLM": object}}).items():
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**contents))
    monkeypatch.delitem(sys.modules, "teal_fast.integrations.lm_eval", raising=False)
    module = importlib.import_module("teal_fast.integrations.lm_eval")
    monkeypatch.delitem(sys.modules, "teal_fast.integrations.lm_eval")
    model = module.TealLM(*load(tiny))
    assert len(model._loglikelihood_tokens([(None, [5, 6], [7])], disable_tqdm=True)) == 1
    model.model.args = dataclasses.replace(model.model.args, vocab_size=1000)
    for pair in (([1000], [7]), ([5, 6], [7, 1000])):
        with pytest.raises(ValueError, match="token id 1000 is outside the model's vocabulary of 1000"):
            model._loglikelihood_tokens([(None, *pair)], disable_tqdm=True)


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """Runs a model of the harness over ITEMS: results and likelihoods by task."""
    import lm_eval

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name, items in ITEMS.items():
        lines = [
            item | {"choices": [text[1:] for text in item["conts"]]} if "conts" in item else item for item in items
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def configuration(name, **fields):
        data = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **fields}

    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    cloze = {"output_type": "loglikelihood", "doc_to_target": "cont", "target_delimiter": ""}
    tasks = [
        configuration("choices", doc_to_text="ctx", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}], **choice),
        configuration("clozes", doc_to_text="ctx", metric_list=[{"metric": "acc"}, {"metric": "perplexity"}], **cloze),
    ]

    def call(model):
        found = lm_eval.simple_evaluate(model, tasks=tasks, bootstrap_iters=100)
        likelihoods = {
            name: [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
            for name, samples in found["samples"].items()
        }
        return found["results"], likelihoods

    return call, tmp_path


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("calibrated") / "tiny")
    ids = torch.randint(3, 40_000, (8, 50), generator=torch.Generator().manual_seed(0)).tolist()
    Calibration(measure_quantiles(load_model(folder), ids), fingerprint(folder), {}).save(folder / CALIBRATION)
    return folder


@with_harness
def test_dense_scores_are_those_of_the_harness_with_transformers(tiny, tiny_hf, harness):
    from lm_eval.models.huggingface import HFLM

    from teal_fast.integrations.lm_eval import TealLM

    call, _ = harness
    results, likelihoods = call(TealLM(*load(tiny)))
    expected, expected_likelihoods = call(HFLM(pretrained=str(tiny_hf), device="cpu", dtype="float32"))
    for name in ITEMS:
        assert likelihoods[name] == pytest.approx(expected_likelihoods[name], rel=1e-4)
        for key, value in expected[name].items():
            if isinstance(value, float) and not (name == "clozes" and "stderr" in key):  # those are drawn at random
                assert results[name][key] == pytest.approx(value, rel=1e-4), (name, key)


@with_harness
@pytest.mark.parametrize("prefill", PREFILLS)
def test_sparse_scores_are_those_of_tasks(calibrated, harness, prefill):
    from teal_fast.integrations.lm_eval import TealLM

    call, data = harness
    engine, tokenizer = load(calibrated)
    model = engine.model
    results, _ = call(TealLM(engine, tokenizer, 0.6, prefill))
    for name in ITEMS:
        score = score_task(model, tokenizer, read_task(data, name), PREFILLS[prefill], tqdm(disable=True))
        assert results[name]["acc,none"] == pytest.approx(score.metrics["acc"].mean().item())
        if name == "choices":
            assert results[name]["acc_norm,none"] == pytest.approx(score.metrics["acc_norm"].mean().item())
            assert results[name]["acc_stderr,none"] == pytest.approx(score.metrics["acc"].std().item() / 3)
        else:
            assert results[name]["perplexity,none"] == pytest.approx(
                score.metrics["loss"].mean().exp().item(), rel=1e-4
            )


@with_harness
def test_rolling_likelihood_and_generation(calibrated, tiny_hf):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from teal_fast.integrations.lm_eval import TealLM

    ours = TealLM(*load(calibrated))
    theirs = HFLM(pretrained=str(tiny_hf), device="cpu", dtype="float32", max_length=512)
    text = " ".join(f"The {i}th sentence is about {i * i} whales." for i in range(80))  # some windows of 512
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    assert ours.prefix_token_id == theirs.prefix_token_id
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    found = ours.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=2e-3)  # windows of 511: a token of each cache is the prefix

    settings = {"until": [], "do_sample": False, "max_gen_toks": 12, "temperature": 0.0}
    request = Instance("generate_until", {}, ("The sea was", settings), 0)
    (whole,) = ours.generate_until([request], disable_tqdm=True)
    assert (whole,) == tuple(theirs.generate_until([request], disable_tqdm=True))
    end = whole[len(whole) // 2 :][:3]
    request = Instance("generate_until", {}, ("The sea was", settings | {"until": [end]}), 0)
    assert ours.generate_until([request], disable_tqdm=True) == [whole[: whole.index(end)]]
    with pytest.raises(ValueError, match="only greedy"):
        ours.generate_until([Instance("generate_until", {}, ("x", {"do_sample": True}), 0)])


@with_harness
def test_unknown_or_unreachable_task_is_one_line(command, calibrated):
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    for name in ("no_such_task", "hellaswag"):
        done = command("integrations.lm_eval", "--checkpoint", calibrated, "--tasks", name, env=environment)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
