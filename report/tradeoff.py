"""The picture of benchmarks/tradeoff.py's records: loss over speed, ours by sparsity, llama.cpp's by formats."""

from matplotlib.axes import Axes

from teal_fast.report.figures import LIGHT, MARKERS, PLAIN, Figure, draw, percent
from teal_fast.report.results_section import Record, by

SIZE = (560, 300)  # units, about pixels


def tradeoff_figures(records: list[Record]) -> list[Figure]:
    """One for each run of such records, named after its file."""
    found = by([record for record in records if record["benchmark"] == "tradeoff"], "file", "run").values()
    return [tradeoff_figure(run) for run in found]


def tradeoff_figure(records: list[Record]) -> Figure:
    """Every row of a run as a point."""

    def paint(axes: Axes) -> None:
        groups = {"teal-fast, by sparsity": [], "llama.cpp, by format": []}
        for record in records:
            peer = (record["peer"] or "").removeprefix("llama.cpp ")
            point = record["tokens_per_s"], record["loss_over_file"], peer or percent(record["sparsity"])
            groups["llama.cpp, by format" if peer else "teal-fast, by sparsity"].append(point)
        looks = (("blue", (5, -12), "left"), ("orange", (-3, 6), "right"))  # colour, where names stand from points
        for (label, points), (colour, offset, side), marker in zip(groups.items(), looks, MARKERS, strict=False):
            x, y, names = zip(*points, strict=True)
            axes.plot(x, y, marker, color=LIGHT[colour], linestyle="-" if colour == "blue" else "", label=label)
            for place, value, name in zip(x, y, names, strict=True):
                where = {"xytext": offset, "textcoords": "offset points", "ha": side}
                axes.annotate(name, (place, value), **where, fontsize=9.5, color=LIGHT[colour])
        axes.set(xlabel="tokens a second", ylabel="loss over the file itself, nats", xlim=(0, None))
        axes.xaxis.set_major_formatter(PLAIN)

    about = records[0]
    title = f"{about['model']}: loss over speed, {about['device']}, {about['threads']} threads"
    return draw(about["file"].removesuffix(".json"), title, paint, SIZE)
