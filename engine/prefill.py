"""The prompt's pass through the model, which fills the cache; dense unless it is asked to be sparse."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import DENSE, Phase
from teal_fast.weights.product import product_dtype

# Shorter prompts are padded, so that products do not depend on the number of threads. MKL's in fp32 of 5 to 11 rows do.
# oneDNN's in bf16 do for no number of rows: 1 to 64 and 100 to 500 have the same bits with 1 to 4 threads for 17 shapes
# from 65x1 to 4096x4096, 22 numbers of rows with up to 48 threads for 12 shapes (torch 2.13, AVX-512, no AMX). A row's
# bits are those it has among 500 others, but for some shapes when it is alone.
FEWEST_ROWS = 12
FEWEST_BF16_ROWS = 2
PromptLogits = Callable[[Transformer, KVCache, Tensor, Tensor | None, Tensor, Phase], Tensor]
Prefill = Callable[[Transformer, KVCache, Tensor, int, Phase], Tensor]


def prompt_logits(
    model: Transformer, cache: KVCache, tokens: Tensor, input_pos: Tensor | None, last: Tensor, phase: Phase
) -> Tensor:
    """Fills the cache with tokens [1, T]; logits [n, vocab] after their numbers `last` [n]. See Transformer.hidden."""
    return model.output(model.hidden(tokens, input_pos, cache, phase)[0, last])


def fewest_rows(model: Transformer) -> int:
    """The rows that a prompt is padded to."""
    weight = model.norm.weight
    in_bf16 = weight.device.type == "cpu" and product_dtype(weight) == torch.bfloat16
    return FEWEST_BF16_ROWS if in_bf16 else FEWEST_ROWS


def prefill(
    model: Transformer,
    cache: KVCache,
    tokens: Tensor,
    start: int = 0,
    phase: Phase = DENSE,
    compute: PromptLogits = prompt_logits,
) -> Tensor:
    """Logits [vocab] after tokens [1, T] at positions from `start` on, whose keys and values fill the cache.

    Earlier positions must be filled. The cache's rows behind padded tokens are written again before they are read.
    phase: which of the tokens are dense.
    """
    count = tokens.shape[1]
    padding = max(0, min(fewest_rows(model), cache.length - start) - count)
    padded, end = F.pad(tokens, (0, padding)), start + count + padding
    input_pos = torch.arange(start, end, device=tokens.device) if start else None
    last = torch.tensor([count - 1], device=tokens.device)
    return compute(model, cache.head(end) if start else cache, padded, input_pos, last, phase)[0]


def compiled_prefill() -> Prefill:
    """`prefill`, compiled on first use: once for prompts from their start, once for such as continue a cache."""
    return functools.partial(prefill, compute=torch.compile(prompt_logits, dynamic=True, fullgraph=True))
