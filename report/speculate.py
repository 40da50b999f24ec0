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


def speculate_figures(records: list[Record]) -> list[Figure]:
    """Two for each run of sweeps, named after its file."""
    return [figure for run in by(list(filter(is_swept, records)), "file", "run").values() for figure in figures_of(run)]


def figures_of(records: list[Record]) -> tuple[Figure, Figure]:
    """Of one sweep: a line for each drafter by its sparsities, and one for each at the best of them."""
    about, drafters = records[0], by(records, "draft")
    name = about["file"].removesuffix(".json")
    where = f"{about['model']} in {about['format']}, {about['device']}, {about['threads']} threads"
    costs = {draft: sorted((r["draft_cost"], r["stood"]) for r in found) for (draft,), found in drafters.items()}
    lengths = {}
    for record in (max(found, key=best) for found in drafters.values()):
        points = [(int(count), speedup) for count, speedup in record["predicted"].items()]
        lengths[drafter(record)] = [(0, 1.0), *points]
    acceptance = f"Drafts that stand over what one costs: {where}"
    length = f"Predicted speed-up over the number of drafts: {where}"
    labels = ("cost of a draft, dense steps", "share of drafts that stand")
    return (
        curves(f"{name}-acceptance", acceptance, labels, costs, PLAIN, log=False),
        curves(f"{name}-length", length, ("drafts at a time", "times dense, predicted"), lengths, PLAIN, log=False),
    )
