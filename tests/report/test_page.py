"""The page holds everything it shows, what it was given and nothing else; bad input is one clear line."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from teal_fast.report.page import page, quality_section, read_activations, read_records, table_section

QUALITY = {
    "benchmark": "quality",
    "method": "uniform",
    "model": "tiny",
    "format": "bf16",
    "protocol": "full",
    "text": "wiki.test.raw",
    "windows": 20,
    "sparsity": 0.5,
    "achieved_sparsity": 0.512,
    "perplexity": 44.151,
}
TABLE = {
    **QUALITY,
    "benchmark": "table",
    "run": "1",
    "device": "A processor",
    "threads": 2,
    "bits": 5.283,
    "tokens_per_s": 123.44,
    "bytes_per_token": 63e6,
}


class Page(HTMLParser):
    """What a browser would find: elements by name, and all text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def values(self, *names):
        return [(tag, given[name]) for tag, given in self.elements for name in names if name in given]


@pytest.fixture(scope="module")
def built(calibrated, command, tmp_path_factory):
    """A folder with a copy of the tiny model, `results`, and what the command made: activations.json, report.html."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(calibrated, folder / "tiny")
    (folder / "results").mkdir()
    records = [QUALITY, QUALITY | {"model": "other", "perplexity": 12.34}, TABLE]
    (folder / "results" / "a.json").write_text(json.dumps(records))
    done = command(
        *("report.page", "--checkpoint", folder / "tiny", "--results", folder / "results"),
        *("--activations", folder / "activations.json", "--out", folder / "new" / "report.html"),
    )
    assert done.returncode == 0, done.stderr
    assert f"measuring hidden states into {folder / 'activations.json'}, once" in done.stderr
    return folder


@pytest.fixture(scope="module")
def html(built):
    return (built / "new" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def record(built):
    return json.loads((built / "activations.json").read_text())[0]


def cells(html):
    return re.findall(r"<td[^>]*>(.*?)</td>", html.replace("\N{NO-BREAK SPACE}", " "))


def test_self_contained(html):
    found = Page(html)
    assert {"script", "img", "iframe", "object", "image"}.isdisjoint(tag for tag, _ in found.elements)
    for tag, target in found.values("src", "href", "xlink:href", "data", "srcset"):
        assert target.startswith("#") or (tag, target) == ("link", "data:,") or tag == "a", (tag, target)
    assert re.findall(r"@import|url\((?!#)", html) == []
    ids = [name for _, name in found.values("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w.-]+)', html)) <= set(ids)
    assert ("meta", "width=device-width, initial-scale=1") in found.values("content")


def test_every_section_has_its_figures(html):
    figures = {part.split('"')[0]: part.count("<svg") for part in html.split('<section id="')[1:]}
    assert figures == {
        "distributions": 4 * (2 + 2),
        "fits": 4,
        "outliers": 2,
        "channels": 4 + 2,
        "achieved": 2,
        "quality": 1,
        "table": 2,
    }


def test_the_command_shows_the_models_own_records(built, html):
    assert {"44.15", "123.4", "5.28"} <= set(cells(html)) and "12.34" not in cells(html)
    assert [path.name for path in (built / "new").iterdir()] == ["report.html"]


def test_records_are_shown(record):
    half = QUALITY | {"protocol": "half", "perplexity": 31.79, "standard_error": 2.59, "achieved_by_kind": {"o": 0.507}}
    quality = quality_section([QUALITY, QUALITY | {"method": "greedy", "perplexity": 38.25}, half], "tiny")
    assert [table.head[-1] for table in quality.groups[0].tables] == ["perplexity", "o"]  # no column without a number
    figures = [figure.svg for figure in quality.groups[0].figures]  # one a protocol
    assert ["uniform</text>" in svg for svg in figures] == [True, True]
    assert ["greedy</text>" in svg for svg in figures] == [True, False]
    shown = cells(page(record, [quality, table_section([TABLE], "tiny")]))
    assert {"44.15", "38.25", "31.79", "51.2 %", "2.59", "50.7 %", "5.28", "123.4", "63", "7.8"} <= set(shown)


def test_speed_is_drawn_over_the_sparsity_of_decoding():
    """Perplexity stands beside the text's. A chart has two points, of one format."""
    rows = [TABLE | {"sparsity": 0.25, "achieved_sparsity": 0.24}, TABLE]
    decoded = [rows[0] | {"decode_achieved_sparsity": 0.1}, rows[1] | {"decode_achieved_sparsity": 0.4}]
    (old,), (new,) = (table_section(records, "tiny").groups for records in (rows, decoded))
    assert old.tables == new.tables and old.figures[0] == new.figures[0] and old.figures[1] != new.figures[1]


def test_of_several_runs_the_last_counts():
    (group,) = quality_section([QUALITY, QUALITY | {"perplexity": 40.0}], "tiny").groups
    assert [row[3] for row in group.tables[0].rows] == ["40.00"]


def test_eval_records_until_there_is_a_comparison():
    old = QUALITY | {"benchmark": "eval", "protocol": "context 64, prefill full", "calibration": {"allocation": "even"}}
    del old["method"]
    assert quality_section([old], "tiny").groups[0].tables[0].rows[0][0] == "even"
    assert quality_section([old, QUALITY], "tiny").groups[0].tables[0].rows[0][0] == "uniform"


def test_what_lacks_is_not_made_up(record):
    records = [{"benchmark": "quality", "method": "greedy"}, {"benchmark": "table"}, {}, QUALITY | {"perplexity": None}]
    html = page(record, [quality_section(records, "my model"), table_section(records, "my model")])
    assert html.count('class="missing"') == 2 and "<svg" not in html
    text = " ".join(Page(html).text)
    assert "python eval.py --checkpoint 'my model' --out benchmarks/results/eval.json" in text
    assert "python -m teal_fast.benchmarks.table --checkpoint 'my model'" in text


def test_names_are_escaped(record):
    bad = "<b onload=x>&\"'</b>"
    strange = record | {"model": bad, "corpus": [bad]}
    quality = quality_section([QUALITY | {"method": bad, "text": bad}], bad)
    html = page(strange, [quality, table_section([TABLE | {"format": bad, "device": bad}], bad)])
    assert "<b onload" not in html
    found = Page(html)
    assert "onload" not in {name for _, given in found.elements for name in given}
    assert " ".join(found.text).count(bad) >= 6


def test_bad_files_are_refused(built, even, tmp_path):
    with pytest.raises(ValueError, match="another model's than"):
        read_activations(built / "activations.json", even)
    (tmp_path / "a.json").write_text('[{"benchmark": "eval"}]')
    with pytest.raises(ValueError, match="no record of this version"):
        read_activations(tmp_path / "a.json", built / "tiny")
    (tmp_path / "a.json").write_text('{"benchmark": "eval"}')
    with pytest.raises(ValueError, match="holds a dict, expected a list"):
        read_records(tmp_path / "a.json")


def test_bad_input_is_one_line(built, command, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    out = tmp_path / "report.html"
    done = command("report.page", "--checkpoint", built / "tiny", "--results", tmp_path, "--out", out)
    assert done.returncode == 1 and not out.exists() and "Traceback" not in done.stderr
    assert re.match(r"error: .*broken\.json is not valid JSON", done.stderr.splitlines()[-1])
