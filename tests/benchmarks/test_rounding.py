"""What is measured of rounding: errors against exact products, beside an entry that was made large."""

import json

import pytest
import torch

from teal_fast.benchmarks import rounding
from teal_fast.benchmarks.rounding import error_percent, measure, planted
from teal_fast.files.load import load_model
from teal_fast.kernels.packed import PackedWeight


def test_planted_makes_one_kept_entry_large():
    x, threshold = torch.tensor([0.1, -2.0, 4.0, -6.0, 0.2]), torch.full((5,), 1.0)
    same, alone = planted(x, threshold, 1)
    assert torch.equal(same, x) and not alone.any()
    changed, alone = planted(x, threshold, 1000)
    (place,) = (changed != x).nonzero().flatten().tolist()
    assert place in (1, 2, 3)
    assert changed[place] == 1000 * (12 - x[place].abs()) / 2
    assert alone[place] == changed[place] and alone.count_nonzero() == 1


def test_errors_are_shares_of_what_others_add():
    weight = PackedWeight(torch.tensor([[10, 0], [1, 2]], dtype=torch.int8), torch.tensor([0.5, 0.5]))
    x, alone, keep_all = torch.tensor([5000.0, 3.0]), torch.tensor([5000.0, 0.0]), torch.full((2,), -1.0)
    exact = torch.tensor([25001.5, 3.0])
    assert error_percent(exact, x, alone, keep_all, weight) == 0
    lost = error_percent(exact - torch.tensor([0.015, 0.03]), x, alone, keep_all, weight)
    assert lost == pytest.approx(1, rel=0.1)  # fp32 holds 25001.5 less 0.015 in steps of 0.002


def test_measure_covers_formats_and_factors(even, monkeypatch):
    monkeypatch.setattr(rounding, "INTERPRETED", False)  # C++ alone: Triton's interpreter takes its time
    found = list(measure(load_model(even, torch.device("cpu")), None, [1, 2, 3, 4], ["int8", "int4"], [0.0]))
    named = [(r["format"], r["op"], r["factor"]) for r in found]
    kinds = [("int8", kind) for kind in ("qkv", "o", "gate+up", "down")] + [("int4", "gate+up"), ("int4", "down")]
    assert named == [(*kind, factor) for kind in kinds for factor in (1, 1000, 5000)]
    assert all(
        0 <= r["error_percent"] <= r["error_percent_most"] < (5 if r["format"] == "int4" else 0.1) for r in found
    )


def test_command(calibrated, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding, "INTERPRETED", False)
    out = tmp_path / "rounding.json"
    arguments = ("--checkpoint", calibrated, "--formats", "int8", "--sparsity", 0.5, "--out", out)
    code, output, errors = run_main(rounding.main, *arguments)
    assert code == 0, errors
    records = json.loads(out.read_text())
    assert json.loads(output.splitlines()[-1]) == records and len(records) == 4 * 3
    assert {(r["model"], r["mode"], r["sparsity"]) for r in records} == {("tiny", "compiled", 0.5)}
