"""Writes one HTML page about a model's activation sparsity: hidden states, perplexity, speed and bits.

    python -m teal_fast.report.page --checkpoint demo

The page contains everything that it shows: inline SVG, no scripts, nothing from a network. Hidden states come from the
record of report/plot_activations.py, which is made when it is missing; the rest comes from the same model's benchmark
records. A section without records shows the command that makes them.
"""

import argparse
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from shlex import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from teal_fast.cli import add_model_arguments, open_calibration, open_checkpoint, pick_device, run
from teal_fast.evaluation.record import read_records, reading_records, write_records
from teal_fast.files.checkpoint import fingerprint
from teal_fast.files.paths import ROOT
from teal_fast.files.store import check_writable, new_file
from teal_fast.report.figures import PLAIN, THEME, curves, percent
from teal_fast.report.plot_activations import (
    RECORD_VERSION,
    Group,
    Section,
    Table,
    activation_sections,
    default_path,
    measure_checkpoint,
)
from teal_fast.sparse_model import KINDS

RESULTS = Path("benchmarks") / "results"
QUALITY = {"sparsity", "achieved_sparsity", "perplexity", "protocol"}  # what a record must have to be shown
QUALITY_HEAD = ["nominal", "achieved", "perplexity", "±", *KINDS.values()]
TABLE = QUALITY | {"run", "format", "bits", "tokens_per_s", "bytes_per_token"}
TABLE_HEAD = ["format", "bits", "sparsity", "achieved", "perplexity", "tokens/s", "MB a token", "GB/s"]


def read_activations(path: Path, folder: Path) -> dict:
    """The record that plot_activations.py wrote. Raises ValueError unless it is of the checkpoint in `folder`."""
    record = (read_records(path) or [{}])[0]
    if (record.get("benchmark"), record.get("version")) != ("activations", RECORD_VERSION):
        raise ValueError(f"{path} is no record of this version of plot_activations.py: remove it, or run that again")
    if record["fingerprint"] != fingerprint(folder):
        raise ValueError(f"{path} is another model's than {folder}: remove it, or choose another with --activations")
    return record


def by_group(records: list[dict], *keys: str) -> dict[tuple[str, ...], list[dict]]:
    """Groups records by their values of `keys`, as text, in the order of first occurrence."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(str(record.get(key)) for key in keys), []).append(record)
    return groups


def complete(records: list[dict], benchmark: str, keys: set[str]) -> list[dict]:
    """The records of a benchmark that have all of `keys`."""
    return [r for r in records if r.get("benchmark") == benchmark and all(r.get(key) is not None for key in keys)]


def method(record: dict) -> str:
    """The method by which the sparsity was distributed over the layers."""
    return record.get("method") or allocation(record.get("calibration") or {})


def allocation(origin: dict[str, str]) -> str:
    """The method in a calibration's origin; files of earlier versions call it allocation."""
    return origin.get("method") or origin.get("allocation") or "unnamed"


def protocol(record: dict) -> str:
    """A record's text and protocol in words."""
    text = record.get("text") or []
    text = ", ".join(text) if isinstance(text, list) else text
    windows = record.get("windows")
    parts = [text, f"{windows} windows" if windows else "", *record["protocol"].split(", ")]
    return ", ".join(dict.fromkeys(filter(None, parts)))


def quality_section(records: list[dict], checkpoint: str) -> Section:
    """Perplexity over achieved sparsity with one line per method: a chart and a table for each text and protocol."""
    found = complete(records, "quality", QUALITY) or complete(records, "eval", QUALITY)
    name, title = "quality", "Perplexity"
    if not found:
        return Section(
            name, title, missing=f"python eval.py --checkpoint {quote(checkpoint)} --out {RESULTS}/eval.json"
        )
    figures, tables = [], []
    for number, group in enumerate(by_group(found, "text", "windows", "protocol").values()):
        last = {(method(r), r.get("format"), r["sparsity"]): r for r in group}  # of several runs the last one counts
        several = len({format for _, format, _ in last}) > 1
        lines, rows = {}, []
        for way, format in dict.fromkeys(key[:2] for key in last):  # in the order of the records, the baseline first
            label = f"{way}, {format}" if several else way
            own = sorted((r for key, r in last.items() if key[:2] == (way, format)), key=lambda r: r["sparsity"])
            lines[label] = [(r["achieved_sparsity"], r["perplexity"]) for r in own]
            rows += [[label, *quality_cells(r)] for r in own]
        caption = protocol(group[0])
        figures.append(curves(f"quality-{number}", caption, ("achieved sparsity", "perplexity"), lines))
        tables.append(without_empty_columns(Table(["method", *QUALITY_HEAD], rows, caption)))
    text = (
        "Achieved sparsity is weighted by the bytes of the weights skipped; a chart's perplexity is logarithmic. Full: "
        "all tokens of a window but the first are sparsified; half: only its second half. ±: standard error over "
        "windows; two methods on the same windows differ more surely than it says. Columns by kind of tensor: achieved."
    )
    return Section(name, title, text, [Group(figures, tables)], wide=True)


def quality_cells(record: dict) -> list[str]:
    """The cells under QUALITY_HEAD, "" where the record has no value."""
    error, kinds = record.get("standard_error"), record.get("achieved_by_kind") or {}
    return [
        percent(record["sparsity"]),
        percent(record["achieved_sparsity"], 1),
        f"{record['perplexity']:.2f}",
        "" if error is None else f"{error:.2f}",
        *(percent(kinds[kind], 1) if kind in kinds else "" for kind in KINDS.values()),
    ]


def without_empty_columns(table: Table) -> Table:
    kept = [place for place, cells in enumerate(zip(*table.rows, strict=True)) if any(cells)]
    rows = [[row[place] for place in kept] for row in table.rows]
    return replace(table, head=[table.head[place] for place in kept], rows=rows)


def table_section(records: list[dict], checkpoint: str) -> Section:
    """Quality and speed by bits and sparsity: two charts and a table for each run of benchmarks/table.py."""
    found = complete(records, "table", TABLE)
    name, title = "table", "Quality, speed, bits"
    if not found:
        command = f"python -m teal_fast.benchmarks.table --checkpoint {quote(checkpoint)} --out {RESULTS}/table.json"
        return Section(name, title, missing=command)
    groups = []
    for number, group in enumerate(by_group(found, "run").values()):
        quality, speed = {}, {}
        for r in group:
            quality.setdefault(r["format"], []).append((r["tokens_per_s"], r["perplexity"]))
            skipped = r.get("decode_achieved_sparsity", r["achieved_sparsity"])  # old records know the text's alone
            speed.setdefault(r["format"], []).append((skipped, r["tokens_per_s"]))
        labels = ("tokens a second", "perplexity")
        figures = [
            curves(f"cost-{number}", "Perplexity over speed", labels, quality, PLAIN),
            curves(f"speed-{number}", "Speed over sparsity", ("achieved sparsity", labels[0]), speed, log=False),
        ]
        about = ", ".join(filter(None, (r.get("device"), f"{r['threads']} threads" if r.get("threads") else "")))
        table = Table(TABLE_HEAD, list(map(table_cells, group)), f"{about or 'unnamed device'}; {protocol(r)}")
        groups.append(Group(figures, [table]))
    text = (
        "Over speed, down and to the right is better; perplexity is logarithmic. Bits: a weight of the blocks' linear "
        "layers, scales included. Achieved: on the text; beside the speed, while decoding. MB and GB/s: weights, keys "
        "and values read while decoding."
    )
    return Section(name, title, text, groups, wide=True)


def table_cells(record: dict) -> list[str]:
    """The cells under TABLE_HEAD."""
    rate, read = record["tokens_per_s"], record["bytes_per_token"]
    return [
        record["format"],
        f"{record['bits']:.2f}",
        *(percent(record["sparsity"]), percent(record["achieved_sparsity"], 1), f"{record['perplexity']:.2f}"),
        *(f"{rate:.1f}", f"{read / 1e6:.0f}", f"{rate * read / 1e9:.1f}"),
    ]


def tiles(record: dict) -> list[tuple[str, str]]:
    """The record of the activations in four numbers, each with a caption."""
    layers, top = record["layers"], len(record["sparsity"]) - 1
    closer = sum(layer["laplacian"]["distance"] < layer["gaussian"]["distance"] for layer in layers)
    largest = max(layers, key=lambda layer: layer["outliers"][0]["ratio"])
    hot = average([layer["hot"][top] for layer in layers], [layer["channels"] for layer in layers])
    dropped = average(
        [layer["achieved"][top] for layer in layers], [layer["channels"] * layer["row_bytes"] for layer in layers]
    )
    nominal = percent(record["sparsity"][top])
    place = f"input of {largest['kind']}, layer {largest['layer']}"
    return [
        (f"{closer} of {len(layers)}", "inputs are closer to a Laplacian than to a Gaussian"),
        (f"{largest['outliers'][0]['ratio']:.0f}x", f"as large as the median channel is the largest one ({place})"),
        (percent(hot, 2), f"of channels are hot at {nominal}: kept on {percent(record['hot_share'])} of the tokens"),
        (percent(dropped, 1), f"of the weights' bytes are skipped at {nominal} nominal"),
    ]


def average(values: list[float], weights: list[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def page(record: dict, sections: list[Section]) -> str:
    """The report as HTML. record: of the activations, which describes the model at the top of the page."""
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    ).get_template("report.html")
    blocks = len(record["layers"]) // len(KINDS)
    about = (
        f"{blocks} layers in {record['format']}. {record['tokens']:,} tokens of “{', '.join(record['corpus'])}” in "
        f"{record['sequences']} sequences, read by the dense model on {record['date']}; thresholds calibrated on "
        f"“{record['calibration'].get('corpus', 'unnamed')}”, "
        f"allocation {allocation(record['calibration'])}."
    )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return template.render(
        model=record["model"],
        about=about,
        made=f"Made by teal-fast on {date.today().isoformat()} from records of {versions}.",
        theme=THEME,
        tiles=tiles(record),
        sections=sections,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument(
        "--activations", type=Path, help="file of plot_activations.py (default: its default; made if need be)"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / RESULTS, help="folder of records (default: benchmarks/results)"
    )
    parser.add_argument("--out", type=Path, help="HTML file to write (default: <model>-report.html, here)")
    options = parser.parse_args()

    folder = open_checkpoint(options.checkpoint, not options.no_prepare)
    out = options.out or Path(f"{folder.resolve().name}-report.html")
    check_writable(out)
    if not options.results.is_dir():
        raise FileNotFoundError(f"{options.results} does not exist: expected a folder of JSON records")
    records = [record for path in sorted(options.results.glob("*.json")) for record in read_records(path)]
    activations = options.activations or default_path(folder)
    if not activations.exists():
        print(f"measuring hidden states into {activations}, once", file=sys.stderr)
        device = pick_device(options.device)
        calibration = open_calibration(folder, None, device, not options.no_prepare)
        write_records(activations, [measure_checkpoint(folder, calibration, device, options.dtype)])
    with reading_records(activations, options.results):
        record = read_activations(activations, folder)
        records = [other for other in records if other.get("model") == record["model"]]
        own = [
            *activation_sections(record),
            *(make(records, options.checkpoint) for make in (quality_section, table_section)),
        ]
        html = page(record, own)
    with new_file(out) as temporary:
        temporary.write_text(html, encoding="utf-8")
    print(f"wrote {out}: {len(html) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
