"""Writes docs/results.md: the tables of all benchmark records, between the paragraphs of a template; and its pictures.

    python -m teal_fast.report.results

A record's `benchmark` field says which section it belongs to (SECTIONS), and some of its fields which records it shares
a section with; the template's line `<!-- decode -->` says where the sections of that kind go. So new records of a known
kind show up by themselves, and a record of an unknown kind is an error. tests/report/test_results.py fails when the
page is not what the records say.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teal_fast.evaluation.record import read_records, reading_records
from teal_fast.files.paths import IN_A_CLONE, ROOT
from teal_fast.files.store import check_writable, new_file
from teal_fast.report.figures import save
from teal_fast.report.results_quality import (
    agree_section,
    agree_transformers_section,
    perplexity_section,
    quality_section,
    rounding_section,
    tasks_section,
    tradeoff_section,
)
from teal_fast.report.results_section import Record, Section, by, read_text, unique
from teal_fast.report.results_several import (
    batch_section,
    few_tokens_section,
    ranks_section,
    speculate_section,
    verify_section,
)
from teal_fast.report.results_speed import (
    alternate_section,
    decode_section,
    kernels_section,
    massive_section,
    memory_section,
    prompts_section,
    serve_section,
    table_section,
)
from teal_fast.report.speculate import speculate_figures
from teal_fast.report.timeline import timeline_figures, timeline_section
from teal_fast.report.tradeoff import tradeoff_figures

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
TEMPLATE = Path(__file__).with_name("results_template.md")
PROGRAMS = {"torch": "PyTorch", "triton": "Triton", "python": "Python"}
UNCOMMITTED = "†"  # the template says what it means


@dataclass(frozen=True)
class Kind:
    """How records of a benchmark become sections: those that agree in `keys` share one."""

    keys: tuple[str, ...]
    section: Callable[[list[Record]], Section]


SECTIONS = {
    "decode": Kind(("file", "run", "model"), decode_section),
    "alternate": Kind(("file", "run", "model"), alternate_section),
    "prompts": Kind(("file", "run", "model"), prompts_section),
    "memory": Kind(("file",), memory_section),
    "ranks": Kind(("file", "run", "model"), ranks_section),
    "serve": Kind(("file", "run", "model"), serve_section),
    "timeline": Kind(("file", "run", "model"), timeline_section),
    "massive": Kind(("file", "run", "model"), massive_section),
    "kernels": Kind(("file", "run", "model"), kernels_section),
    "few_tokens": Kind(("file", "run", "model"), few_tokens_section),
    "batch": Kind(("file", "run", "model"), batch_section),
    "speculate": Kind(("file", "model"), speculate_section),
    "verify": Kind(("file", "run", "model"), verify_section),
    "quality": Kind(("file", "run", "model", "texts", "protocol"), quality_section),
    "perplexity": Kind(("texts", "protocol"), perplexity_section),
    "tradeoff": Kind(("file", "run", "model"), tradeoff_section),
    "agree": Kind(("file",), agree_section),
    "agree_transformers": Kind(("file",), agree_transformers_section),
    "rounding": Kind(("file", "run", "model"), rounding_section),
    "tasks": Kind(("file", "model", "format", "protocol"), tasks_section),
    "table": Kind(("file", "run"), table_section),
}


def read_results(folder: Path) -> list[Record]:
    """The records of all JSON files in the folder, each with its file's name. Raises ValueError for anything else."""
    records = []
    for path in sorted(folder.glob("*.json")):
        for record in read_records(path):
            added = {"file": path.name, "texts": read_text(record)}
            if taken := added.keys() & record:
                raise ValueError(f"{path} has a record with a field {min(taken)!r}, which this page gives records")
            records.append(record | added)
    if not records:
        raise FileNotFoundError(f"{folder} holds no JSON records: run a benchmark with --out {folder}/NAME.json")
    return records


def kind(record: Record) -> str:
    """The section a record belongs to: its benchmark, of which eval.py's makes two kinds of tables."""
    name = record.get("benchmark")
    if name == "eval":
        name = "tasks" if record.get("task") else "perplexity"
    if name not in SECTIONS:
        raise ValueError(f"{record['file']} has a record of benchmark {name!r}, expected one of {', '.join(SECTIONS)}")
    return name


def origin(record: Record) -> str:
    """Where, with what and when a record was measured."""
    versions = record["versions"]
    commit = versions["commit"] or "unknown"
    if commit.endswith("+"):
        commit = commit.removesuffix("+") + UNCOMMITTED
    parts = [
        record["device"],
        record.get("instruction_set"),
        f"{record['threads']} threads",
        *(f"{name}={value}" for name, value in (record.get("settings") or {}).items()),
        *(f"{title} {versions[name]}" for name, title in PROGRAMS.items() if versions.get(name)),
        f"commit {commit}",
        record["date"],
    ]
    return f"[{record['file']}](../benchmarks/results/{record['file']}): {', '.join(filter(None, parts))}"


def render(section: Section, records: list[Record]) -> str:
    """A section as Markdown: its title, what it was measured with, its tables."""
    measured = "\n".join(f"- {line}" for line in unique(map(origin, records)))
    notes = "; ".join(filter(None, section.notes))
    sentence = f"{notes[0].upper()}{notes[1:]}." if notes else ""
    return "\n\n".join(filter(None, (f"### {section.title}", measured, sentence, *section.tables)))


def make_page(records: list[Record], template: str) -> str:
    """The page: the template with every line `<!-- kind -->` replaced by the sections of that kind."""
    kinds: dict[str, list[Record]] = {name: [] for name in SECTIONS}
    for record in records:
        kinds[kind(record)].append(record)
    if missing := [name for name in SECTIONS if f"<!-- {name} -->\n" not in template]:
        raise ValueError(f"the template has no line <!-- {missing[0]} -->, so that these records would be left out")

    def sections(marker: re.Match) -> str:
        name = marker[1]
        groups = by(kinds[name], *SECTIONS[name].keys).values()
        return "\n\n".join(render(SECTIONS[name].section(group), group) for group in groups) or "No records."

    return re.sub(r"^<!-- (\w+) -->$", sections, template, flags=re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records (default: benchmarks/results)")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write (default: docs/results.md)")
    options = parser.parse_args()
    if not IN_A_CLONE:
        raise ValueError("docs/results.md is a page of the repository: run it in a clone")
    check_writable(options.out)
    with reading_records(options.results):
        records = read_results(options.results)
        page = make_page(records, TEMPLATE.read_text(encoding="utf-8"))
        figures = [*tradeoff_figures(records), *timeline_figures(records), *speculate_figures(records)]
    with new_file(options.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    for figure in figures:
        save(figure, options.out.parent)
    print(f"wrote {', '.join([str(options.out), *(f'{figure.name}.svg' for figure in figures)])}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
