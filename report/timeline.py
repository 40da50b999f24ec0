"""The picture of benchmarks/timeline.py's records: what the GPU does for two layers of a token, before and after."""

from typing import NamedTuple

from matplotlib.axes import Axes

from teal_fast.report.figures import LIGHT, PLAIN, Figure, draw, percent
from teal_fast.report.results_section import Record, Section, by, each, markdown

LAYERS = 15, 17  # from the beginning of one to that of the other, which is far from a token's ends
# What a layer's kernels are for, in their order, by step.
PARTS = {
    "triton": ("norm", "q/k/v", "attention", "attention", "o", "norm", "gate, up", "down"),
    "stages": ("norm, q/k/v", "attention, o", "norm, gate, up, down"),
}
STEPS = {"triton": "eight launches", "stages": "three launches"}
COLOURS = {"norm": "muted", "q/k/v": "blue", "attention": "orange", "o": "violet", "gate, up": "green", "down": "teal"}
COLOURS |= {"norm, q/k/v": "blue", "attention, o": "orange", "norm, gate, up, down": "green"}


class Span(NamedTuple):
    """A kernel of a layer; microseconds. works: when the one before it had ended, until which it waited."""

    part: str
    begin: float
    works: float
    end: float


def timeline_figures(records: list[Record]) -> list[Figure]:
    """One for each file of such records, named after it."""
    found = by([record for record in records if record["benchmark"] == "timeline"], "file").values()
    return [timeline_figure(rows) for rows in found]


def spans(record: Record) -> list[Span]:
    """The kernels of LAYERS, from the first one's work on. Raises ValueError if a layer has others than PARTS."""
    parts = PARTS[record["step"]]
    kernels = [tuple(map(int, kernel.split())) for kernel in record["kernels"].split(";")]
    first, count = ("norm_compact", 2) if record["step"] == "triton" else ("stage_qkv", 1)
    starts = [i for i, (name, _, _) in enumerate(kernels) if first in record["names"][name]][::count]
    (begin, end), layers = (starts[layer] for layer in LAYERS), LAYERS[1] - LAYERS[0]
    if end - begin != len(parts) * layers:
        raise ValueError(f"{record['file']}: {end - begin} kernels in {layers} layers, expected {len(parts)} in each")
    ended = [begins + took for _, begins, took in kernels]
    zero = max(ended[begin - 1], kernels[begin][1])
    found = []
    for i in range(begin, end):
        times = kernels[i][1], max(ended[i - 1], kernels[i][1]), ended[i]
        found.append(Span(parts[(i - begin) % len(parts)], *((time - zero) / 1000 for time in times)))
    return found


def timeline_section(records: list[Record]) -> Section:
    rows = []
    for record in records:
        parts = {part: 0.0 for part in PARTS[record["step"]]}
        for span in (found := spans(record)):
            parts[span.part] += (span.end - span.works) / (LAYERS[1] - LAYERS[0])
        layer = found[-1].end / (LAYERS[1] - LAYERS[0])
        shown = " · ".join(f"{part} {time:.1f}" for part, time in parts.items())
        times = (each([record], name, lambda value: f"{value:,.1f}") for name in ("us", "drawn_us"))
        rows.append([record["format"], STEPS[record["step"]], *times, f"{layer:.1f}", shown])
    head = ["weights", "a layer in", "us a token", "drawn", "us a layer", "of which, waits for the one before left out"]
    first = records[0]
    title = f"A token of {first['model']}'s shapes at {percent(first['sparsity'])} on {first['device']}"
    name = first["file"].removesuffix(".json")
    return Section(title, [f"![Two layers of a token, kernel by kernel]({name}.svg)", markdown(head, rows)])


def timeline_figure(records: list[Record]) -> Figure:
    """A line of bars for each record, pale where a kernel waits for the one before it."""
    rows = [row for group in by(records, "format").values() for row in sorted(group, key=lambda r: -len(r["kernels"]))]

    def paint(axes: Axes) -> None:
        for place, record in enumerate(rows):
            for number, span in enumerate(spans(record)):
                y, colour = place + 0.2 * (number % 2), LIGHT[COLOURS[span.part]]
                axes.barh(y, span.works - span.begin, 0.2, span.begin, color=colour, alpha=0.25, linewidth=0)
                axes.barh(y, span.end - span.works, 0.2, span.works, color=colour, linewidth=0)
                if record is rows[0] and number < len(PARTS["triton"]) and span.part not in seen:
                    seen.add(span.part)
                    axes.barh(y, 0, 0.2, 0, color=colour, label=span.part)
        labels = [f"{record['format']}, {STEPS[record['step']]}\n{record['us']:,.0f} us a token" for record in rows]
        axes.set_yticks([place + 0.1 for place in range(len(rows))], labels)
        axes.set(xlabel="microseconds of two layers", xlim=(0, None))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.grid(False, axis="y")
        axes.invert_yaxis()

    seen: set[str] = set()
    about = records[0]
    title = f"{about['model']}'s shapes at {percent(about['sparsity'])} on {about['device']}: two layers of a token"
    return draw(about["file"].removesuffix(".json"), title, paint, (640, 90 + 52 * len(rows)))
