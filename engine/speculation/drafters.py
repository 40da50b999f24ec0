"""Drafters: what guesses the next tokens cheaply, for the model itself to verify.

A guess need not be good for the text to be right, only for it to be fast: whatever a drafter proposes is verified.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from teal_fast.engine.prefill import prefill, tokens_at_once
from teal_fast.engine.sampling import GREEDY
from teal_fast.engine.scoring import parts
from teal_fast.engine.staged_step import StagedStep
from teal_fast.engine.steps import Step
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.model import Transformer


class Draft(NamedTuple):
    """A guessed token. chances [vocab] fp32: the distribution that it was drawn from, None where it was not drawn.

    Its id may be a tensor, int64 [1], that the host has not waited for: the verifier computes from it, and tells it.
    """

    id: int | Tensor
    chances: Tensor | None = None


Draw = Callable[[Tensor], Draft]  # from a draft's logits [vocab], given the drafts before it


def likeliest(logits: Tensor) -> Draft:
    """The draw of greedy sampling without penalties, of which a step may find the token itself."""
    return Draft(int(logits.argmax(-1)))


class Drafter(Protocol):
    """Proposes tokens. name: as requests, statistics and records have it."""

    name: str

    def propose(self, text: Sequence[int], count: int, draw: Draw) -> list[Draft]:
        """Up to `count` tokens that may follow the text, which is all that is certain: prompt and answer so far."""


@dataclass(frozen=True)
class DraftModel:
    """A model that may draft for another one, with the same tokenizer.

    calibration: its own, None where it drafts densely only. shared: whether it is a copy of the model that verifies,
    with rounded weights, so that it can use that one's keys and values.
    """

    name: str
    model: Transformer
    calibration: Calibration | None
    shared: bool


class ModelDrafter:
    """Drafts by decode steps of a model, at any sparsity that its calibration has thresholds for.

    step: over the cache that the verifier writes, where `shared`: it has the keys and values of the text but its last
    token, and overwrites those of the drafts. Else over a cache of its own, which is first brought up to the text.
    """

    def __init__(self, draft: DraftModel, step: Step, length: int):
        self.name, self.draft, self.step, self.length = draft.name, draft, step, length
        self.sparsity: float | None = None  # of the thresholds now set
        self.held: list[int] = []  # the tokens whose keys and values the cache of its own holds

    def set_sparsity(self, sparsity: float) -> None:
        """Of the drafts from now on."""
        if sparsity != self.sparsity:
            set_sparsity(self.draft.model, self.draft.calibration, sparsity)
            self.sparsity = sparsity

    def propose(self, text: Sequence[int], count: int, draw: Draw) -> list[Draft]:
        count = min(count, self.length - len(text))
        if count <= 0:
            return []
        if not self.draft.shared:
            self._read(text)
        if chained := draw is likeliest and isinstance(self.step, StagedStep):
            self.step.draw(GREEDY, 0)
        drafts, token = [], torch.tensor([[text[-1]]])
        for position in range(len(text) - 1, len(text) - 1 + count):
            logits = self.step(token, torch.tensor([position]))
            if chained:  # each step takes what the one before found, so that the host waits for none
                token = self.step.best[0].view(1, 1)
                drafts.append(Draft(token.flatten().clone()))
            else:
                drafts.append(draw(logits))
                token = torch.tensor([[drafts[-1].id]])
        self.held = [*text, *(draft.id for draft in drafts[:-1])]
        return drafts

    def _read(self, text: Sequence[int]) -> None:
        """Brings the cache up to the text without its last token, densely."""
        self.held = [int(id) for id in self.held]  # by now they are known
        pairs, end = enumerate(zip(self.held, text, strict=False)), len(text) - 1
        known = min(next((i for i, (a, b) in pairs if a != b), len(self.held)), end)
        if known < end and not hasattr(self.step, "dense"):
            tokens = torch.tensor([text[known:end]], device=self.step.cache.k[0].device)
            prefill(self.draft.model, self.step.cache, tokens, known)
            return
        for first, last in parts(known, end, tokens_at_once()) if known < end else ():
            self.step.dense(text[first:last], first, 0)


LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens. One token alone is found again too often to say what follows it


class NGram:
    """Drafts what followed the text's last tokens when they stood in it before (prompt lookup); costs nothing.

    The latest place of the longest match counts. Source: github.com/apoorvumang/prompt-lookup-decoding.
    """

    name = "ngram"

    def __init__(self):
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # where the text went on after some tokens

    def match(self, text: Sequence[int]) -> tuple[int, int]:
        """How many of the text's last tokens stood before, 0 for too few, and where the text went on after them."""
        if len(self.text) > len(text) or self.text != list(text[: len(self.text)]):
            self.text, self.after = [], {}
        for end in range(max(len(self.text), 1), len(text)):
            for n in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self.after[tuple(text[end - n : end])] = end
        self.text = list(text)
        for n in range(min(LONGEST_MATCH, len(text)), SHORTEST_MATCH - 1, -1):
            if (begin := self.after.get(tuple(text[-n:]))) is not None:
                return n, begin
        return 0, 0

    def propose(self, text: Sequence[int], count: int, draw: Draw) -> list[Draft]:
        n, begin = self.match(text)
        found = list(text)
        for i in range(begin, begin + count if n else begin):
            found.append(found[i])  # goes on in what it proposes where the text ends
        return [Draft(id) for id in found[len(text) :]]
