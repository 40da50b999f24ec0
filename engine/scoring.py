"""Log-probabilities of a text's own tokens, as evaluations have them: from logits in fp32."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import Phase
from teal_fast.weights.output import output_weight


class Scored(NamedTuple):
    """One token of a text. logprob: nats; top: id and log-probability of the likeliest tokens in its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def parts(begin: int, end: int, most: int | None) -> Iterator[tuple[int, int]]:
    """Cuts positions [begin, end) into as few parts of at most `most` as it takes, all of nearly one length."""
    count = 1 if most is None else -(-(end - begin) // most)
    cuts = [begin + (end - begin) * i // count for i in range(count + 1)]
    return pairwise(cuts)


def score(
    model: Transformer,
    cache: KVCache,
    text: Sequence[int],
    dense_tokens: int,
    top: int,
    chunk: int | None,
    done: Callable[[int], None],
) -> list[Scored]:
    """All tokens of the text but the first; its keys and values fill the cache from its start.

    dense_tokens: how many of the first are dense. done: called with the number of tokens that the cache holds by then.
    """
    output, device, found = output_weight(model.output), model.norm.weight.device, []
    model.stretch(cache, len(text))
    for begin, end in parts(0, len(text), chunk):
        tokens, positions = torch.tensor([text[begin:end]], device=device), torch.arange(begin, end, device=device)
        phase = Phase(max(0, dense_tokens - begin))
        over = (positions, cache.head(end)) if begin else (None, cache)
        hidden = model.hidden(tokens, *over, phase)[0]
        nexts = text[begin + 1 : end + 1]
        found += _scored(model.wide_logits(hidden[: len(nexts)], output).log_softmax(-1), nexts, top)
        done(end)
    return found


def _scored(logprobs: Tensor, ids: Sequence[int], top: int) -> list[Scored]:
    """logprobs [T, vocab] of what comes after each of T tokens, which the ids are."""
    own = logprobs.gather(1, torch.tensor(ids, device=logprobs.device, dtype=torch.int64)[:, None])[:, 0].tolist()
    values, likeliest = logprobs.topk(min(top, logprobs.shape[1]))
    tops = (tuple(zip(*pair, strict=True)) for pair in zip(likeliest.tolist(), values.tolist(), strict=True))
    return [Scored(*found) for found in zip(ids, own, tops, strict=True)]
