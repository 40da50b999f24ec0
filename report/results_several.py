"""Sections of docs/results.md about several tokens, sequences or GPUs at once."""

from collections.abc import Callable

from teal_fast.report.results_section import Record, Section, by, listed, markdown, percent, unique
from teal_fast.report.speculate import captions, sweeps


def few_tokens_section(records: list[Record]) -> Section:
    def column(record: Record) -> str:
        return f"{record['tokens']} token{'s' * (record['tokens'] > 1)}"

    columns = unique(map(column, sorted(records, key=lambda r: r["tokens"])))
    rows = []
    for row in by(records, "product", "format", "kernel").values():
        found = {column(r): f"{r['us']:,.1f} ({percent(r['bandwidth_share'])})" for r in row}
        shape = f"{row[0]['K']} x {row[0]['N']}"
        rows.append([row[0]["product"], shape, row[0]["format"], row[0]["kernel"], *map(found.get, columns)])
    head = ["us (share of bandwidth)", "inputs x outputs", "weight", "kernel", *columns]
    return Section(
        f"{records[0]['model']}'s products of a few tokens on {records[0]['device']}", [markdown(head, rows)]
    )


def ranks_section(records: list[Record]) -> Section:
    rows = []
    for row in by(records, "format", "sparsity").values():
        alone = next((r["tokens_per_s"] for r in row if r["ranks"] == 1), None)
        for r in row:
            ratio = f"{r['tokens_per_s'] / alone:.2f}" if alone else ""
            achieved = percent(r["achieved_sparsity"], 1)
            rate = f"{r['tokens_per_s']:.1f} ({r['tokens_per_s_spread'][1]:.1f})"
            rows.append([r["format"], percent(r["sparsity"]), str(r["ranks"]), achieved, rate, ratio])
    head = ["format", "sparsity", "GPUs", "achieved", "tokens/s: median (best)", "times one GPU"]
    first = records[0]
    return Section(f"{first['model']} on several {first['device']}s of one host", [markdown(head, rows)])


def batch_section(records: list[Record]) -> Section:
    sizes = unique(record["batch"] for record in records)

    def cells(row: list[Record], form: Callable[[Record], str]) -> list[str]:
        found = {record["batch"]: form(record) for record in row}
        return [found.get(size, "") for size in sizes]

    def shares(record: Record) -> str:
        by_chance = 1 - (1 - record["kept"]["all"]) ** record["batch"]
        return f"{percent(record['read']['all'])} ({percent(by_chance)})"

    speeds, read, products = [], [], []
    decoded = [record for record in records if "way" not in record]
    for (format, sparsity, sequences), row in by(decoded, "format", "sparsity", "sequences").items():
        one = next(r for r in decoded if (r["format"], str(r["sparsity"]), r["batch"]) == (format, sparsity, 1))
        row = [one, *(r for r in row if r is not one)]
        name = [format, percent(float(sparsity)), sequences]
        rates = ((r["tokens_per_s"], r["tokens_per_s"] / one["tokens_per_s"]) for r in row)
        speeds.append(name + [f"{rate:.1f} ({times:.2f})" for rate, times in rates])
        read += [name + cells(row, shares)] if float(sparsity) else []
    for (format, way), row in by([r for r in records if "way" in r], "format", "way").items():
        products.append([format, way, *cells(row, lambda r: f"{r['us']:,.1f}")])
    columns = ["sparsity", "sequences", *(f"{size} together" for size in sizes)]
    tables = [(["tokens/s of all (times one)", *columns], speeds), (["read by a step (by chance)", *columns], read)]
    tables.append((["us a layer at 50 %", "way", *columns[2:]], products))
    return Section(
        f"{records[0]['model']}, several sequences on {records[0]['device']}",
        [markdown(head, rows) for head, rows in tables if rows],
        [f"{listed(r['new_tokens'] for r in decoded)} tokens an answer" if decoded else ""],
    )


def verify_section(records: list[Record]) -> Section:
    passes, cycles = [], []
    for record in records:
        if record["mode"] != "cycle":
            row = [record["format"], f"{record['context']:,}", record["mode"], str(record["tokens"])]
            passes.append([*row, f"{record['ms']:.2f}", f"{record['of_dense']:.2f}"])
    shares = unique(record["acceptance"] for record in records if record["mode"] == "cycle")
    for row in by([record for record in records if record["mode"] == "cycle"], "context", "drafts").values():
        first, found = row[0], {record["acceptance"]: f"{record['speedup']:.2f}" for record in row}
        times = [f"{first['ms']:.2f}", f"{first['draft_ms']:.2f}"]
        cycles.append(
            [f"{first['context']:,}", str(first["drafts"]), *times, *(found.get(share, "") for share in shares)]
        )
    head = ["weights", "after", "what", "tokens", "ms", "dense steps"]
    tables = [markdown(head, passes)]
    if cycles:
        first = next(record for record in records if record["mode"] == "cycle")
        what = f"{first['draft_format']} at {percent(first['draft_sparsity'])}, verified in {first['format']}"
        said = f"Cycles of drafts by {what}: times dense, had so many drafts stood."
        tables += [said, markdown(["after", "drafts", "ms", "drafting", *map(percent, shares)], cycles)]
    return Section(f"Verification of {records[0]['model']}'s shapes on {records[0]['device']}", tables)


def speculate_section(records: list[Record]) -> Section:
    def shares(found: list[float]) -> str:
        return " ".join(percent(share) for share in found[:8])

    def sparsity(record: Record) -> str:
        return "" if record["draft_sparsity"] is None else percent(record["draft_sparsity"])

    swept, compared, checked = [], [], []
    for record in records:
        if "ratio" in record:
            found, spread = record["lossless"], f"{min(record['ratios']):.2f} to {max(record['ratios']):.2f}"
            row = [record["prompts"], record["draft"], f"{record['ratio']:.2f}", spread]
            compared.append([*row, f"{found['tokens_per_cycle']:.2f}", shares(found["acceptance"])])
        elif "predicted" in record:
            best = max(record["predicted"], key=record["predicted"].get)
            row = [record["draft"], sparsity(record), f"{record['draft_cost']:.2f}", shares(record["acceptance"])]
            swept.append([*row, best, f"{record['predicted'][best]:.2f}"])
        else:
            parted, drawn = record["parted"], f"drawn at {record['temperature']:g}"
            dense = "" if parted is None else f"{parted.count(None)} of {len(parted)}"
            row = [record["draft"], sparsity(record), "greedy" if parted else drawn, record["prompts"]]
            row += [f"{record['new_tokens']}", dense, percent(record["stood"]), shares(record["acceptance"])]
            checked.append([*row, f"{record['tokens_per_cycle']:.2f}"])
    tables = []
    if swept:
        first = next(r for r in records if "predicted" in r)
        verify = ", ".join(f"{n}: {cost:.2f}" for n, cost in first["verify_cost"].items())
        head = ["drafter", "sparsity", "cost of a draft", "drafts that stand, by place", "best number", "predicted"]
        pictures = " ".join(f"![{title}]({name}.svg)" for run in sweeps(records) for name, title in captions(run))
        tables = [f"Verifying so many tokens costs, in dense steps: {verify}.", markdown(head, swept), pictures]
    head = ["prompts", "drafter", "times dense", "by prompt", "tokens a cycle", "drafts that stand, by place"]
    if compared:
        tables.append(markdown(head, compared))
    head = ["drafter", "sparsity", "text", "prompts", "tokens", "the dense texts", "drafts that stand", "by place"]
    if checked:
        tables.append(markdown([*head, "tokens a cycle"], checked))
    first = records[0]
    return Section(f"{first['model']} in {first['format']} on {first['device']}, lossless", tables)
