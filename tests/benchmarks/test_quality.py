"""The comparison of calibrations: the first against itself, shares and paired errors by hand, bad input."""

import json

import pytest
import torch

from teal_fast import calibrate
from teal_fast.benchmarks.quality import main, row
from teal_fast.evaluation.perplexity import Score


def score(perplexity, achieved=0.5):
    return Score(0.5, perplexity, None, 10, achieved, {"qkv": achieved}, 1.0)


def test_row_compares_in_pairs():
    dense, first = (torch.tensor(x).double().log() for x in ([10.0, 20.0], [20.0, 40.0]))
    found = row([score(15.0, 0.4), score(30.0, 0.6)], dense, first)
    assert found["perplexity"] == pytest.approx((15 * 30) ** 0.5)
    assert found["loss_share"] == pytest.approx(0.5)
    assert found["achieved_sparsity"] == pytest.approx(0.5)
    assert found["achieved_by_kind"] == {"qkv": pytest.approx(0.5)}
    assert found["difference_error"] == pytest.approx(0, abs=1e-9)  # windows differ, pairs do not


def test_command(command, run_main, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {i}th whale has {i * i} harpoons." for i in range(150)))
    words = ("--checkpoint", tiny, "--corpus", text, "--tokens", 300, "--context", 100)
    made = [tmp_path / f"{method}.safetensors" for method in ("uniform", "global")]
    for path in made:
        assert run_main(calibrate.main, *words, "--method", path.stem, "--out", path)[0] == 0
    arguments = ("--checkpoint", tiny, "--text", text, "--context", 100, "--windows", 3, "--sparsity", 0.5)
    out = tmp_path / "out.json"
    done = command("benchmarks.quality", *arguments, "--calibration", *made, "--out", out)
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())
    assert [record["calibration"]["method"] for record in records] == ["uniform", "global"]
    assert records[0]["loss_share"] == pytest.approx(1) and records[0]["difference"] == 0
    assert all(abs(record["achieved_sparsity"] - 0.5) < 0.05 for record in records)
    assert run_main(main, *arguments, "--calibration", made[0], "--prefill", "half", "--out", out)[0] == 0
    assert len(json.loads(out.read_text())) == 3  # added
    code, _, err = run_main(main, *arguments[:4], "--context", 1, "--calibration", made[0])
    assert code == 1 and "--context 1: expected 2 to" in err
