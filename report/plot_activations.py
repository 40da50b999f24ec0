"""Measures the hidden states of a model: histograms, Gaussian and Laplacian fits, outlier and hot channels.

    python -m teal_fast.report.plot_activations --checkpoint demo --figures figures

The model reads text, by default text that it was not calibrated on. All measurements go into one JSON file, from which
report/page.py makes a page; --figures also draws them as SVG files.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch

from teal_fast.calibration.corpus import encode_corpus
from teal_fast.calibration.passes import cut_sequences
from teal_fast.cli import (
    add_model_arguments,
    open_calibration,
    open_checkpoint,
    pick_device,
    positive_int,
    run,
    sparsity,
)
from teal_fast.evaluation.perplexity import DEFAULT_TEXT
from teal_fast.evaluation.record import describe, write_records
from teal_fast.families.config import model_args
from teal_fast.files.calibration import Calibration
from teal_fast.files.checkpoint import fingerprint, read_config
from teal_fast.files.load import load_model
from teal_fast.files.store import check_writable
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.report.activations import HOT, measure_activations
from teal_fast.report.figures import PLAIN, TIMES, WIDE, Figure, activity, histogram, over_layers, percent, save
from teal_fast.sparse_model import KINDS, format_of
from teal_fast.weights.formats import DTYPES

RECORD_VERSION = "1"


def default_path(folder: Path) -> Path:
    """Where the record of a checkpoint is written unless told otherwise."""
    return Path(f"{folder.resolve().name}-activations.json")


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column holds names. span: width in columns of figures, of which a page has 3."""

    head: list[str]
    rows: list[list[str]]
    title: str = ""
    span: int = 3


@dataclass(frozen=True)
class Group:
    """Figures and tables that belong together. more: smaller figures, which the reader can unfold."""

    figures: list[Figure]
    tables: list[Table] = field(default_factory=list)
    more: list[Figure] = field(default_factory=list)
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report. wide: fewer, larger figures; missing: if there are no data, the command that makes them."""

    name: str
    title: str
    text: str = ""
    groups: list[Group] = field(default_factory=list)
    wide: bool = False
    missing: str = ""


def by_kind(record: dict) -> dict[str, list[dict]]:
    """The layers of a record, in order, by the kind of tensor that reads them."""
    return {kind: [layer for layer in record["layers"] if layer["kind"] == kind] for kind in KINDS.values()}


def activation_sections(record: dict) -> Iterator[Section]:
    """The sections of the report that a record of this module fills."""
    kinds, sparsities = by_kind(record), record["sparsity"]
    yield distributions(kinds, sparsities)
    yield fits(kinds)
    yield outliers(kinds, sparsities)
    yield channels(kinds, sparsities)
    yield achieved(kinds, sparsities)


def distributions(kinds: dict[str, list[dict]], sparsities: list[float]) -> Section:
    groups = []
    for kind, layers in kinds.items():
        chosen = sorted({0, len(layers) // 2, len(layers) - 1})
        figures = [histogram(layers[place], sparsities) for place in chosen]
        more = [histogram(layer, sparsities, small=True) for layer in layers]
        groups.append(Group(figures, more=more, title=f"Input of {kind}"))
    text = (
        "All channels of a layer's input together, up to five mean deviations from the median. What lies in the red "
        "band around zero is dropped, at the lower sparsity in its inner part. Gaussian: mean and standard deviation. "
        "Laplacian: median and mean absolute deviation. KS: Kolmogorov-Smirnov distance, the largest gap between the "
        "cumulative distributions of the data and the fit; 0 is a perfect fit."
    )
    return Section("distributions", "Hidden states", text, groups)


def fits(kinds: dict[str, list[dict]]) -> Section:
    figures, rows = [], []
    for kind, layers in kinds.items():
        distances = {fit.title(): [layer[fit]["distance"] for layer in layers] for fit in ("gaussian", "laplacian")}
        name = f"fit-{kind.replace('+', '-')}"
        figures.append(over_layers(name, f"Input of {kind}", "KS distance", distances, PLAIN))
        closer = sum(b < a for a, b in zip(*distances.values(), strict=True))
        kurtosis = median(layer["excess_kurtosis"] for layer in layers)
        middle = [f"{median(values):.3f}" for values in distances.values()]
        rows.append([kind, *middle, f"{closer} of {len(layers)}", f"{kurtosis:.1f}"])
    head = ["input of", "KS Gaussian", "KS Laplacian", "Laplacian closer", "excess kurtosis"]
    text = (
        "Kolmogorov-Smirnov distance of each layer's values from both fits; the table gives medians over layers. "
        "Channels differ in scale, so all of them together have heavier tails than one alone."
    )
    return Section("fits", "Goodness of fit", text, [Group(figures, [Table(head, rows, span=2)])])


def outliers(kinds: dict[str, list[dict]], sparsities: list[float]) -> Section:
    lines = {kind: [layer["outliers"][0]["ratio"] for layer in layers] for kind, layers in kinds.items()}
    tails = {kind: [layer["excess_kurtosis"] for layer in layers] for kind, layers in kinds.items()}
    largest = ("outliers", "The largest channel of each layer", "of the median channel", lines, TIMES)
    heavy = ("tails", "How heavy the tails are", "excess kurtosis", tails, PLAIN)
    figures = [over_layers(*chart, log=True, size=WIDE) for chart in (largest, heavy)]
    rows = []
    for kind, layers in kinds.items():
        found = [(outlier, layer["layer"]) for layer in layers for outlier in layer["outliers"]]
        for outlier, layer in sorted(found, key=lambda pair: -pair[0]["ratio"])[:4]:
            kept = [percent(share) for share in outlier["activity"]]
            numbers = [str(layer), str(outlier["channel"]), f"{outlier['mean']:.2f}", f"{outlier['ratio']:.0f}x"]
            rows.append([kind, *numbers, *kept])
    head = ["input of", "layer", "channel", "mean |x|", "of the median"] + [
        f"kept at {percent(nominal)}" for nominal in sparsities
    ]
    text = (
        "Mean |x| of a channel over the median channel's, in the same layer; the table names the four largest of each "
        "kind. Excess kurtosis weighs the tails of a whole layer: 0 for a Gaussian, 3 for a Laplacian."
    )
    return Section("outliers", "Outlier channels", text, [Group(figures, [Table(head, rows)])], wide=True)


def channels(kinds: dict[str, list[dict]], sparsities: list[float]) -> Section:
    busy = [activity(kind, [layer["activity"] for layer in layers], sparsities) for kind, layers in kinds.items()]
    hot = []
    for place, nominal in enumerate(sparsities):
        lines = {kind: [layer["hot"][place] for layer in layers] for kind, layers in kinds.items()}
        title = f"Hot channels at {percent(nominal)}"
        hot.append(over_layers(f"hot-{100 * nominal:g}", title, "of all channels", lines))
    text = (
        "How evenly thresholds fall on channels: the share of tokens on which each is kept, channels in order of it. "
        "Lines are medians over layers, bands reach from the least to the most. Hot: kept on at least "
        f"{percent(HOT)} of the tokens."
    )
    return Section("channels", "Activity of channels", text, [Group(busy + hot)])


def achieved(kinds: dict[str, list[dict]], sparsities: list[float]) -> Section:
    figures = []
    for place, nominal in enumerate(sparsities):
        lines = {kind: [layer["achieved"][place] for layer in layers] for kind, layers in kinds.items()}
        name, title = f"achieved-{100 * nominal:g}", f"Achieved at {percent(nominal)} nominal"
        figures.append(over_layers(name, title, "dropped", lines, nominal=nominal))
    text = (
        "What the thresholds really drop on this text, with all tokens of a sequence but the first sparse. It differs "
        "from the nominal sparsity (the thin line) because the text is not the one calibrated on, and because what is "
        "dropped changes the hidden states further up."
    )
    rows = [
        [kind, *(percent(mean(layer["achieved"][place] for layer in layers), 1) for place in range(len(sparsities)))]
        for kind, layers in kinds.items()
    ]
    table = Table(
        ["input of", *(f"at {percent(nominal)}" for nominal in sparsities)], rows, "Means over layers", span=1
    )
    return Section("achieved", "Achieved sparsity", text, [Group(figures, [table])])


def print_table(table: Table) -> None:
    widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
    for row in (table.head, *table.rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


@dataclass(frozen=True)
class Settings:
    """What text the hidden states are measured on, and at which sparsities."""

    corpus: tuple[Path, ...] = (DEFAULT_TEXT,)
    sparsity: tuple[float, ...] = (0.25, 0.5)
    tokens: int = 4096
    context: int = 1024  # longest sequence
    seed: int = 1234  # draws the sequences


def measure_checkpoint(
    folder: Path,
    calibration: Calibration,
    device: torch.device,
    dtype: str | None = None,
    settings: Settings | None = None,
) -> dict:
    """The record of a checkpoint's hidden states; dtype: bf16, fp16, fp32, or None for the stored one."""
    settings = settings or Settings()
    tokenizer = Tokenizer.load(folder)
    documents = encode_corpus(list(settings.corpus), tokenizer, model_args(read_config(folder)))
    model = load_model(folder, device, DTYPES.get(dtype))
    context = min(settings.context, model.args.max_position)
    sequences = cut_sequences(documents, context, settings.tokens, settings.seed, tokenizer.prefix)
    if not sequences:
        raise ValueError("the corpus has fewer than 2 tokens to measure: give more text, or a larger --tokens")
    record = describe(folder.resolve().name, device, format_of(model)) | {
        "benchmark": "activations",
        "version": RECORD_VERSION,
        "fingerprint": fingerprint(folder),
        "corpus": [path.name for path in settings.corpus],
        "tokens": sum(map(len, sequences)) - len(sequences),
        "sequences": len(sequences),
        "calibration": calibration.origin,
        "sparsity": sorted(set(settings.sparsity)),
        "hot_share": HOT,
    }
    record["layers"] = measure_activations(model, calibration, sequences, record["sparsity"])
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the checkpoint's own)")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[DEFAULT_TEXT], help="text files or folders")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.25, 0.5], help="thresholds to look at")
    parser.add_argument(
        "--tokens", type=positive_int, default=Settings.tokens, help="tokens to read (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=positive_int, default=Settings.context, help="longest sequence (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=Settings.seed, help="draws the sequences (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: <model>-activations.json, here)")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw SVG files into this folder")
    options = parser.parse_args()

    folder, device = open_checkpoint(options.checkpoint, not options.no_prepare), pick_device(options.device)
    out = options.out or default_path(folder)
    check_writable(out)
    if options.figures:
        check_writable(options.figures / "any.svg")
    calibration = open_calibration(folder, options.calibration, device, not options.no_prepare)
    settings = Settings(tuple(options.corpus), tuple(options.sparsity), options.tokens, options.context, options.seed)
    record = measure_checkpoint(folder, calibration, device, options.dtype, settings)
    write_records(out, [record])
    print_table(fits(by_kind(record)).groups[0].tables[0])
    print(f"wrote {out}: {len(record['layers'])} layers over {record['tokens']} tokens", file=sys.stderr)
    if options.figures:
        for section in activation_sections(record):
            for group in section.groups:
                for figure in group.figures + group.more:
                    save(figure, options.figures)


if __name__ == "__main__":
    run(main)
