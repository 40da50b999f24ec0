"""A decode step bound to its model and cache: step(token [1, 1], position [1]) -> logits [vocab].

There are four: plain PyTorch, C++ on the CPU (cpu_step.py), and two CUDA graphs, of three launches a layer in CUDA C++
on Hopper and later (staged_step.py), else of Triton's fused kernels (cuda_step.py). All but the first return the same
tensor each time. A GGUF file's own values are decoded by the first two alone.
"""

import sys
from typing import Protocol

from torch import Tensor

from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.cuda_step import CapturedStep, plain_step
from teal_fast.engine.ranks.layers import ranks_of
from teal_fast.engine.staged_step import staged_step
from teal_fast.kernels.native import library
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import format_of
from teal_fast.weights.blocks import in_blocks


class Step(Protocol):
    # `achieved`, where a step has it, is the share of the sparse layers' bytes that the last call skipped;
    # `dense(tokens, position, wanted)` computes several tokens at once (cpu_step.py); `best` is the next token, int64
    # [1], and what the host is told of it: the likeliest, unless `draw` says how it is drawn (staged_step.py). The
    # position may be on the host.
    mode: str  # how it runs, as a benchmark record says it: plain, compiled, captured

    def __call__(self, token: Tensor, input_pos: Tensor) -> Tensor: ...


class PlainStep:
    """The decode step by the model itself, on any device."""

    mode = "plain"

    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache = model, cache

    def __call__(self, token: Tensor, input_pos: Tensor) -> Tensor:
        return plain_step(self.model, self.cache, token, input_pos.to(token.device, non_blocking=True))


def fast_step(model: Transformer, cache: KVCache) -> Step:
    """The fastest step for the model's device: captured on CUDA, in C++ on the CPU.

    It is plain where C++ can't be built, as kernels/native.py says in a line, of weights in blocks on CUDA, and of a
    model that ranks share where the step in three stages does not serve it.
    """
    if ranks_of(model) is not None:
        if model.norm.weight.is_cuda and not in_blocks(model):
            return staged_step(model, cache) or PlainStep(model, cache)
        print("a model that ranks share is decoded in plain PyTorch here", file=sys.stderr)
        return PlainStep(model, cache)
    if not model.norm.weight.is_cuda:
        return PlainStep(model, cache) if library() is None else CpuStep(model, cache)
    if not in_blocks(model):
        return staged_step(model, cache) or CapturedStep(model, cache)
    print(f"{format_of(model)} has no fast step on CUDA: decoding in plain PyTorch, many times slower", file=sys.stderr)
    return PlainStep(model, cache)
