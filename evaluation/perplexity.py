"""Perplexity of a text at the sparsities of an evaluation.

The text is tokenized whole and cut into windows. The score of a window depends on which of its tokens are sparse, so
that the protocol stands beside every number. Loading models and printing tables are not done here.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from teal_fast.calibration.corpus import as_text
from teal_fast.calibration.probe import LOGIT_ROWS
from teal_fast.engine.accounting import tally_kept
from teal_fast.evaluation.pruning import zeros_by_kind
from teal_fast.evaluation.tasks import PREFILLS
from teal_fast.files.memory import memory_for
from teal_fast.files.paths import DATA
from teal_fast.model import Transformer
from teal_fast.sparse_model import Phase
from teal_fast.weights.output import output_weight

DEFAULT_TEXT = DATA / "evaluation"


@dataclass(frozen=True)
class Score:
    """Perplexity over `tokens` scored positions, and the share of weight bytes that computing it skipped.

    sparsity: nominal; standard_error: of the perplexity, from the spread over windows, None for a single window.
    """

    sparsity: float
    perplexity: float
    standard_error: float | None
    tokens: int
    achieved_sparsity: float
    achieved_by_kind: dict[str, float]
    tokens_per_s: float


def cut_windows(
    ids: list[int], context: int, stride: int, limit: int | None, prefix: Sequence[int]
) -> list[tuple[list[int], int]]:
    """Cuts token ids into windows of `context` tokens, `stride` apart.

    Returns each window with its number of leading positions that are not scored: the first window scores all but its
    first position, a later one only the positions that no earlier window covers. limit: the number of windows to keep,
    spread evenly over the text, because neighbours share a topic. prefix: what each window begins with (`as_text`),
    which is not scored.
    """
    starts = range(0, len(ids) - context + 1, stride)
    if limit is not None and limit < len(starts):
        starts = [starts[i * len(starts) // limit] for i in range(limit)]
    first = max(1, len(prefix))
    return [
        (as_text(ids[start : start + context], prefix), first if start == 0 else max(first, context - stride))
        for start in starts
    ]


def window_loss(model: Transformer, output: Tensor, window: list[int], unscored: int, phase: Phase) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [context - unscored], of the window's tokens from `unscored` on.

    output: the output layer's weight, fp32 [vocab, dim].
    """
    tokens = torch.tensor(window, device=output.device)
    hidden = model.hidden(tokens[None], phase=phase)[0, unscored - 1 : -1]
    pairs = zip(hidden.split(LOGIT_ROWS), tokens[unscored:].split(LOGIT_ROWS), strict=True)
    return torch.cat([F.cross_entropy(model.wide_logits(h, output), target, reduction="none") for h, target in pairs])


@torch.no_grad()
def evaluate(
    model: Transformer, windows: list[tuple[list[int], int]], dense_tokens: int, nominal: float, progress: tqdm
) -> Score:
    """Scores windows (`cut_windows`) at the thresholds that are set, with the first `dense_tokens` of each dense.

    nominal: the sparsity to record. Raises ValueError when the loss is not finite.
    """
    output = output_weight(model.output)
    started = time.perf_counter()
    losses = []
    what, todo = f"windows of {len(windows[0][0])} tokens", "lower --context, or take another --device"
    with memory_for(what, todo), tally_kept(model) as tally:
        for window, unscored in windows:
            losses.append(window_loss(model, output, window, unscored, Phase(dense_tokens)).cpu())
            progress.update(len(window))
    seconds = time.perf_counter() - started
    scored = torch.cat(losses)
    perplexity = scored.mean().exp().item()
    if not math.isfinite(perplexity):
        raise ValueError(f"the loss at sparsity {nominal} is NaN or inf: is the checkpoint sound, is fp16 its type?")
    means = torch.stack([loss.mean() for loss in losses])
    error = perplexity * means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    total = sum(len(window) for window, _ in windows)
    achieved = tally.by_kind(model)
    overall = achieved.pop("all", 0.0)
    return Score(nominal, perplexity, error, len(scored), overall, achieved, total / seconds)


@dataclass(frozen=True)
class WindowProtocol:
    """How a text is scored. stride: None for the context; limit: of windows, None for all; prefill: a key of PREFILLS.

    `cut` raises ValueError when no window fits the model or the text.
    """

    context: int
    stride: int | None = None
    limit: int | None = None
    prefill: str = "full"

    def cut(self, ids: list[int], max_position: int, prefix: Sequence[int]) -> list[tuple[list[int], int]]:
        """The windows of a text's token ids; see `cut_windows`."""
        if not 2 <= self.context <= max_position:
            raise ValueError(f"--context {self.context}: expected 2 to this model's {max_position}")
        if self.stride and self.stride > self.context:
            raise ValueError(f"--stride {self.stride} would skip text: expected at most the context, {self.context}")
        windows = cut_windows(ids, self.context, self.stride or self.context, self.limit, prefix)
        if not windows:
            raise ValueError(
                f"the text has {len(ids)} tokens, fewer than one window of {self.context}: use a smaller --context"
            )
        return windows

    def describe(self, windows: int) -> str:
        """The protocol in words, for a record."""
        stride = self.stride or self.context
        return f"context {self.context}, stride {stride}, {windows} windows, prefill {self.prefill}"


def evaluate_text(
    models: Iterable[tuple[float, Transformer]],
    count: int,
    windows: list[tuple[list[int], int]],
    protocol: WindowProtocol,
    pruned: bool = False,
) -> list[dict]:
    """The fields of a record for each of `count` models with its nominal sparsity: the protocol and a `Score`.

    pruned: achieved sparsities are the shares of zero weights.
    """
    dense_tokens, words = PREFILLS[protocol.prefill](protocol.context), protocol.describe(len(windows))
    records = []
    with tqdm(total=protocol.context * len(windows) * count, desc="evaluating", unit="token") as progress:
        for nominal, model in models:
            score = evaluate(model, windows, dense_tokens, nominal, progress)
            if pruned:
                zeros = zeros_by_kind(model)
                score = replace(score, achieved_sparsity=zeros.pop("all"), achieved_by_kind=zeros)
            records.append({"protocol": words} | asdict(score))
    return records
