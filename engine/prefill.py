"""The prompt's pass through the model, which fills the cache; dense unless it is asked to be sparse.

PyTorch computes it, or the CPU's step, several tokens at once, where that is faster: of weights in blocks, whose whole
numbers PyTorch would have to turn into floats for each prompt, and of few tokens, whose products are bound by reading.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.engine.scoring import parts
from teal_fast.engine.steps import Step
from teal_fast.kernels.native import instruction_set
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import DENSE, Phase
from teal_fast.weights.blocks import in_blocks
from teal_fast.weights.product import product_dtype

# Shorter prompts are padded, so that products do not depend on the number of threads. MKL's in fp32 of 5 to 11 rows do.
# oneDNN's in bf16 do for no number of rows: 1 to 64 and 100 to 500 have the same bits with 1 to 4 threads for 17 shapes
# from 65x1 to 4096x4096, 22 numbers of rows with up to 48 threads for 12 shapes (torch 2.13, AVX-512 without AMX). A
# row's bits are those it has among 500 others, but for some shapes when it is alone. With AMX the bits of 2 to 500 rows
# do depend on the number of threads (findings/onednn-amx-threads.sh); without it 500 rows take eight times as long.
FEWEST_ROWS = 12
FEWEST_BF16_ROWS = 2
# The longest prompts that are read by steps. Zen 3 (AVX2, no bf16 products), one thread, a machine with other work.
# Qwen2.5-Coder-1.5B in Q4_K_M: 2, 4, 8, 12, 16, 100 and 500 tokens take 0.20, 0.27, 0.49, 0.67, 0.84, 4.8 and 26.8 s of
# CPU time, by PyTorch 4.1, 4.0, 4.3, 4.4, 4.2, 7.5 and 35; one decoded token takes 0.14. Four layers of its shapes, 16
# and 64 tokens, seconds by steps and by PyTorch: fp32 0.61 / 0.81, 1.79 / 1.66; fp16 0.36 / 0.97, 1.17 / 1.63; bf16
# 0.27 / 0.74, 1.05 / 1.44; int8 0.66 / 1.99, 1.07 / 0.88; int4 0.21 / 0.90, 0.79 / 1.14. The demo in bf16, 16, 100 and
# 500 tokens: 0.12 / 0.33, 0.59 / 0.69, 3.83 / 3.36. With bf16 products nothing was measured: 16 tokens of a 1.5B model
# then cost PyTorch four decoded ones (docs/cpu_log.md), and steps about as much by the number of their multiplications.
LONGEST_BY_STEPS_IN_BLOCKS = sys.maxsize
# With bf16 products, the same file, 2 threads, seconds by steps and by PyTorch. Zen 5, 32, 64, 100, 160, 250 and 500
# tokens: 0.25 / 0.54, 0.46 / 0.63, 0.79 / 0.79, 1.19 / 1.02, 1.87 / 1.37, 3.78 / 2.46. Xeon with AMX, 32, 64, 100 and
# 500: 0.27 / 0.86, 0.45 / 1.3, 0.86 / 1.4, 5.5 / 2.1.
LONGEST_BY_STEPS_IN_BLOCKS_BF16 = 128
# Tokens of such a prompt that PyTorch reads at once: 2,000 take 10.8 s as a whole, 11.7 by 512, 11.8 by 256 and 16.0 by
# 128 (Zen 5), and the memory for what lies between two layers grows with them.
PIECE_IN_BLOCKS = 512
LONGEST_BY_STEPS = 48  # where PyTorch computes in fp32, widening what is not
LONGEST_BY_STEPS_BF16 = 16  # where it has bf16 products
PromptLogits = Callable[[Transformer, KVCache, Tensor, Tensor | None, Tensor, Phase], Tensor]
Prefill = Callable[[Transformer, KVCache, Tensor, int, Phase], Tensor]


def prompt_logits(
    model: Transformer, cache: KVCache, tokens: Tensor, input_pos: Tensor | None, last: Tensor, phase: Phase
) -> Tensor:
    """Fills the cache with tokens [1, T]; logits [n, vocab] after their numbers `last` [n]. See Transformer.hidden."""
    return model.logits(model.hidden(tokens, input_pos, cache, phase)[0, last])


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


@contextmanager
def heard(model: Transformer, between: Callable[[], None] | None) -> Iterator[None]:
    """In the block, `between` is called before each layer of a pass."""
    hooks = [layer.register_forward_pre_hook(lambda *_: between()) for layer in model.layers if between]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def longest_by_steps(model: Transformer, step: Step) -> int:
    """The most tokens of a dense prompt that are read by `prefill_by_steps`; 0 for a step that takes no several."""
    if not hasattr(step, "dense"):
        return 0
    in_bf16 = fewest_rows(model) == FEWEST_BF16_ROWS
    if in_blocks(model):
        return LONGEST_BY_STEPS_IN_BLOCKS_BF16 if in_bf16 else LONGEST_BY_STEPS_IN_BLOCKS
    return LONGEST_BY_STEPS_BF16 if in_bf16 else LONGEST_BY_STEPS


def longest_piece(model: Transformer, chunk: int | None) -> int | None:
    """The most tokens of a prompt that are computed at once, `chunk` or fewer; None for all."""
    return min(chunk or PIECE_IN_BLOCKS, PIECE_IN_BLOCKS) if in_blocks(model) else chunk


def tokens_at_once() -> int:
    """Tokens of a call of the step. More than MOST_TOKENS of csrc/rows.h pay where tiles are multiplied alone.

    Elsewhere the weights are read again for each so many, and what lies between two products leaves the caches. On a
    Xeon with AMX 500 tokens of Qwen2.5-Coder-1.5B in Q4_K_M took 4.3, 3.6 and 3.4 s by 32, 64 and 128; a call of 64 is
    short enough for a request to be ended between two.
    """
    return 64 if instruction_set() == "amx" else 16


def prefill_by_steps(
    step: Step, tokens: Sequence[int], start: int = 0, between: Callable[[], None] | None = None
) -> Tensor:
    """Logits [vocab] after tokens at positions from `start` on, with the bits of dense steps, one after another.

    between: called before each call of the step; what it raises ends the pass.
    """
    for begin, end in parts(0, len(tokens), tokens_at_once()):
        if between:
            between()
        logits = step.dense(tokens[begin:end], start + begin, 1 if end == len(tokens) else 0)
    return logits[0]


def again(
    prefill: Prefill, model: Transformer, cache: KVCache, text: Sequence[int], dense: int, chunk: int | None
) -> Tensor:
    """Logits [vocab] after a text whose keys and values are all made again; its first tokens are dense, so many.

    As transformers 5.23's generate does where a text outgrows what longrope's short factors are for.
    """
    for begin, end in parts(0, len(text), chunk):
        tokens = torch.tensor([text[begin:end]], device=model.norm.weight.device)
        logits = prefill(model, cache, tokens, begin, Phase(max(0, dense - begin)))
    return logits


def compiled_prefill() -> Prefill:
    """`prefill`, compiled on first use: once for prompts from their start, once for such as continue a cache."""
    return functools.partial(prefill, compute=torch.compile(prompt_logits, dynamic=True, fullgraph=True))
