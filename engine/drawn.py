"""Drawing an answer's tokens, and a drawn token on its way from the device to the host, with its log-probabilities."""

import torch
from torch import Tensor

from teal_fast.engine.adjust import Adjustment
from teal_fast.engine.ranks.launch import LOST_RANK
from teal_fast.engine.ranks.layers import agreed_seed
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import GREEDY, new_generator
from teal_fast.engine.speculation.accept import accept
from teal_fast.engine.speculation.drafters import Draft
from teal_fast.engine.steps import Step
from teal_fast.model import Transformer


class Drawn:
    """Copies that wait for the steps up to this token, not for those enqueued since.

    logits [vocab]: the model's own. largest: of those that it was drawn from, not finite where they hold NaN. Instead
    there may be `told`, token and largest on the host, which the step writes there itself.
    """

    def __init__(
        self,
        request: Request,
        token: Tensor,
        largest: Tensor | None,
        logits: Tensor,
        sparsity: float,
        achieved: float | None = None,
        told: list[Tensor] | None = None,
    ):
        self.sparsity, self.achieved, self.copied = sparsity, achieved, None
        self.token, self.found = token, told or [token, largest]
        if request.logprobs or request.top_logprobs:
            logprobs = logits.float().log_softmax(-1)
            values, ids = logprobs.topk(min(request.top_logprobs, len(logprobs)))
            self.found = [*self.found, logprobs[token], ids, values]
        if token.is_cuda:
            self.found = [_to_host(tensor) if tensor.is_cuda else tensor for tensor in self.found]
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(token.device))

    def wait(self) -> tuple[int, bool, float | None, tuple[tuple[int, float], ...]]:
        """The token's id, whether its logits were sound, its log-probability and the likeliest tokens'."""
        if self.copied is not None:
            self.copied.synchronize()
        token, largest, *more = self.found
        sound = abs(largest.item()) < float("inf")
        if not more:
            return token.item(), sound, None, ()
        logprob, ids, values = more
        return token.item(), sound, logprob.item(), tuple(zip(ids.tolist(), values.tolist(), strict=True))


class Drawing:
    """What draws one answer's tokens: a generator, what changes the logits before, a constraint if there is one.

    step: that computes their logits, and draws them itself if it can and nothing changes the logits. Ranks that share
    the model draw alike.
    """

    def __init__(self, request: Request, model: Transformer, step: Step | None = None):
        device = model.norm.weight.device
        self.request, self.generator = request, new_generator(device, agreed_seed(model, request.seed))
        self.constraint = request.constraint() if request.constraint else None
        self.adjust = Adjustment(request.sampling, request.prompt, model.args.vocab_size, device, self.constraint)
        self.told = self.adjust.idle and request.sampling.greedy  # whether what a step finds is the token
        if hasattr(step, "draw"):
            step.draw(request.sampling if self.adjust.idle else GREEDY, self.generator.initial_seed())
            self.told = self.adjust.idle

    def __call__(
        self,
        logits: Tensor,
        sparsity: float,
        achieved: float | None,
        best: tuple[Tensor, list[Tensor]] | None = None,
        draft: Draft | None = None,
    ) -> Drawn:
        """The next token, from the model's logits [vocab]; best: what the step found, where it tells it."""
        if best is not None and self.told:
            (token, told), largest = best, None
        else:
            (token, largest), told = accept(self.request.sampling, self.adjust(logits), draft, self.generator), None
        self.adjust.add(token)
        drawn = Drawn(self.request, token, largest, logits, sparsity, achieved, told)
        if self.constraint is not None:
            id, sound, *_ = drawn.wait()
            if sound:
                self.constraint.accept(id)
        return drawn


def unsound(tokens: int, lost: bool = False) -> ValueError:
    """The error of logits that are not finite, after so many tokens. lost: since another rank's did not come."""
    if lost:
        return ValueError(LOST_RANK)
    return ValueError(
        f"the logits after {tokens} tokens hold NaN or inf: the checkpoint is damaged, or its values are too large for "
        "fp16 (then use bf16 or fp32)"
    )


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
