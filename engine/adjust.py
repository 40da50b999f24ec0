"""What changes logits before a token is drawn: a bias, penalties on what was said, a constraint; in this order."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from teal_fast.engine.request import Constraint
from teal_fast.engine.sampling import Sampling


class Adjustment:
    """Biases and penalties of one answer; what was said is counted on the device, so that no step waits for the host.

    A constraint does wait: what may come next depends on the token before.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device,
        constraint: Constraint | None = None,
    ):
        self.sampling, self.constraint = sampling, constraint
        ids, biases = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else ((), ())
        self.biased = torch.tensor(ids, dtype=torch.int64, device=device)
        self.bias = torch.tensor(biases, dtype=torch.float32, device=device)
        self.seen = self.times = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.times = torch.zeros(vocab_size, device=device)

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return not self.biased.numel() and self.seen is None and self.times is None and self.constraint is None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [vocab], themselves where there is nothing to change, else others in fp32."""
        sampling = self.sampling
        if self.biased.numel():
            logits = logits.float().index_add(0, self.biased, self.bias)
        if self.seen is not None:
            logits = logits.float()
            penalty = sampling.repetition_penalty
            logits = torch.where(self.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.times is not None:
            said = (self.times > 0) * sampling.presence_penalty + self.times * sampling.frequency_penalty
            logits = logits.float() - said
        if self.constraint is not None:
            logits = logits.masked_fill(self.constraint.mask().to(logits.device).logical_not(), -torch.inf)
        return logits

    def fork(self) -> "Adjustment":
        """Another one that goes on from here by itself, for tokens that are not certain."""
        other = copy.copy(self)
        other.constraint = None if self.constraint is None else self.constraint.fork()
        other.seen = None if self.seen is None else self.seen.clone()
        other.times = None if self.times is None else self.times.clone()
        return other

    def add(self, token: Tensor) -> None:
        """Takes note of a drawn token, int64 [1]; a constraint is told on the host, by its id."""
        if self.seen is not None:
            self.seen[token] = True
        if self.times is not None:
            self.times[token] += 1
