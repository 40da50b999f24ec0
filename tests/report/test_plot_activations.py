"""The command: its record, its figures, and one clear line for bad input."""

import json
import shutil

import pytest

from teal_fast.report.plot_activations import RECORD_VERSION, activation_sections, main


@pytest.fixture(scope="module")
def folder(calibrated, tmp_path_factory):
    return shutil.copytree(calibrated, tmp_path_factory.mktemp("plot") / "tiny")


def fails(done, message):
    code, _, err = done
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]


def test_record_and_figures(folder, run_main, tmp_path):
    out, figures = tmp_path / "a" / "activations.json", tmp_path / "figures"
    options = ("--tokens", 300, "--context", 100, "--sparsity", 0.5, 0.25, "--out", out, "--figures", figures)
    code, output, errors = run_main(main, "--checkpoint", folder, *options)
    assert code == 0, errors
    assert [line.split()[0] for line in output.splitlines()] == ["input", "qkv", "o", "gate+up", "down"]
    (record,) = json.loads(out.read_text())
    assert (record["benchmark"], record["version"], record["model"]) == ("activations", RECORD_VERSION, "tiny")
    assert record["tokens"] == 300 - record["sequences"] and record["sparsity"] == [0.25, 0.5]
    assert len(record["layers"]) == 8
    for layer in record["layers"]:
        assert len(layer["thresholds"]) == len(layer["achieved"]) == len(layer["hot"]) == 2
        assert layer["thresholds"][0] < layer["thresholds"][1]
    drawn = {path.stem for path in figures.iterdir()}
    expected = [f for s in activation_sections(record) for group in s.groups for f in group.figures + group.more]
    assert drawn == {figure.name for figure in expected} and len(drawn) == len(expected)
    assert {"histogram-0-qkv", "histogram-1-gate-up-small", "fit-o", "activity-down", "hot-50"} <= drawn


def test_bad_input_is_one_line(folder, run_main):
    base = (main, "--checkpoint", folder)
    fails(run_main(*base, "--tokens", 1), "fewer than 2 tokens")
    fails(run_main(*base, "--out", folder / "config.json" / "x"), "cannot write")
