import json
import shutil

import pytest

from teal_fast.engine.accounting import bytes_per_token
from teal_fast.files.load import load_model


@pytest.fixture(scope="module")
def folders(even, command, tmp_path_factory):
    """A tiny model, calibrated, and an int8 copy of it."""
    dense, int8 = (tmp_path_factory.mktemp("table") / name for name in ("dense", "int8"))
    shutil.copytree(even, dense)
    assert command("calibrate", "--checkpoint", dense, "--tokens", 512).returncode == 0
    assert command("quantize", "--checkpoint", dense, "--mode", "int8", "--out", int8).returncode == 0
    return dense, int8


def test_a_row_for_every_form_and_sparsity(folders, command, tmp_path):
    out = tmp_path / "table.json"
    done = command(
        *("benchmarks.table", "--checkpoint", *folders, "--sparsity", 0, 0.5, "--context", 64, "--windows", 2),
        *("--rounds", 1, "--new_tokens", 4, "--device", "cpu", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    *table, last = [line for line in done.stdout.splitlines() if line.startswith(("|", "["))]
    records = json.loads(out.read_text())
    assert json.loads(last) == records and len(table) == 2 + 4
    assert [(r["format"], r["sparsity"]) for r in records] == [
        (format, sparsity) for format in ("fp32", "int8") for sparsity in (0, 0.5)
    ]
    assert records[0]["bits"] == 32 and 8 < records[2]["bits"] < 8.5
    for record, line in zip(records, table[2:], strict=True):
        assert abs(record["achieved_sparsity"] - record["sparsity"]) < 0.1 and record["tokens_per_s"] > 0
        assert f"{record['perplexity']:.2f}" in line and record["format"] in line
    assert records[0]["perplexity"] == pytest.approx(records[2]["perplexity"], rel=0.02)
    assert records[2]["bytes_per_token"] < records[0]["bytes_per_token"] / 3
    for record, folder in zip(records, (folders[0], folders[0], folders[1], folders[1]), strict=True):
        achieved = record["decode_achieved_sparsity"]  # of the tokens that were timed: three after a prompt of 17
        assert record["bytes_per_token"] == bytes_per_token(load_model(folder), achieved, [17, 18, 19])
    assert records[1]["decode_achieved_sparsity"] != records[1]["achieved_sparsity"]


def test_too_short_a_text_is_one_error(folders, command, tmp_path):
    (tmp_path / "short.txt").write_text("Hardly any words.")
    done = command("benchmarks.table", "--checkpoint", folders[0], "--text", tmp_path / "short.txt", "--context", 256)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: the text has")
