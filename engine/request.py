"""What goes into an engine and what comes out of it: a request, and tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from teal_fast.engine.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """One text to continue, by token ids.

    sparsity: the share of weight bytes that a decoded token skips, 0 (dense) to 1, of the engine's calibration; the
    prompt is computed densely. stop: ids that end the answer, None for the engine's own. max_new_tokens: None for as
    many as fit the context. seed: the same seed draws the same tokens from the same logits (a prefix that the cache
    holds may round otherwise than one that is read); None draws a new one. logprobs: whether tokens carry their
    log-probability, in nats, before temperature and filters.
    """

    prompt: Iterable[int]
    sampling: Sampling = field(default_factory=Sampling)
    sparsity: float = 0.0
    max_new_tokens: int | None = None
    stop: Iterable[int] | None = None
    seed: int | None = None
    logprobs: bool = False

    def __post_init__(self):
        object.__setattr__(self, "prompt", tuple(self.prompt))
        if self.stop is not None:
            object.__setattr__(self, "stop", frozenset(self.stop))
        if not self.prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity {self.sparsity}: expected a fraction from 0 (dense) to 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed}: expected a whole number of at most 64 bits")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")


class Token(NamedTuple):
    """One drawn token.

    logprob: nats, None unless the request asks for it. sparsity: the nominal one at which the step that drew it ran; 0
    for the first, which the prompt's dense pass gives. finish_reason: None but for the last token: "stop" where it is a
    stop token, which is not part of the text; "length" where no more were asked for or fit.
    """

    id: int
    logprob: float | None
    sparsity: float
    finish_reason: str | None
