"""Drawing the next token from logits: temperature, top-k, top-p, min-p, in this order, as transformers 5.23 does.

Before that come biases, penalties and constraints (adjust.py). docs/usage.md says what order other engines have.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny  # by less than this normal number logits can't be divided


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; filters apply in the order of the fields up to min_p.

    temperature 0 is greedy, and so is one below fp32's smallest normal number. top_k 0, top_p 1 and min_p 0 switch a
    filter off, as None does.
    repetition_penalty: divides the positive logits of tokens that stand in prompt or answer, and multiplies the
    negative ones (arXiv:1909.05858, section 4.1); 1 is none. presence_penalty, frequency_penalty: taken from the logits
    of tokens that stand in the answer, once and once for each time, as OpenAI's API has it; 0 is none. logit_bias:
    added to the logits of these ids.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: expected a number of at least 0 (0: greedy)")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise ValueError(f"top_k {self.top_k}: expected a whole number of at least 0 (0 or None: all tokens)")
        for name, off in (("top_p", 1), ("min_p", 0)):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: expected a number from 0 to 1 ({off} or None: off)")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty {self.repetition_penalty}: expected a number above 0 (1: off)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} {value}: expected a finite number (0: off)")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is drawn."""
        return self.temperature < SMALLEST

    def draw(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One token id, int64 [1], from logits [vocab], and the largest logit [1].

        If that is not finite, logits hold NaN or inf, and the token is any: who reads it on the host is to check. Here
        a GPU would be waited for.
        """
        if self.greedy:
            largest, token = logits.max(-1, keepdim=True)
            return token, largest
        probabilities, candidates, largest = self._filtered(logits)
        token = draw_index(probabilities, generator)
        return (token if candidates is None else candidates[token]), largest

    def probabilities(self, logits: Tensor) -> Tensor:
        """With which probability `draw` draws each token: [vocab] fp32, of logits [vocab]. Not of greedy sampling."""
        probabilities, candidates, _ = self._filtered(logits)
        return _of_all(probabilities, candidates, logits)

    def draw_known(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A token id, int64 [1], and the `probabilities` that it was drawn from."""
        probabilities, candidates, _ = self._filtered(logits)
        token = draw_index(probabilities, generator)
        return (token if candidates is None else candidates[token]), _of_all(probabilities, candidates, logits)

    def _filtered(self, logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weights of some candidates; their ids, None for all tokens in order; the largest logit [1]."""
        top_p = None if self.top_p == 1 else self.top_p
        candidates = None  # token ids of the logits left; drawing among a few costs a tenth of drawing among all
        if self.top_k or top_p is not None:
            logits, candidates = logits.topk(min(self.top_k or logits.numel(), logits.numel()))
        largest = logits.amax(-1, keepdim=True) if candidates is None else logits[:1]
        # At most 0, so that no temperature makes it overflow.
        logits = (logits.float() - largest.float()) / self.temperature
        if top_p is not None:
            shares = logits.softmax(-1)
            # A token goes when those before it already reach top_p: the first always stays.
            gone = shares.cumsum(-1) - shares >= top_p
            gone[0] = False
            logits = logits.masked_fill(gone, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.min_p:
            probabilities = probabilities.masked_fill(probabilities < self.min_p * probabilities.max(), 0)
        return probabilities, candidates, largest


GREEDY = Sampling(0.0)


def draw_index(weights: Tensor, generator: torch.Generator) -> Tensor:
    """An index, int64 [1], drawn in proportion to weights [n], which need not add up to 1."""
    # As torch.multinomial draws one, which on CUDA also asserts that there is no NaN: that would end the process.
    return (weights / torch.empty_like(weights).exponential_(1, generator=generator)).argmax(-1, True)


def _of_all(probabilities: Tensor, candidates: Tensor | None, logits: Tensor) -> Tensor:
    probabilities = probabilities / probabilities.sum()  # min-p took some away
    if candidates is None:
        return probabilities
    return probabilities.new_zeros(logits.shape).scatter_(0, candidates, probabilities)


def new_generator(device: torch.device, seed: int | None) -> torch.Generator:
    """Where draws come from; None is a seed that nobody knows."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
