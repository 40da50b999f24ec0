"""What is drafted next: which drafter, at which sparsity, how many tokens, or none.

It takes what should give the most tokens a second, by how often drafts stood and by what drafting and verifying took,
both measured while it runs; before anything is measured, by priors. All costs are in dense steps. Greedy text does not
depend on any of this, nor does the distribution of sampled text.

What drafting loses against dense steps is paid from a small credit, and drafts are only made if it pays for them
should none stand. Where costs are near what was believed, drafting so loses no more than the credit: over 512 tokens
5 + 512 * 0.015 dense steps, 2.5 %. Simulated with priors 2.5 times too low it lost 3 to 4.6 %, more where a machine's
other work makes single times several times as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

# A prior counts as so many drafts. What was seen fades: with each draft of its own, and slowly while others draft, so
# that what failed is tried again some hundred cycles later.
WEIGHT, FADE, FADE_IDLE = 6.0, 0.97, 0.997
# What a further verified token takes. The demo in bf16 on Zen 3: 0.12 with two threads, 0.16 with one.
SLOPE = 0.14
# Weights of a time that is shorter than was thought, and of a longer one: what is learnt is near the shortest times,
# since a machine with other work is no news of the drafter.
SHORTER, LONGER = 0.5, 0.05
FIRST = 3  # dense steps that are measured before anything is drafted
CREDIT, INCOME, MOST_CREDIT = 5.0, 0.015, 8.0  # in dense steps: at first, for each token, at most
# Weight of a dense step in their mean, by which cycles are paid, and how many times the usual a time counts at most:
# what is longer was something else's.
MEAN, STRANGE = 0.05, 1.3
STALE = 64  # cycles after which a dense step is measured again


@dataclass
class Arm:
    """One way to draft. acceptance, cost: priors of how often a draft stands and what one takes, in dense steps."""

    name: str
    acceptance: float
    cost: float
    stood: float = field(default=0.0, init=False)
    tried: float = field(default=0.0, init=False)

    @property
    def share(self) -> float:
        """The share of drafts that stand, of those whose predecessors do."""
        return (self.acceptance * WEIGHT + self.stood) / (WEIGHT + self.tried)

    def learn(self, drafts: int, stood: int) -> None:
        self.stood = self.stood * FADE + stood
        self.tried = self.tried * FADE + min(drafts, stood + 1)

    def fade(self) -> None:
        self.stood *= FADE_IDLE
        self.tried *= FADE_IDLE


class Controller:
    """Learns over all answers of an engine; the credit is of one."""

    def __init__(self):
        self.dense_s, self.measured = 0.0, 0  # seconds of a dense step, and how many were measured
        self.mean_s = 0.0  # what one takes with what else the machine does
        self.verify: dict[int, float] = {}  # what verifying so many tokens takes
        self.slope, self.since_dense, self.credit = SLOPE, 0, CREDIT

    def begin(self) -> None:
        """A new answer."""
        self.credit = CREDIT

    def cost(self, tokens: int) -> float:
        """What it takes to verify so many tokens."""
        return 1.0 if tokens == 1 else self.verify.get(tokens, 1 + self.slope * (tokens - 1))

    def choose(self, offers: Sequence[tuple[Arm, int]], forced: int | None = None) -> tuple[Arm | None, int]:
        """An arm and its number of drafts; offers: arms with how many tokens each can propose now.

        forced: so many drafts wherever there can be, whether they pay or not.
        """
        best: tuple[Arm | None, int] = (None, 0)
        if self.measured < FIRST or (forced is None and self.since_dense >= STALE):
            return best
        most = 1.0 if forced is None else 0.0
        verify = [self.cost(count) for count in range(1, 2 + max((longest for _, longest in offers), default=0))]
        for arm, longest in offers:
            share, stands, expected = arm.share, 1.0, 1.0
            for count in range(1, min(longest, forced or longest) + 1):
                stands *= share
                expected += stands
                cost = count * arm.cost + verify[count]
                if forced is None and cost - 1 > self.credit:
                    break
                if expected > most * cost and count >= min(longest, forced or 0):
                    best, most = (arm, count), expected / cost
        return best

    def learn(self, arm: Arm | None, drafts: int, stood: int, draft_s: float, verify_s: float) -> float:
        """What a cycle showed, by its times in seconds. Returns what such a cycle takes, in dense steps."""
        self.since_dense = self.since_dense + 1 if drafts else 0
        self.credit += INCOME * (stood + 1)
        if drafts == 0:
            self.dense_s = nearer(self.dense_s if self.measured else verify_s, verify_s)
            self.measured += 1
            usual = self.mean_s or verify_s
            self.mean_s = usual + max(MEAN, 1 / self.measured) * (min(verify_s, STRANGE * usual) - usual)
            return 1.0
        self.verify[drafts + 1] = nearer(self.cost(drafts + 1), verify_s / self.dense_s)
        slopes = [(cost - 1) / (tokens - 1) for tokens, cost in self.verify.items()]
        self.slope = max(0.0, sum(slopes) / len(slopes))
        arm.cost = nearer(arm.cost, draft_s / drafts / self.dense_s)
        arm.learn(drafts, stood)
        cost = drafts * arm.cost + self.cost(drafts + 1)
        paid = min((draft_s + verify_s) / self.mean_s, STRANGE * cost)
        self.credit = min(MOST_CREDIT, self.credit + stood + 1 - paid)
        return cost


def nearer(thought: float, found: float) -> float:
    """What is thought of a time once another one was found; at most twice as long counts."""
    return thought + (SHORTER if found < thought else LONGER) * (min(found, 2 * thought + 0.1) - thought)
