"""TODO."""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from teal_fast.calibration.probe import LOGIT_ROWS
from teal_fast.engine.accounting import tally_kept
from teal_fast.files.paths import DATA
from teal_fast.model import Transformer
from teal_fast.sparse_model import Phase
from teal_fast.weights.output import output_weight

DEFAULT_TEXT = DATA / "evaluation"


@dataclass(frozen=True)
class Score:
    """Perplexity over `tokens` scored positions, and what computing it skipped.

    standard_error: of the perplexity, from the spread over windows; None for a single one.
    """

    sparsity: float
    perplexity: float
    standard_error: float | None
    tokens: int
    achieved_sparsity: float
    achieved_by_kind: dict[str, float]
    tokens_per_s: float


def cut_windows(ids: list[int], context: int, stride: int, limit: int | None) -> list[tuple[list[int], int]]:
    """Windows of `context` tokens, `stride` apart, each with its number of leading positions that are not scored.

    The first window scores all but its first position, later ones only what the window before did not reach. `limit`
    keeps that many, spread evenly over the text: neighbours share a topic and say less.
    """
    starts = range(0, len(ids) - context + 1, stride)
    if limit is not None and limit < len(starts):
        starts = [starts[i * len(starts) // limit] for i in range(limit)]
    return [(ids[start : start + context], 1 if start == 0 else max(1, context - stride)) for start in starts]


def window_loss(model: Transformer, output: Tensor, window: list[int], unscored: int, phase: Phase) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [context - unscored], of the window's tokens from `unscored` on."""
    tokens = torch.tensor(window, device=output.device)
    hidden = model.hidden(tokens[None], phase=phase)[0, unscored - 1 : -1]
    pairs = zip(hidden.split(LOGIT_ROWS), tokens[unscored:].split(LOGIT_ROWS), strict=True)
    return torch.cat([F.cross_entropy(F.linear(h.float(), output), target, reduction="none") for h, target in pairs])


@torch.no_grad()
def evaluate(
    model: Transformer, windows: list[tuple[list[int], int]], dense_tokens: int, nominal: float, progress: tqdm
) -> Score:
    """Scores the windows with their first `dense_tokens` tokens computed densely, at the thresholds now set."""
    output = output_weight(model.output)
    started = time.perf_counter()
    losses = []
    with tally_kept(model) as tally:
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
