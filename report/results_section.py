"""Parts of docs/results.md: a section of tables, and how records' values are written in them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Record = dict
CORPORA = {  # what a record calls a text, and what it is
    "test.raw": "WikiText-2 test (raw)",
    "valid.raw": "WikiText-2 validation (raw)",
    "evaluation": "`data/evaluation`",
    "calibration": "`data/calibration`",
}


@dataclass(frozen=True)
class Section:
    """A heading, what its tables were measured with, and the tables as Markdown."""

    title: str
    tables: list[str]
    notes: list[str] = field(default_factory=list)


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def by(records: list[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Records by their values of `keys`, in the order in which these first occur."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(str(record.get(key)) for key in keys), []).append(record)
    return groups


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table without the columns that are empty in every row."""
    kept = [column for column, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    lines = [[row[column] for column in kept] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("| --- ", "|---").replace("---|", "---|")


def text_name(name: str) -> str:
    return CORPORA.get(name.removeprefix("wiki."), name)


def listed(values: Iterable) -> str:
    return ", ".join(unique(map(str, values)))


def read_text(record: Record) -> str:
    return listed(text_name(name) for name in record.get("text") or [])


def thresholds(record: Record) -> str:
    """What a record's thresholds were calibrated on, "" for a dense or pruned model without any."""
    origin = record.get("calibration") or {}
    return text_name(origin["corpus"]) if "corpus" in origin else ""


def each(records: list[Record], key: str, form: Callable[[float], str]) -> str:
    """The values of `key` in several records of a row, "" where none has it."""
    return "; ".join(form(record[key]) for record in records if record.get(key) is not None)
