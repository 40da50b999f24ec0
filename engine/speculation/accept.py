"""Whether a draft stands, and what stands in its place: the text is the verifier's own in distribution.

Greedy, or with a draft that was not drawn, the verifier draws itself, and the draft stands where it is the same token.
A drawn draft stands with probability min(1, p / q); else a token is drawn from what p has more than q
(arXiv:2302.01318). p and q are what is drawn from, after all filters, and q may be filtered otherwise.
"""

import torch
from torch import Tensor

from teal_fast.engine.sampling import Sampling, draw_index
from teal_fast.engine.speculation.drafters import Draft


def accept(
    sampling: Sampling, logits: Tensor, draft: Draft | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The token in the draft's place, int64 [1], which is the draft if it stands, and the largest logit [1].

    logits [vocab]: the verifier's, adjusted. draft: None for a token behind the last one.
    """
    if draft is None or draft.chances is None or sampling.greedy:
        return sampling.draw(logits, generator)
    p, q, largest = sampling.probabilities(logits), draft.chances, logits.amax(-1, keepdim=True)
    if torch.rand((), generator=generator, device=logits.device) * q[draft.id] < p[draft.id]:
        return torch.tensor([draft.id], device=logits.device), largest
    rest = (p - q).clamp(min=0)
    if rest.sum() == 0:  # p and q are the same up to rounding
        rest = p
    return draw_index(rest, generator), largest
