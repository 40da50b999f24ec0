"""The sections of docs/results.md that speak of quality: from records of one text and protocol to a Section."""

import math
from collections.abc import Callable

from teal_fast.report.results_section import (
    Record,
    Section,
    by,
    each,
    listed,
    markdown,
    percent,
    thresholds,
    unique,
)

KINDS = ("qkv", "o", "gate+up", "down")


def over_sparsities(
    records: list[Record], cell: Callable[[Record], str], sparsities: list[float], *labels: str
) -> list[str]:
    """A row of a table whose columns are sparsities, after the cells that name it."""
    found = {record["sparsity"]: cell(record) for record in records}
    return [*labels, *(found.get(sparsity, "") for sparsity in sparsities)]


def quality_section(records: list[Record]) -> Section:
    rows = []
    for record in sorted(records, key=lambda record: record["sparsity"]):
        kinds = record.get("achieved_by_kind") or {}
        compared = ["", ""]
        if record["difference_error"]:  # the baseline differs from itself by nothing
            compared = [
                percent(record["loss_share"]),
                f"{record['difference']:+.3f} ± {record['difference_error']:.3f}",
            ]
        rows.append(
            [
                *(percent(record["sparsity"]), record["calibration"]["method"], f"{record['perplexity']:.2f}"),
                *(percent(record["achieved_sparsity"], 1), *compared),
                *(percent(kinds[kind], 1) if kind in kinds else "" for kind in KINDS),
            ]
        )
    first = records[0]["calibration"]["method"]
    head = ["target", "method", "perplexity", "achieved", f"share of {first}'s loss", f"nats less {first}'s", *KINDS]
    about = records[0]
    origin = about["calibration"]
    return Section(
        f"{about['model']}, {about['texts']}, {about['protocol'].split(', ')[-1]}",
        [markdown(head, rows)],
        [
            about["protocol"],
            f"computed in {about['format']}",
            f"dense perplexity {about['dense_perplexity']:.2f}",
            f"thresholds from {origin.get('tokens', 'all')} tokens of {thresholds(about)}, seed {origin.get('seed')}",
        ],
    )


def method_of(record: Record) -> str:
    """What made a record's thresholds, "" where none did or it is not known."""
    return (record.get("calibration") or {}).get("method", "")


def perplexity_section(records: list[Record]) -> Section:
    sparsities = sorted({record["sparsity"] for record in records})
    dense = {r["model"]: math.log(r["perplexity"]) for r in reversed(records) if not r["sparsity"]}

    def score(record: Record) -> str:
        if not record["sparsity"]:
            return f"{record['perplexity']:.2f}"
        return f"{record['perplexity']:.2f} ({percent(record['achieved_sparsity'], 1)})"

    def loss(record: Record) -> str:
        originals = [model for model in dense if record["model"].startswith(model)]  # demo of demo-int8
        return f"{math.log(record['perplexity']) - dense[min(originals, key=len)]:.3f}" if originals else ""

    scores, losses = [], []
    for row in by(records, "run", "model", "format", "baseline").values():
        pruned = row[0].get("baseline")
        what = f"{row[0]['model']}, {'weights by ' + pruned if pruned else row[0]['format']}"
        origin = unique(filter(None, [*map(thresholds, row), *map(method_of, row)]))
        labels = [what, ", ".join(origin), row[0]["device"]]
        scores.append(over_sparsities(row, score, sparsities, *labels))
        losses.append(over_sparsities(row, loss, sparsities, *labels[:2]))
    columns = [percent(sparsity) for sparsity in sparsities]
    return Section(
        f"{records[0]['texts']}, {records[0]['protocol']}",
        [
            markdown(["perplexity (achieved)", "thresholds from", "device", *columns], scores),
            markdown(["nats over the original, dense", "thresholds from", *columns], losses),
        ],
    )


def tasks_section(records: list[Record]) -> Section:
    tables = []
    names = {"acc": "accuracy, %", "acc_norm": "accuracy by length, %", "perplexity": "perplexity"}
    for metric, title in names.items():
        scored = [record for record in records if record.get(metric) is not None]
        tasks = unique((record["task"], record["items"]) for record in scored)
        rows = []
        for sparsity in sorted({record["sparsity"] for record in scored}):
            found = {r["task"]: task_cell(r, metric) for r in scored if r["sparsity"] == sparsity}
            rows.append([percent(sparsity), *(found.get(task, "") for task, _ in tasks)])
        if rows:
            tables.append(markdown([title, *(f"{task} ({items} items)" for task, items in tasks)], rows))
    about = records[0]
    notes = [about["protocol"], f"computed in {about['format']}", f"thresholds from {thresholds(about)}"]
    return Section(f"{about['model']} on {about['device']}", tables, notes)


def task_cell(record: Record, metric: str) -> str:
    if metric == "perplexity":
        return f"{record['perplexity']:.1f}"
    share, error = 100 * record[metric], 100 * record[f"{metric}_error"]
    if not record["sparsity"]:
        return f"{share:.1f} ± {error:.1f}"
    change, doubt = 100 * record[f"{metric}_change"], 100 * record[f"{metric}_change_error"]
    return f"{share:.1f} ({change:+.1f} ± {doubt:.1f})"


def rounding_section(records: list[Record]) -> Section:
    factors = sorted({record["factor"] for record in records})
    rows = []
    for row in by(records, "format", "op", "mode", "sparsity").values():
        cells = {r["factor"]: f"{r['error_percent']:.4f} ({r['error_percent_most']:.4f})" for r in row}
        about = row[0]
        labels = [f"{about['format']}, {percent(about['sparsity'])}", about["op"], about["mode"]]
        rows.append([*labels, *(cells.get(factor, "") for factor in factors)])
    columns = ["as it is" if factor == 1 else f"one entry {factor:,} times the rest" for factor in factors]
    title = f"{records[0]['model']} on {records[0]['device']}"
    return Section(title, [markdown(["error, %", "product", "step", *columns], rows)])


def tradeoff_section(records: list[Record]) -> Section:
    rows = []
    for record in records:
        error = record["loss_error"]
        loss = f"{record['loss_over_file']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        low, high = record["tokens_per_s_spread"]
        rate = f"{record['tokens_per_s']:.1f}"
        achieved = each([record], "achieved_sparsity", lambda value: percent(value, 1))
        rows.append(
            [record["peer"] or f"ours, {percent(record['sparsity'])}", achieved, rate, f"{low:.1f} to {high:.1f}", loss]
        )
    about = records[0]
    head = ["", "achieved", "tokens/s", "rounds", "nats over the file itself"]
    notes = [f"{about['texts']}, {about['protocol']}", f"{about['new_tokens']} tokens a round"]
    notes += [listed(f"llama.cpp {r['peer_version']}" for r in records if r.get("peer_version"))]
    return Section(f"{about['model']} on {about['device']}", [markdown(head, rows)], notes)


def agree_section(records: list[Record]) -> Section:
    rows = []
    for r in records:
        parted = [f"{text['parted']} ({text['margin']:.3f})" for text in r["answers"] if text["parted"] is not None]
        equal = f"{len(r['answers']) - len(parted)} of {len(r['answers'])}"
        apart = f"{100 * r['apart']:+.3f} ± {100 * (r['apart_error'] or 0):.3f}"
        what = f"{r['model']}, {r['format']} in {r['dtype']}"
        scores = [f"{r['perplexity']:.4f}", f"{r['llama_cpp_perplexity']:.4f}", apart]
        rows.append([what, r["peer"], r["protocol"], *scores, equal, ", ".join(parted)])
    head = ["", "beside", "windows", "perplexity", "llama.cpp's", "apart, %", "greedy texts equal"]
    return Section(records[0]["device"], [markdown([*head, "others part at token (margin, nats)"], rows)])


def agree_transformers_section(records: list[Record]) -> Section:
    rows = []
    for r in records:
        scores = [f"{r['perplexity']:.4f}", f"{r['transformers_perplexity']:.4f}", f"{100 * r['apart']:+.4f}"]
        steps = r["by_token"]
        steps = f"{100 * steps['apart']:+.4f} ({steps['windows']} windows, {steps['mode']})" if steps else ""
        rows.append([f"{r['model']}, {r['format']} in {r['dtype']}", f"{r['texts']}, {r['protocol']}", *scores, steps])
    head = ["", "windows", "perplexity", "transformers'", "apart, %", "token by token apart, %"]
    versions = listed(f"transformers {r['peer_version']}" for r in records)
    return Section(records[0]["device"], [markdown(head, rows)], [versions])
