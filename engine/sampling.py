"""Drawing the next token from logits: temperature, top-k, top-p, min-p."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; filters apply in the order of the fields. temperature 0 is greedy."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: expected a number of at least 0 (0: greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: expected at least 1, or None for all tokens")
        for name in ("top_p", "min_p"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: expected a number from 0 to 1, or None")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """One token id, int64 [1], from logits [vocab]."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits = logits.float() / self.temperature
        candidates = None  # token ids of the logits left; drawing among a few costs a tenth of drawing among all
        if self.top_k is not None or self.top_p is not None:
            most = logits.numel() if self.top_k is None else min(self.top_k, logits.numel())
            logits, candidates = logits.topk(most)
        if self.top_p is not None:
            shares = logits.softmax(-1)
            # A token goes when those before it already reach top_p: the first always stays.
            gone = shares.cumsum(-1) - shares >= self.top_p
            gone[0] = False
            logits = logits.masked_fill(gone, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.min_p is not None:
            probabilities = probabilities.masked_fill(probabilities < self.min_p * probabilities.max(), 0)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return drawn if candidates is None else candidates[drawn]
