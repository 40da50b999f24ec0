"""Charts are small SVG elements that a page can hold any number of: themed, escaped, without a tie to anything else."""

import re
from xml.etree import ElementTree

import pytest

from teal_fast.report.figures import LIGHT, PLAIN, THEME, activity, curves, histogram, over_layers, percent, save

LAYER = {
    "layer": 7,
    "kind": "gate+up",
    "gaussian": {"center": 0.0, "scale": 1.2, "distance": 0.123},
    "laplacian": {"center": 0.0, "scale": 1.0, "distance": 0.045},
    "histogram": {"low": -5.0, "high": 5.0, "density": [0.1] * 10},
    "thresholds": [0.3, 0.7],
}
LINES = {"<b>&\"one' $a$ $b$": [(0.0, 20.0), (0.5, 40.0)], "two": [(0.0, 20.0)]}


def text(figure):
    return [element.text for element in ElementTree.fromstring(as_file(figure)).iter() if element.tag.endswith("text")]


def as_file(figure):
    return figure.svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)


FIGURES = [
    histogram(LAYER, [0.25, 0.5]),
    histogram(LAYER, [0.25, 0.5], small=True),
    over_layers("layers", 'A "title" <of> & layers', "share", {"qkv": [0.1, 0.2], "o": [0.3, 0.1]}, nominal=0.2),
    activity("qkv", [[[0.0, 0.5, 1.0]], [[0.1, 0.6, 1.0]]], [0.5]),
    curves("curves", "Perplexity", ("sparsity", "perplexity"), LINES),
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_stands_alone_in_a_page(figure):
    root = ElementTree.fromstring(as_file(figure))
    assert root.get("aria-label") == figure.title and root.get("width") is None
    ids = {element.get("id") for element in root.iter()} - {None}
    assert all(name.startswith(figure.name) for name in ids)  # no two figures of a page share one
    assert set(re.findall(r'(?:url\(|href=")#([\w.-]+)', figure.svg)) == ids
    assert "http" not in figure.svg and "<style" not in figure.svg
    assert len(figure.svg) < 25_000


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_every_colour_is_the_themes(figure):
    colours = set(re.findall(r"(?<!, )#[0-9a-f]{6}", figure.svg))
    assert colours <= {"#000000"}, "a colour that does not change with the theme"
    assert "var(--blue, #2463c7)" in figure.svg


def test_histogram_says_what_it_shows():
    labels = text(FIGURES[0])
    assert {"Gaussian, KS 0.123", "Laplacian, KS 0.045"} <= set(labels)
    assert f"dropped at {percent(0.25)} and {percent(0.5)}" in labels
    assert not any("KS" in label for label in text(FIGURES[1]))


def test_names_are_text():
    assert "<b>&\"one' $a$ $b$" in text(FIGURES[4])  # neither markup nor a formula


def test_perplexities_far_apart_and_close_together_have_marks():
    for top in (24.0, 5000.0):
        marks = text(curves("p", "p", ("x", "y"), {"a": [(0.0, 20.0), (0.5, top)]}, PLAIN))
        assert sum(1 for mark in marks if re.fullmatch(r"\d+(\.\d+)?", mark) and float(mark) >= 10) >= 3


def test_saved_file_follows_the_theme(tmp_path):
    save(FIGURES[0], tmp_path / "new")
    content = (tmp_path / "new" / f"{FIGURES[0].name}.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in content and THEME["blue"][1] in content
    assert len(list((tmp_path / "new").iterdir())) == 1


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", [name for name in THEME if name not in ("grid", "bar")])
def test_contrast(name):
    """WCAG 2.2's 4.5 : 1 of text and lines against the panels of report.html."""
    for colour, ground in zip(THEME[name], ("#ffffff", "#1a2129"), strict=True):
        bright, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_colours_differ():
    assert len(set(LIGHT.values())) == len(LIGHT)  # each stands for its variable
