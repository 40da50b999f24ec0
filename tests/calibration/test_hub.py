"""Calibrations pushed to and fetched from a hub on this machine, with the real huggingface_hub client."""

import json
import os
import shutil
import time

import huggingface_hub
import pytest
import torch

from teal_fast.calibrate import main
from teal_fast.calibration import hub
from teal_fast.calibration.hub import make_card, read_results
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.files.calibration import CALIBRATION, Calibration
from teal_fast.files.checkpoint import WEIGHTS, fingerprint
from teal_fast.files.load import load_model
from teal_fast.tests.hub import TOKEN, Hub

ORIGIN = {"corpus": "some text", "tokens": "400"}
REPO = "ours/tiny-teal"


@pytest.fixture(scope="module")
def calibration(tiny):
    ids = torch.randint(3, 40_000, (8, 50), generator=torch.Generator().manual_seed(0)).tolist()
    return Calibration(measure_quantiles(load_model(tiny), ids), fingerprint(tiny), ORIGIN)


@pytest.fixture
def calibrated(tiny, calibration, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    calibration.save(folder / CALIBRATION)
    return folder


@pytest.fixture
def calibrate(command, tmp_path):
    """Runs calibrate.py against a hub's URL, with a cache of its own."""

    def run(url, *arguments, token=TOKEN):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        ours = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        ours |= {"NO_PROXY": "127.0.0.1"} | ({"HF_TOKEN": token} if token else {})
        return command("calibrate", *arguments, env=clean | ours)

    return run


@pytest.fixture
def run_here(run_main, tmp_path, monkeypatch):
    """The same in this process, where the client waits for nothing before it tries again."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def run(url, *arguments):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        huggingface_hub.close_session()  # its connections outlive the hub that they lead to
        for owner, name, value in (
            (huggingface_hub.constants, "ENDPOINT", url),
            (huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
            (hub, "ENDPOINT", url),
        ):
            monkeypatch.setattr(owner, name, value)
        return run_main(main, *arguments)

    return run


def fails(done, message):
    code, out, err = done
    assert (code, out) == (1, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def records(model="tiny", **changes):
    record = {"benchmark": "eval", "model": model, "format": "fp32", "baseline": None, "calibration": ORIGIN}
    record |= {"text": ["whales.txt"], "protocol": "context 64, prefill full", "sparsity": 0.4, "perplexity": 12.345}
    return [record | {"achieved_sparsity": 0.413} | changes]


def test_pushed_and_fetched_again(calibrate, calibrated, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(records()))
    sent = (calibrated / CALIBRATION).read_bytes()
    arguments = ["--checkpoint", calibrated]
    with Hub({}, uploads=tmp_path / "hub") as hub:
        for _ in range(2):  # the second time the repo is there
            done = calibrate(hub.url, *arguments, "--push_to_hub", REPO, "--results", tmp_path / "results.json")
            assert done.returncode == 0, done.stderr
            assert f"and its card: {hub.url}/{REPO}/commit/" in done.stdout
        assert {path.name for path in (tmp_path / "hub" / REPO).iterdir()} == {CALIBRATION, "README.md"}
        assert (tmp_path / "hub" / REPO / CALIBRATION).read_bytes() == sent
        (calibrated / CALIBRATION).unlink()
        done = calibrate(hub.url, *arguments, "--from_hub", REPO, token=None)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {calibrated / CALIBRATION}: from {hub.url}/{REPO}, measured on corpus some")
    assert (calibrated / CALIBRATION).read_bytes() == sent
    card = (tmp_path / "hub" / REPO / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: teal-fast\n")
    assert "| 40% | 41.3% | 12.35 |" in card and "whales.txt (context 64, prefill full; fp32)" in card
    assert "corpus some text, tokens 400" in card and f"--from_hub {REPO}" in card
    assert fingerprint(calibrated)["weights"] in card


def test_the_card_shows_what_was_achieved(tiny, calibration):
    curve = {0.25: {"qkv": 0.241, "all": 0.2512}, 0.5: {"qkv": 0.49, "all": 0.507}}
    card = make_card(REPO, tiny, calibration, curve, [])
    assert "| nominal | qkv | all |\n|---|---|---|\n| 25% | 24.1% | 25.1% |\n| 50% | 49.0% | 50.7% |\n" in card
    assert "Perplexity" not in card and "{" not in card


def test_another_models_file_is_refused_both_ways(run_here, calibrated, even, tmp_path):
    other = shutil.copytree(even, tmp_path / "even")
    repo = tmp_path / "repo"
    repo.mkdir()
    shutil.copyfile(calibrated / CALIBRATION, repo / CALIBRATION)
    with Hub({REPO: repo}, uploads=tmp_path / "hub") as hub:
        fails(
            run_here(hub.url, "--checkpoint", other, "--from_hub", REPO),
            "the calibration is another model's: it has",
        )
        assert not (other / CALIBRATION).exists()
        arguments = ["--checkpoint", other, "--out", calibrated / CALIBRATION]
        fails(run_here(hub.url, *arguments, "--push_to_hub", REPO), "the calibration is another model's")
        (repo / CALIBRATION).write_bytes((calibrated / WEIGHTS).read_bytes())
        arguments = ["--checkpoint", calibrated, "--out", tmp_path / "out"]
    with Hub({REPO: repo}) as hub:
        fails(run_here(hub.url, *arguments, "--from_hub", REPO), "has no metadata called calibration")
    assert not (tmp_path / "hub").exists() and not (tmp_path / "out").exists()


def test_what_the_hub_refuses_is_one_line(run_here, calibrated, tmp_path):
    arguments = ["--checkpoint", calibrated]
    (tmp_path / "empty").mkdir()
    with Hub({REPO: tmp_path / "empty"}) as hub:
        fails(run_here(hub.url, *arguments, "--from_hub", REPO), f"{REPO} has no {CALIBRATION}: give a repo made by")
        fails(
            run_here(hub.url, *arguments, "--from_hub", "no/repo"),
            f"no model no/repo at {hub.url}: check the name",
        )
        fails(run_here(hub.url, *arguments, "--push_to_hub", "no/repo"), f"{hub.url} refused the token for no/repo")
        code, _, err = run_here(hub.url, *arguments, "--from_hub", "no//repo")
        assert code == 2 and "--from_hub" in err.splitlines()[-1]
    gone = hub.url  # closed: nobody listens there
    fails(run_here(gone, *arguments, "--from_hub", REPO), f"no connection to {gone}")
    fails(run_here(gone, *arguments, "--push_to_hub", REPO), f"no connection to {gone}")
    (calibrated / CALIBRATION).unlink()
    fails(
        run_here(gone, *arguments, "--push_to_hub", REPO),
        "does not exist: run `python calibrate.py` without --push_to_hub",
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (records("other"), "holds records of other, calibrated on"),
        (records(calibration={"corpus": "else"}), "calibrated on {'corpus': 'else'}: expected tiny"),
        (records(baseline="wanda"), "holds records of tiny"),
        ([], "without perplexities"),
        ([{"benchmark": "decode"}], "without perplexities"),
        ({"a": 1}, "holds no records of eval.py"),
        ([1], "holds no records of eval.py"),
    ],
)
def test_only_results_of_this_calibration_are_shown(tmp_path, calibration, content, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_results(path, calibration, "tiny")
