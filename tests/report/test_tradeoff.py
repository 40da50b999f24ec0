"""The picture of loss over speed shows every row of a run, and the page its numbers."""

import pytest

from teal_fast.files.paths import ROOT
from teal_fast.report.results import RESULTS, read_results
from teal_fast.report.results_quality import tradeoff_section
from teal_fast.report.tradeoff import tradeoff_figures

COMMON = {"benchmark": "tradeoff", "run": "1", "file": "small-tradeoff.json", "texts": "a text", "protocol": "windows"}
COMMON |= {"model": "small", "device": "A processor", "threads": 2, "new_tokens": 64}


def row(sparsity: float, rate: float, loss: float, peer: str | None = None) -> dict:
    speed = {"tokens_per_s": rate, "tokens_per_s_spread": [rate - 1, rate + 1]}
    ours = {"achieved_sparsity": None if peer else sparsity, "peer": peer, "sparsity": sparsity}
    return COMMON | speed | ours | {"loss_over_file": loss, "loss_error": 0.01 if loss else None}


RECORDS = [
    row(0.0, 30, 0),
    row(0.4, 41.5, 0.031),
    row(0, 29, 0, "llama.cpp Q4_K_M"),
    row(0, 33, 0.11, "llama.cpp Q3_K_M"),
]


def test_every_row_is_a_named_point():
    first, second = tradeoff_figures([*RECORDS, *(record | {"run": "2", "file": "b.json"} for record in RECORDS)])
    assert (first.name, second.name) == ("small-tradeoff", "b")
    for name in ("0\N{NO-BREAK SPACE}%", "40\N{NO-BREAK SPACE}%", "Q4_K_M", "Q3_K_M"):
        assert f">{name}<" in first.svg.replace(" <", "<").replace("> ", ">")


def test_losses_stand_beside_speeds():
    (table,) = tradeoff_section(RECORDS).tables
    assert "| ours, 40 % | 40.0 % | 41.5 | 40.5 to 42.5 | +0.0310 ± 0.0100 |" in table
    assert "| llama.cpp Q3_K_M |  | 33.0 | 32.0 to 34.0 | +0.1100 ± 0.0100 |" in table


@pytest.mark.parametrize("figure", tradeoff_figures(read_results(RESULTS)), ids=lambda figure: figure.name)
def test_pictures_are_what_the_records_say(figure):
    drawn = (ROOT / "docs" / f"{figure.name}.svg").read_text(encoding="utf-8")
    assert figure.svg.split(">", 1)[1] in drawn, f"docs/{figure.name}.svg is stale: run `make results`"
