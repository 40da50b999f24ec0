"""What goes into an engine and what comes out of it: a request, and tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from teal_fast.engine.sampling import Sampling

LOSSLESS_IS_DENSE = "lossless text is the dense model's"
# As made at which sparsity keys and values count that a dense step wrote whose bits are not those of lossless
# decoding's, which does not go on from them: below any sparsity that can be asked for.
STEPPED = 1e-9


class Constraint(Protocol):
    """What one answer may consist of, token by token, for example JSON of a schema."""

    def mask(self) -> Tensor:
        """Which tokens may come next, bool [vocab_size] on the CPU; ids that end the answer where it may end."""

    def accept(self, id: int) -> None:
        """Takes note of the next token."""

    def fork(self) -> "Constraint":
        """Another one that goes on from here by itself, for drafts: it raises nothing, and its mask allows some token.

        This one is asked again about each draft in its place.
        """


@dataclass(frozen=True)
class Request:
    """One text to continue, by token ids.

    sparsity: the share of weight bytes that a decoded token skips, 0 (dense) to 1, of the engine's calibration. stop:
    ids that end the answer, None for the engine's own. max_new_tokens: None for as many as fit the context. seed: the
    same seed draws the same tokens from the same logits (a prefix that the cache holds may round otherwise than one
    that is read); None draws a new one. logprobs: whether tokens carry their log-probability, in nats, before
    penalties, temperature and filters; top_logprobs: and of how many of the likeliest tokens. sparse_prompt: whether
    all of the prompt but its first token is sparse as well, as evaluations have it; else the prompt is dense. cache:
    whether the prompt's beginning may come from the engine's cache, and this request stay in it. constraint: begins
    what the answer is held to.

    lossless: whether tokens are drafted cheaply and verified by the dense model, whose text it is: greedy bit for bit,
    drawn in distribution. draft: auto, self, ngram, or the name of another of the engine's draft models.
    draft_sparsity, draft_tokens: of drafts, and how many are verified at once; None to choose while it runs.
    """

    prompt: Iterable[int]
    sampling: Sampling = field(default_factory=Sampling)
    sparsity: float = 0.0
    max_new_tokens: int | None = None
    stop: Iterable[int] | None = None
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    sparse_prompt: bool = False
    cache: bool = True
    constraint: Callable[[], Constraint] | None = None
    lossless: bool = False
    draft: str = "auto"
    draft_sparsity: float | None = None
    draft_tokens: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "prompt", tuple(self.prompt))
        if self.stop is not None:
            object.__setattr__(self, "stop", frozenset(self.stop))
        if not self.prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity {self.sparsity}: expected a fraction from 0 (dense) to 1")
        if self.lossless and (self.sparsity or self.sparse_prompt):
            raise ValueError(f"{LOSSLESS_IS_DENSE}: leave sparsity and a sparse prompt out, and give draft_sparsity")
        if self.draft_sparsity is not None and not 0 <= self.draft_sparsity <= 1:
            raise ValueError(f"draft_sparsity {self.draft_sparsity}: expected a fraction from 0 to 1, or None")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed}: expected a whole number of at most 64 bits")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")

    @property
    def reuses(self) -> float:
        """The highest sparsity at which keys and values that it may take from a cache were made."""
        return 0.0 if self.lossless else max(self.sparsity, STEPPED)

    @property
    def dense_tokens(self) -> int:
        """How many of the prompt's first tokens are dense."""
        return 1 if self.sparse_prompt else len(self.prompt)


class Token(NamedTuple):
    """One drawn token.

    logprob: nats, None unless the request asks for it. sparsity: the nominal one at which the step that drew it ran; 0
    for the first, which the prompt's pass gives. finish_reason: None but for the last token: "stop" where it is a stop
    token, which is not part of the text; "length" where no more were asked for or fit. achieved: the share of the
    sparse layers' bytes that this step skipped, a batch's for all its sequences, None where steps do not count it. top:
    id and log-probability of the likeliest tokens.
    """

    id: int
    logprob: float | None
    sparsity: float
    finish_reason: str | None
    achieved: float | None = None
    top: tuple[tuple[int, float], ...] = ()
