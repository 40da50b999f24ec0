"""Pictures of a sweep have a line for each drafter, and the page tells sweeps, comparisons and checks apart."""

import re

import pytest

from teal_fast.files.paths import ROOT
from teal_fast.report.results import RESULTS, read_results
from teal_fast.report.results_several import speculate_section
from teal_fast.report.speculate import speculate_figures

COMMON = {"benchmark": "speculate", "run": "1", "file": "small.json", "device": "A processor", "threads": 2}
COMMON |= {"model": "small", "format": "bf16", "prompts": "chat", "new_tokens": 64, "temperature": 0.0}
FOUND = {"acceptance": [0.9, 0.75], "stood": 0.825, "tokens_per_cycle": 2.5, "parted": [None, None]}


def swept(draft: str, sparsity: float | None, cost: float, predicted: dict[str, float]) -> dict:
    costs = {"draft_cost": cost, "verify_cost": {"1": 1.0, "2": 1.25}, "predicted": predicted}
    return COMMON | FOUND | {"draft": draft, "draft_sparsity": sparsity} | costs


SWEEP = [
    swept("ngram", None, 0.0, {"1": 1.1, "2": 1.2}),
    swept("self", 0.5, 0.6, {"1": 1.05, "2": 0.9}),
    swept("self", 0.25, 0.8, {"1": 1.15, "2": 1.0}),
]
CHECKED = COMMON | FOUND | {"draft": "small-int8", "draft_sparsity": 0.4}
COMPARED = COMMON | {"draft": "auto", "ratio": 1.3, "ratios": [1.1, 1.5]}
COMPARED |= {"lossless": {"tokens_per_cycle": 3.0, "acceptance": [0.9]}}


def test_a_sweep_has_two_pictures_and_a_check_none():
    acceptance, length = speculate_figures([*SWEEP, CHECKED, COMPARED])
    assert (acceptance.name, length.name) == ("small-acceptance", "small-length")
    words = [re.findall(r">\s*([^<>]+?)\s*</text>", figure.svg) for figure in (acceptance, length)]
    assert {"ngram", "self", "cost of a draft, dense steps"} <= set(words[0])
    assert {"ngram", "self, 25\N{NO-BREAK SPACE}%"} <= set(words[1])  # the best of its sparsities
    assert len(speculate_figures([*SWEEP, *(record | {"run": "2", "file": "b.json"} for record in SWEEP)])) == 4
    assert speculate_figures([CHECKED, COMPARED]) == []


def test_each_kind_of_record_has_its_table():
    drawn = CHECKED | {"temperature": 0.8, "parted": None, "draft_sparsity": None}
    section = speculate_section([*SWEEP, COMPARED, CHECKED, drawn])
    costs, sweep, pictures, compared, checked = section.tables
    assert "1: 1.00, 2: 1.25" in costs and "(small-length.svg)" in pictures
    assert "| self | 25 % | 0.80 | 90 % 75 % | 1 | 1.15 |" in sweep
    assert "| chat | auto | 1.30 | 1.10 to 1.50 | 3.00 | 90 % |" in compared
    assert "| small-int8 | 40 % | greedy | chat | 64 | 2 of 2 | 82 % | 90 % 75 % | 2.50 |" in checked
    assert "| small-int8 |  | drawn at 0.8 | chat | 64 |  | 82 % | 90 % 75 % | 2.50 |" in checked
    parted = speculate_section([CHECKED | {"parted": [None, 7]}]).tables
    assert len(parted) == 1 and "| 1 of 2 |" in parted[0]


@pytest.mark.parametrize("figure", speculate_figures(read_results(RESULTS)), ids=lambda figure: figure.name)
def test_pictures_are_what_the_records_say(figure):
    drawn = (ROOT / "docs" / f"{figure.name}.svg").read_text(encoding="utf-8")
    assert figure.svg.split(">", 1)[1] in drawn, f"docs/{figure.name}.svg is stale: run `make results`"
