"""What drafting brought: acceptance by position, tokens a cycle, what was chosen, and how much faster it was."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Of the cycles of one or more answers. A cycle verifies some drafts, or none, and gives one token more than stood.

    proposed, accepted: by position in a cycle, from 0. lengths: cycles by number of drafts. drafters: by name and
    sparsity, cycles, proposed and accepted drafts. cost: of all cycles, in dense steps, as the fastest of
    their parts were measured.
    """

    cycles: int = 0
    tokens: int = 0
    cost: float = 0.0
    proposed: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    drafters: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, drafter: str, drafts: int, stood: int, cost: float) -> None:
        """One cycle."""
        self.cycles += 1
        self.tokens += stood + 1
        self.cost += cost
        self.lengths[drafts] += 1
        self.proposed.update(range(min(drafts, stood + 1)))
        self.accepted.update(range(stood))
        self.drafters.setdefault(drafter, Counter()).update(cycles=1, proposed=drafts, accepted=stood)

    @classmethod
    def over(cls, answers: Iterable["Statistics"]) -> "Statistics | None":
        """Of several answers together; None of none."""
        found = list(answers)
        together = cls()
        for one in found:
            together._take(one)
        return together if found else None

    def _take(self, other: "Statistics") -> None:
        self.cycles, self.tokens = self.cycles + other.cycles, self.tokens + other.tokens
        self.cost += other.cost
        for mine, theirs in ((getattr(self, n), getattr(other, n)) for n in ("proposed", "accepted", "lengths")):
            mine.update(theirs)
        for name, counts in other.drafters.items():
            self.drafters.setdefault(name, Counter()).update(counts)

    def record(self) -> dict:
        """As fields of a record. acceptance: of the drafts in each position whose predecessors stood."""
        return {
            "cycles": self.cycles,
            "tokens_per_cycle": self.tokens / self.cycles if self.cycles else None,
            "acceptance": [self.accepted[i] / self.proposed[i] for i in sorted(self.proposed)],
            "lengths": {str(length): self.lengths[length] for length in sorted(self.lengths)},
            "drafters": {name: dict(counts) for name, counts in sorted(self.drafters.items())},
            "speedup": self.tokens / self.cost if self.cost else None,
        }


def describe_drafts(record: dict) -> str:
    """A `Statistics.record` in a line, for the end of an answer."""
    if not record["cycles"]:
        return "lossless: nothing to draft"
    stood = " ".join(f"{share:.0%}" for share in record["acceptance"][:8]) or "no drafts"
    chosen = ", ".join(f"{name} {counts['cycles']}" for name, counts in record["drafters"].items())
    return (
        f"lossless: {record['tokens_per_cycle']:.2f} tokens a cycle · stood by position: {stood} · cycles by drafter: "
        f"{chosen} · about {record['speedup']:.2f}x dense"
    )
