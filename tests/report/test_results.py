"""docs/results.md says what the records say, and new records show up there by themselves."""

import json
import re

import pytest

from teal_fast.files.paths import ROOT
from teal_fast.report.results import PAGE, RESULTS, SECTIONS, TEMPLATE, main, make_page, read_results
from teal_fast.report.results_several import verify_section

MARKERS = "".join(f"<!-- {name} -->\n" for name in SECTIONS)
OURS = {
    "benchmark": "decode",
    "run": "1",
    "file": "new.json",
    "texts": "",
    "device": "A processor",
    "threads": 3,
    "model": "small",
    "format": "bf16",
    "mode": "compiled",
    "peer": None,
    "sparsity": 0.0,
    "achieved_sparsity": 0.0,
    "prompt_tokens": 5,
    "new_tokens": 64,
    "read_gb_per_s": 30.0,
    "bytes_per_token": 2e6,
    "versions": {"torch": "2.0", "triton": None, "python": "3.12", "commit": "abc1234"},
    "date": "2026-01-01",
}


def row(rates: list[float], **fields) -> dict:
    """A record of decoding at these tokens a second, a round each."""
    median = sorted(rates)[len(rates) // 2]
    spread = [min(rates), max(rates)]
    return OURS | {"tokens_per_s": median, "tokens_per_s_rounds": rates, "tokens_per_s_spread": spread} | fields


def cells(page: str, name: str) -> list[list[str]]:
    """The cells of the page's rows that begin with `name`."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_is_what_the_records_say():
    page = make_page(read_results(RESULTS), TEMPLATE.read_text(encoding="utf-8"))
    assert page == PAGE.read_text(encoding="utf-8"), "docs/results.md is stale: run `make results`"


KEYS = ("perplexity", "ms", "tokens_per_s", "us", "acc", "seconds", "error_percent", "draft_cost", "tokens_per_cycle")
KEYS += ("of_file",)


def test_every_record_is_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for record in read_results(RESULTS):
        key = next(key for key in ("ratio", *KEYS) if key in record and (key != "ratio" or "ratios" in record))
        number = record[key] * {"acc": 100, "seconds": 1000}.get(key, 1)
        assert f"/{record['file']})" in page
        forms = (f"{number:.2f}", f"{number:.1f}", f"{number:,.1f}", f"{number:.4f}")
        assert any(form in page for form in forms), record


def test_ratios_are_medians_of_the_rounds():
    fast = row([40.0, 30.0, 100.0], sparsity=0.5, achieved_sparsity=0.48)
    page = make_page([row([10.0, 20.0, 30.0]), fast], MARKERS)  # ratios 4, 1.5, 3.33; of the medians 2
    assert cells(page, "bf16, 50 %")[0][2:4] == ["48.0 %", "40.0 (100.0)"]
    assert cells(page, "bf16, 50 %")[1] == ["bf16, 50 %", "5", "3.33 (3.33)"]


def test_batches_stand_beside_one_sequence_and_chance():
    half = {"benchmark": "batch", "sparsity": 0.5, "kept": {"all": 0.5}}
    one = row([10.0], batch=1, sequences="prompts", read={"all": 0.5}, **half)
    two = row([15.0], batch=2, sequences="prompts", read={"all": 0.7}, **half)
    samples = row([12.0], batch=2, sequences="samples", read={"all": 0.6}, **half)
    ways = [OURS | half | {"way": way, "batch": 2, "us": us} for way, us in (("union", 1234.5), ("all", 2000.0))]
    page = make_page([one, two, samples, *ways], MARKERS)
    assert [found[1:] for found in cells(page, "bf16")] == [
        ["50 %", "prompts", "10.0 (1.00)", "15.0 (1.50)"],
        ["50 %", "samples", "10.0 (1.00)", "12.0 (1.20)"],
        ["50 %", "prompts", "50 % (50 %)", "70 % (75 %)"],
        ["50 %", "samples", "50 % (50 %)", "60 % (75 %)"],
        ["union", "1,234.5"],
        ["all", "2,000.0"],
    ]


def test_runs_are_not_compared():
    page = make_page([row([10.0]), row([20.0], run="2", sparsity=0.5)], MARKERS)
    assert page.count("### small in bf16 on A processor") == 2
    assert [len(found) for found in cells(page, "bf16, 50 %")] == [5]  # no table of ratios


def test_peers_are_compared_and_named():
    peer = row([5.0], peer="another bf16", peer_version="0.1", bytes_per_token=None, achieved_sparsity=None)
    page = make_page([row([10.0]), peer], MARKERS)
    assert cells(page, "bf16, 0 %")[1][-1] == "2.00 (2.00)" and "; another bf16 0.1." in page


def test_the_server_stands_beside_what_it_is_compared_with():
    turns = {"first_turn_s": 4.0, "second_turn_s": 0.2, "second_of_first": 0.05, "turns_prompt_tokens": [3001, 3040]}
    asked = {"benchmark": "serve", "mode": "serve.py", "first_token_s": 0.7, "first_token_prompt_tokens": 505}
    compared = {
        "llama-server bf16": {"tokens_per_s": 1.5, "second_turn_s": 1.04},
        "generate.py": {"tokens_per_s": 0.98},
    }
    served = row([30.0, 40.0, 50.0], sparsity=0.5, achieved_sparsity=0.48, compared=compared, **asked, **turns)
    peer = row([25.0], peer="llama-server bf16", peer_version="7", **asked | {"mode": "llama-server"}, **turns)
    generated = row([41.0], sparsity=0.5, **asked | {"mode": "generate.py"})
    page = make_page([served, generated, peer], MARKERS)
    assert cells(page, "serve.py, 50 %") == [
        ["serve.py, 50 %", "48.0 %", "40.0 (50.0)", "700", "4,000", "200", "0.050"],
        ["serve.py, 50 %", "llama-server bf16", "1.50", "1.04"],
        ["serve.py, 50 %", "generate.py", "0.98", ""],
    ]
    assert cells(page, "generate.py, 50 %")[0][2:] == ["41.0 (41.0)", "700", "", "", ""]
    assert "llama-server bf16 7." in page and "first token of turn 2 of 3,040, ms" in page


def test_uncommitted_trees_are_marked():
    dirty = OURS["versions"] | {"commit": "abc1234+"}
    page = make_page([row([10.0]), row([10.0], run="2", versions=dirty)], MARKERS)
    assert "commit abc1234, 2026" in page and "commit abc1234†, 2026" in page
    assert "†: measured from an uncommitted tree" in TEMPLATE.read_text(encoding="utf-8")


def test_conditions_of_the_cpu_are_shown():
    page = make_page([row([10.0], instruction_set="avx2", settings={"OMP_NUM_THREADS": "3"})], MARKERS)
    assert "A processor, avx2, 3 threads, OMP_NUM_THREADS=3, PyTorch 2.0, Python 3.12" in page


def test_what_has_no_place_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"new\.json has a record of benchmark 'dance', expected one of decode"):
        make_page([OURS | {"benchmark": "dance"}], MARKERS)
    with pytest.raises(ValueError, match="no line <!-- tasks -->"):
        make_page([row([10.0])], MARKERS.replace("<!-- tasks -->", ""))
    with pytest.raises(FileNotFoundError, match="holds no JSON records"):
        read_results(tmp_path)
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(ValueError, match=r"one\.json holds a dict, expected a list"):
        read_results(tmp_path)
    (tmp_path / "one.json").write_text("[")
    with pytest.raises(ValueError, match=r"one\.json is not valid JSON"):
        read_results(tmp_path)
    (tmp_path / "one.json").write_text(json.dumps([row([12.5])]))
    with pytest.raises(ValueError, match=r"one\.json has a record with a field 'file', which this page gives records"):
        read_results(tmp_path)


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    fields = {key: value for key, value in row([12.5]).items() if key not in ("file", "texts")}
    (tmp_path / "one.json").write_text(json.dumps([fields]))
    monkeypatch.setattr("sys.argv", ["results.py", "--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    main()
    assert "12.5 (12.5)" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.md'}\n"


def test_the_readme_repeats_what_the_page_says():
    """Every number with a decimal in the README's tables stands in docs/results.md."""
    page = PAGE.read_text(encoding="utf-8")
    tables = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    numbers = set(re.findall(r"\d+\.\d+", " ".join(tables)))
    assert len(numbers) > 10
    assert sorted(number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", page)) == []


def test_every_results_file_has_its_command():
    reproduce = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    assert [path.name for path in RESULTS.glob("*.json") if path.name not in reproduce] == []


def test_cycles_stand_by_drafts_and_shares():
    shared = {"model": "llama-3-8b", "device": "H200", "format": "bf16", "context": 1000}
    records = [shared | {"mode": "verify", "tokens": 8, "ms": 4.5, "of_dense": 1.14}]
    cycle = shared | {"mode": "cycle", "draft_format": "int4", "draft_sparsity": 0.5, "ms": 8.0, "draft_ms": 4.0}
    records += [cycle | {"drafts": n, "acceptance": a, "speedup": n * a} for n in (2, 3) for a in (0.7, 0.8)]
    passes, said, cycles = verify_section(records).tables
    assert passes.splitlines()[-1] == "| bf16 | 1,000 | verify | 8 | 4.50 | 1.14 |"
    assert "int4 at 50 %, verified in bf16" in said
    assert cycles.splitlines()[0] == "| after | drafts | ms | drafting | 70 % | 80 % |"
    assert cycles.splitlines()[-1] == "| 1,000 | 3 | 8.00 | 4.00 | 2.10 | 2.40 |"
