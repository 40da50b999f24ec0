"""The sections of docs/results.md that speak of speed: from the records of one run of a benchmark to a Section.

Ratios of speed are medians over rounds of the ratio within a round, of rows of one run; best rounds stand in brackets.
"""

import statistics

from teal_fast.report.results_section import Record, Section, by, each, listed, markdown, percent, unique


def is_ours(record: Record) -> bool:
    """Whether a row is of the step that serves, and not of another for comparison: by cuBLAS, by Triton."""
    return not record["peer"] and not record["mode"].startswith("captured ")


def row_name(record: Record) -> str:
    if record["peer"]:
        return record["peer"]
    if "cublas" in record["mode"]:
        return f"{record['format']}, dense by cuBLAS"
    return f"{record['format']}, {percent(record['sparsity'])}{'' if is_ours(record) else ' in Triton'}"


def ratio(record: Record, other: Record) -> str:
    """Median of the rounds' ratios, and in brackets that of the best rounds."""
    rounds = zip(record["tokens_per_s_rounds"], other["tokens_per_s_rounds"], strict=True)
    paired = statistics.median(mine / theirs for mine, theirs in rounds)
    best = record["tokens_per_s_spread"][1] / other["tokens_per_s_spread"][1]
    return f"{paired:.2f} ({best:.2f})"


def decode_section(records: list[Record]) -> Section:
    ours = [record for record in records if is_ours(record)]
    lengths = sorted({record["prompt_tokens"] for record in records})
    after = "; ".join(f"{length:,}" for length in lengths)
    rows = []
    for row in by(records, "format", "sparsity", "mode", "peer").values():
        row = sorted(row, key=lambda record: record["prompt_tokens"])
        rates = {r["prompt_tokens"]: f"{r['tokens_per_s']:.1f} ({r['tokens_per_s_spread'][1]:.1f})" for r in row}
        achieved = "" if "cublas" in row[0]["mode"] else each(row, "achieved_sparsity", lambda value: percent(value, 1))
        rows.append(
            [
                *(row_name(row[0]), row[0]["mode"], achieved, *(rates.get(length, "") for length in lengths)),
                each(row, "bytes_per_token", lambda value: f"{value / 1e6:,.0f}"),
                each(row, "bandwidth_share", percent),
                each(row, "host_share", percent),
                each(row[:1], "max_memory_bytes", lambda value: f"{value / 1e9:.1f}"),
            ]
        )
    head = ["", "step", f"achieved after {after}", *(f"tokens/s after {length:,}" for length in lengths)]
    head += [f"MB a token after {after}", "share of bandwidth", "outside the step", "memory, GB"]
    formats = listed(record["format"] for record in ours)
    rounds = listed(len(record["tokens_per_s_rounds"]) for record in records)
    return Section(
        f"{records[0]['model']} in {formats} on {records[0]['device']}",
        [markdown(head, rows), *ratio_table(records)],
        [
            f"{listed(record['new_tokens'] for record in records)} tokens a round, {rounds} rounds",
            f"read bandwidth {bandwidth(ours)}" if ours else "",
            listed(f"{r['peer']} {r['peer_version']}" for r in records if r.get("peer_version")),
        ],
    )


def bandwidth(records: list[Record]) -> str:
    low, high = (pick(record["read_gb_per_s"] for record in records) for pick in (min, max))
    return f"{low:.0f} GB/s" if round(low) == round(high) else f"{low:.0f} to {high:.0f} GB/s, row by row"


def ratio_table(records: list[Record]) -> list[str]:
    """Our rows at 0 and 50 % over others of their run, after prompts of the same length; nothing without others."""
    ours = sorted(
        (record for record in records if is_ours(record) and record["sparsity"] in (0, 0.5)),
        key=lambda record: record["prompt_tokens"],
    )
    places = {(row_name(record), record["prompt_tokens"]): record for record in records}
    shortest = min(record["prompt_tokens"] for record in records)
    formats = unique(record["format"] for record in ours)
    others = unique(row_name(record) for record in records if record["peer"] or "cublas" in record["mode"])
    head = ["", "after", "of 0 % in this format", *(f"of {formats[0]}, 50 %" for _ in formats[1:2])]
    head += [*(f"of {name}" for name in others), "of the same in Triton", f"of itself after {shortest:,}"]
    rows = []
    for record in ours:
        length = record["prompt_tokens"]
        names = [f"{record['format']}, 0 %", *(f"{formats[0]}, 50 %" for _ in formats[1:2]), *others]
        names.append(f"{row_name(record)} in Triton")
        compared = [places.get((name, length)) for name in names] + [places.get((row_name(record), shortest))]
        cells = ["" if other is None or other is record else ratio(record, other) for other in compared]
        if any(cells):
            rows.append([row_name(record), f"{length:,}", *cells])
    return [markdown(head, rows)] if rows else []


def prompts_section(records: list[Record]) -> Section:
    rows = []
    lengths = sorted({record["prompt_tokens"] for record in records})
    for (format,), row in by(records, "format").items():
        found = {record["prompt_tokens"]: record for record in row}
        cells = [found.get(length) for length in lengths]
        rows.append([format, *("" if r is None else f"{1e3 * r['seconds']:.1f} ({r['ratio']:.2f})" for r in cells)])
    head = ["ms (times as long as in the first row)", *(f"{length:,} tokens" for length in lengths)]
    rounds = listed(len(record["seconds_rounds"]) for record in records)
    return Section(
        f"{records[0]['model']} on {records[0]['device']}", [markdown(head, rows)], [f"{rounds} rounds, medians"]
    )


def memory_section(records: list[Record]) -> Section:
    rows = [
        [
            *(r["model"], percent(r["sparsity"]), f"{r['prompt_tokens']:,} + {sum(r['new_tokens']):,}"),
            *(f"{r[name] / 1e6:,.0f}" for name in ("file_bytes", "import_bytes", "peak_bytes")),
            f"{r['of_file']:.2f}",
        ]
        for r in records
    ]
    head = ["", "sparsity", "tokens", "file, MB", "PyTorch alone, MB", "peak, MB", "peak less PyTorch, of the file"]
    return Section(f"On {records[0]['device']}", [markdown(head, rows)])


def alternate_section(records: list[Record]) -> Section:
    rows = []
    for r in records:
        rates = (f"{statistics.median(r[name]):.1f}" for name in ("tokens_per_s_before", "tokens_per_s"))
        ratios = f"{r['ratio']:.4f} ({min(r['ratios']):.4f} to {max(r['ratios']):.4f})"
        rows.append([r["format"], percent(r["sparsity"]), f"{r['prompt_tokens']:,}", *rates, ratios])
    head = ["format", "sparsity", "after tokens", "tokens/s before", "tokens/s", "ratio of a round, median (extremes)"]
    title = f"{records[0]['model']} at {records[0]['commit_before']} and later on {records[0]['device']}"
    return Section(title, [markdown(head, rows)], [f"{len(records[0]['ratios'])} rounds"])


def kernels_section(records: list[Record]) -> Section:
    def column(record: Record) -> str:
        return "dense" if record["implementation"] == "dense" else percent(record["sparsity"])

    columns = unique(map(column, sorted(records, key=lambda r: (r["implementation"] == "dense", r["sparsity"]))))
    rows = []
    for row in by(records, "op", "shape").values():
        found = {column(r): f"{r['us']:,.1f} ({percent(r['bandwidth_share'])})" for r in row}
        shape = "all four" if row[0]["shape"] is None else " x ".join(map(str, row[0]["shape"]))
        rows.append([row[0]["op"], shape, *(found.get(name, "") for name in columns)])
    head = ["us (share of bandwidth)", "inputs x outputs", *columns]
    title = f"{records[0]['model']}'s products in {listed(r['format'] for r in records)} on {records[0]['device']}"
    return Section(title, [markdown(head, rows)], [f"read bandwidth {bandwidth(records)}"])


def massive_section(records: list[Record]) -> Section:
    rows = []
    for row in by(records, "format", "sparsity").values():
        for r in row:
            errors = (each([r], name, lambda value: percent(value, 1)) for name in ("error", "rounding"))
            size = f"{r['size']:,}" if r["size"] > 1 else "none"
            times = f"{r['us'] / row[0]['us']:.3f}"
            rows.append([r["format"], percent(r["sparsity"]), size, f"{r['us']:,.1f}", times, *errors])
    head = ["weights", "sparsity", "times the rest", "us a token", "of none", "logits differ", "rounding alone"]
    return Section(
        f"Massive activations in {records[0]['model']}'s shapes on {records[0]['device']}", [markdown(head, rows)]
    )


def serve_section(records: list[Record]) -> Section:
    names = {id(r): r["peer"] or f"{r['mode']}, {percent(r['sparsity'])}" for r in records}
    times = ("first_token_s", "first_turn_s", "second_turn_s")
    rows, compared = [], []
    for r in records:
        rate = f"{r['tokens_per_s']:.1f} ({r['tokens_per_s_spread'][1]:.1f})"
        shares = [each([r], "achieved_sparsity", lambda value: percent(value, 1)) if r["sparsity"] else "", rate]
        seconds = [each([r], name, lambda value: f"{1e3 * value:,.0f}") for name in times]
        rows.append([names[id(r)], *shares, *seconds, each([r], "second_of_first", lambda value: f"{value:.3f}")])
        for other, ratios in r.get("compared", {}).items():
            cells = [each([ratios], name, lambda value: f"{value:.2f}") for name in ("tokens_per_s", *times)]
            compared.append([names[id(r)], other, *cells])
    about = next(r for r in records if "turns_prompt_tokens" in r)
    first, second = about["turns_prompt_tokens"]
    lengths = [
        f"after {about['first_token_prompt_tokens']:,} tokens",
        f"of turn 1 of {first:,}",
        f"of turn 2 of {second:,}",
    ]
    head = ["", "achieved", "tokens/s", *(f"first token {length}, ms" for length in lengths), "second turn of first"]
    tables = [markdown(head, rows)]
    if compared:
        tables.append(markdown(["", "over", "tokens/s", *(f"first token {length}" for length in lengths)], compared))
    return Section(
        f"{about['model']} in {about['format']} on {about['device']}",
        tables,
        [
            f"{about['new_tokens']} tokens after {about['prompt_tokens']}, {len(about['tokens_per_s_rounds'])} rounds",
            listed(f"{r['peer']} {r['peer_version']}" for r in records if r.get("peer_version")),
        ],
    )


def table_section(records: list[Record]) -> Section:
    rows = []
    for record in records:
        rate, read = record["tokens_per_s"], record["bytes_per_token"]
        rows.append(
            [
                *(record["format"], f"{record['bits']:.2f}", percent(record["sparsity"])),
                *(percent(record["achieved_sparsity"], 1), f"{record['perplexity']:.2f}"),
                *(f"{rate:.1f} ({record['tokens_per_s_spread'][1]:.1f})", f"{read / 1e6:.0f}"),
                *(f"{rate * read / 1e9:.1f}", percent(record["bandwidth_share"])),
            ]
        )
    head = ["format", "bits a weight", "sparsity", "achieved on the text", "perplexity", "tokens/s", "MB a token"]
    about = records[0]
    return Section(
        f"{about['model']} on {about['device']}, {about['texts']}",
        [markdown([*head, "GB/s", "share of bandwidth"], rows)],
        [
            about["protocol"],
            f"{about['new_tokens']} tokens a round after {about['prompt_tokens']}",
            f"{len(about['tokens_per_s_rounds'])} rounds",
            f"read bandwidth {bandwidth(records)}",
        ],
    )
