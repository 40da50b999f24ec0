"""The pictures of benchmarks/speculate.py's sweeps: acceptance over what a draft costs, and speed-up over length."""

from teal_fast.report.figures import PLAIN, Figure, curves, percent
from teal_fast.report.results_section import Record, by


def is_swept(record: Record) -> bool:
    """Whether a record is of a sweep, and not of a check or of a comparison with dense."""
    return record["benchmark"] == "speculate" and "predicted" in record


def drafter(record: Record) -> str:
    """Who drafted, with its sparsity."""
    sparsity = record["draft_sparsity"]
    return record["draft"] if sparsity is None else f"{record['draft']}, {percent(sparsity)}"


def best(record: Record) -> float:
    """The highest speed-up that is predicted, at any length."""
    return max(record["predicted"].values())


def sweeps(records: list[Record]) -> list[list[Record]]:
    """The runs of sweeps among records."""
    return list(by(list(filter(is_swept, records)), "file", "run").values())


def speculate_figures(records: list[Record]) -> list[Figure]:
    """Two for each run of sweeps, named after its file."""
    return [figure for run in sweeps(records) for figure in figures_of(run)]


def captions(records: list[Record]) -> tuple[tuple[str, str], tuple[str, str]]:
    """Names and titles of the two figures of one sweep."""
    about = records[0]
    name = about["file"].removesuffix(".json")
    where = f"{about['model']} in {about['format']}, {about['device']}, {about['threads']} threads"
    acceptance = f"Drafts that stand over what one costs: {where}"
    length = f"Predicted speed-up over the number of drafts: {where}"
    return (f"{name}-acceptance", acceptance), (f"{name}-length", length)


def figures_of(records: list[Record]) -> tuple[Figure, Figure]:
    """Of one sweep: a line for each drafter by its sparsities, and one for each at the best of them."""
    drafters = by(records, "draft")
    costs = {draft: sorted((r["draft_cost"], r["stood"]) for r in found) for (draft,), found in drafters.items()}
    lengths = {}
    for record in (max(found, key=best) for found in drafters.values()):
        points = [(int(count), speedup) for count, speedup in record["predicted"].items()]
        lengths[drafter(record)] = [(0, 1.0), *points]
    acceptance, length = captions(records)
    labels = ("cost of a draft, dense steps", "share of drafts that stand")
    return (
        curves(*acceptance, labels, costs, PLAIN, log=False),
        curves(*length, ("drafts at a time", "times dense, predicted"), lengths, PLAIN, log=False),
    )
