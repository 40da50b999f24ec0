"""A drawn token on its way from the device to the host, with its log-probabilities if they are wanted."""

import torch
from torch import Tensor

from teal_fast.engine.request import Request


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


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
