"""Draws small charts as SVG with matplotlib, for a page that sets them side by side or, on a phone, in one column.

Colours are CSS variables whose defaults are the light theme's. Text stays text, in the page's font. One unit of a
figure is about one pixel, so that no page has to scale it. Every function returns a Figure; `save` writes it.
"""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from teal_fast.files.store import new_file
from teal_fast.report.activations import density

THEME = {  # name: light and dark theme; text has a contrast of at least 4.5 : 1
    "ink": ("#1f2933", "#e4e7eb"),
    "muted": ("#5a6675", "#a3aebb"),
    "grid": ("#dfe4ea", "#333d49"),
    "bar": ("#c3cfdf", "#41536d"),
    "blue": ("#2463c7", "#6fa8ff"),
    "orange": ("#bf5509", "#f5a04d"),
    "green": ("#16794a", "#4fc78e"),
    "violet": ("#7a3fe0", "#b897fa"),
    "red": ("#c42b48", "#fa8094"),
    "teal": ("#0c7585", "#41c5d6"),
    "ochre": ("#856a05", "#d9b945"),
    "rose": ("#a8338f", "#ee8bd6"),
}
LIGHT = {name: light for name, (light, _) in THEME.items()}
SERIES = [LIGHT[name] for name in ("blue", "orange", "green", "violet", "red", "teal", "ochre", "rose")]
MARKERS = "osD^vPXh"
DASHES = ((), (4, 2), (1, 1.5), (5, 1.5, 1, 1.5))
SIZE, WIDE, SMALL = (340, 230), (380, 255), (170, 100)  # units, about pixels
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "teal-fast",
    "font.size": 11,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 11,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["grid"],
    "ytick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.2,
}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
TIMES = FuncFormatter(lambda value, _: f"{value:g}x")
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


@dataclass(frozen=True)
class Figure:
    """A chart: a file name, a caption, and an <svg> element that can stand in a page any number of times."""

    name: str
    title: str
    svg: str


def draw(name: str, title: str, paint: Callable[[Axes], None], size: tuple[int, int] = SIZE) -> Figure:
    """A chart with one pair of axes, and with a legend above it when `paint` labels anything."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        axes = canvas.add_subplot()
        paint(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = next(n for n in (4, 3, 2, 1) if n == 1 or sum(sorted(map(len, labels))[-n:]) + 7 * n <= 60)
            labels = [label.replace("$", r"\$") for label in labels]  # no formula
            canvas.legend(handles, labels, loc="outside upper left", ncols=columns)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Figure(name, title, inline(buffer.getvalue(), name, title))


def inline(document: str, name: str, title: str) -> str:
    """Turns matplotlib's SVG document into an element for a page: scalable, themed, half as long."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", svg, flags=re.S)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda id: f' id="{name}-{id[1]}"' if id[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^)]*\)\"", "", svg)
    svg = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), svg)
    for variable, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    start = f'<svg {box} role="img" aria-label="{escape(title)}">'
    return re.sub(r"[ \n]+", " ", start + svg[svg.index(">") + 1 :]).strip()


def save(figure: Figure, folder: Path) -> None:
    """Writes a figure as an SVG file whose colours follow the reader's theme."""
    dark = "".join(f"--{name}: {dark};" for name, (_, dark) in THEME.items())
    about = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = f"<style>svg {{font-family: system-ui, sans-serif}} @media (prefers-color-scheme: dark) {{svg {{{dark}}}}}"
    svg = figure.svg.replace("<svg", f"<svg {about}", 1).replace(">", f">{style}</style>", 1)
    with new_file(folder / f"{figure.name}.svg") as temporary:
        temporary.write_text(svg + "\n", encoding="utf-8")


def percent(share: float, digits: int = 0) -> str:
    """A share as text: 0.5 is 50 %, kept on one line."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def histogram(layer: Mapping, sparsities: list[float], small: bool = False) -> Figure:
    """A layer's distribution, both fits, and the range that its thresholds drop. small: no legend, no axis labels."""
    shape = layer["histogram"]
    edges = np.linspace(shape["low"], shape["high"], len(shape["density"]) + 1)
    x = np.linspace(shape["low"], shape["high"], 81 if small else 161)

    def paint(axes: Axes) -> None:
        axes.stairs(shape["density"], edges, fill=True, color=LIGHT["bar"])
        for fit, colour, dashes in (("gaussian", "blue", DASHES[0]), ("laplacian", "orange", DASHES[1])):
            label = None if small else f"{fit.title()}, KS {layer[fit]['distance']:.3f}"
            axes.plot(x, density(layer[fit], fit, x), color=LIGHT[colour], dashes=dashes, label=label)
        label = None if small else f"dropped at {' and '.join(map(percent, sparsities))}"
        for threshold in (value for value in layer["thresholds"] if value > 0):
            axes.axvspan(-threshold, threshold, color=LIGHT["red"], alpha=0.2, linewidth=0, label=label)
            label = None
        axes.set(xlim=(shape["low"], shape["high"]), yticks=[], ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(3 if small else 6, steps=(1, 2, 5, 10)))
        axes.spines["left"].set_visible(False)
        if not small:
            axes.set_xlabel("value of a hidden state")

    name = f"histogram-{layer['layer']}-{layer['kind'].replace('+', '-')}{'-small' if small else ''}"
    title = f"layer {layer['layer']}" if small else f"Input of {layer['kind']}, layer {layer['layer']}"
    return draw(name, title, paint, SMALL if small else SIZE)


def over_layers(
    name: str,
    title: str,
    label: str,
    lines: Mapping[str, list[float]],
    unit: FuncFormatter = PERCENT,
    log: bool = False,
    nominal: float | None = None,
    size: tuple[int, int] = SIZE,
) -> Figure:
    """One line per series along the model's layers. unit: of the values; nominal: a level to compare with."""

    def paint(axes: Axes) -> None:
        for series, (key, values) in enumerate(lines.items()):
            axes.plot(values, color=SERIES[series], dashes=DASHES[series], label=key)
        if nominal is not None:
            axes.axhline(nominal, color=LIGHT["ink"], linewidth=0.8)
        if log:
            axes.set_yscale("log")
        elif nominal is None:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="layer", ylabel=label)

    return draw(name, title, paint, size)


def activity(kind: str, curves: list[list[list[float]]], sparsities: list[float]) -> Figure:
    """How often channels are kept, in ascending order. curves: shares of tokens [layers][sparsities][points]."""
    data = np.array(curves)
    x = np.linspace(0, 1, data.shape[-1])

    def paint(axes: Axes) -> None:
        for series, nominal in enumerate(sparsities):
            layers, colour = data[:, series], SERIES[series % len(SERIES)]
            axes.fill_between(x, layers.min(0), layers.max(0), color=colour, alpha=0.18, linewidth=0)
            dashes = DASHES[series % len(DASHES)]
            axes.plot(x, np.median(layers, 0), color=colour, dashes=dashes, label=f"{percent(nominal)} dropped")
        axes.set(xlabel="channels, the rarest kept first", ylabel="tokens that keep it", xlim=(0, 1), ylim=(0, 1.02))
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)

    return draw(f"activity-{kind.replace('+', '-')}", f"Channels at the input of {kind}", paint)


def curves(
    name: str,
    title: str,
    labels: tuple[str, str],
    lines: Mapping[str, list[tuple[float, float]]],
    unit: FuncFormatter = PERCENT,
    log: bool = True,
) -> Figure:
    """One marked line per series through its points, x ascending. unit: of x; log: y is logarithmic."""

    def paint(axes: Axes) -> None:
        for series, (key, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            place = series % len(SERIES)
            axes.plot(x, y, color=SERIES[place], dashes=DASHES[series % 4], marker=MARKERS[place], label=key)
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(MaxNLocator(7) if high < 4 * low else LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_major_formatter(unit)
        axes.set(xlabel=labels[0], ylabel=labels[1])

    return draw(name, title, paint, WIDE)
