"""The decode step on CUDA: fused sparse kernels, recorded once as a CUDA graph and replayed for every token.

The graph serves every prompt length, position and sparsity: position and thresholds are tensors that change in place
between replays. A layer is eight launches: norm and compaction, q/k/v, attention, its merge, o, norm and compaction,
gate/up, down. The residual stream stays in fp32.
"""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from teal_fast.kernels.decode_attention import GROUP, decode_attention
from teal_fast.kernels.merge_attention import merge_attention
from teal_fast.kernels.norm_compact import norm_compact
from teal_fast.kernels.semaphore import new_semaphores
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import DECODE, KEEP_ALL, sparse_layers

SERVED = ("ropes", "embedding_scale")  # of what ModelArgs.beyond_llama knows
Made = TypeVar("Made")
Compute = Callable[
    [Transformer, KVCache, Tensor, Tensor], Tensor
]  # model, cache, token [1, 1], input_pos [1] -> logits


def can_fuse(model: Transformer) -> bool:
    """Whether `fused_step` computes this model: a Llama's layers without other biases than q/k/v's, and fit heads."""
    args = model.args
    biased = any(layer.bias is not None for name, layer in sparse_layers(model).items() if not name.endswith("wqkv"))
    whole = args.head_dim >= 32 and args.head_dim & (args.head_dim - 1) == 0
    return whole and not biased and not args.beyond_llama(*SERVED) and args.n_heads // args.n_kv_heads <= GROUP


def fused_step(model: Transformer, cache: KVCache, token: Tensor, input_pos: Tensor) -> Tensor:
    """Logits [vocab] after token [1, 1] at input_pos [1] by the fused kernels; the plain step's up to rounding."""
    eps = model.args.norm_eps
    keep_all = model.norm.weight.new_full(model.norm.weight.shape, KEEP_ALL, dtype=torch.float32)
    residual = model.embed(token)[0, 0].float()
    update = None
    semaphores = new_semaphores(
        max(layer.weight.out_features for layer in sparse_layers(model).values()), residual.device
    )
    for number, (layer, window) in enumerate(zip(model.layers, model.args.sliding_windows, strict=True)):
        attention, ffn, k_cache, v_cache = layer.attention, layer.feed_forward, cache.k[number], cache.v[number]
        wqkv, wo, w13, w2 = attention.wqkv, attention.wo, ffn.w13, ffn.w2
        residual, x = norm_compact(residual, update, layer.attention_norm.weight, wqkv.threshold, eps)
        qkv = wqkv.weight.compact_matvec(x, semaphores)
        if wqkv.bias is not None:
            qkv += wqkv.bias
        shares = decode_attention(
            qkv,
            cache.frequencies[model.args.rope_of[number]],
            k_cache[0],
            v_cache[0],
            input_pos,
            model.args.n_heads,
            window or 0,
        )
        x = merge_attention(*shares, wo.threshold, k_cache.dtype)
        update = wo.weight.compact_matvec(x, semaphores)
        residual, x = norm_compact(residual, update, layer.ffn_norm.weight, w13.threshold, eps)
        x = w13.weight.compact_gate_up(x, w2.threshold, semaphores)
        update = w2.weight.compact_matvec(x, semaphores)
    _, x = norm_compact(residual, update, model.norm.weight, keep_all, eps)  # the whole vector as a list
    return model.output(x.value)[0]


def plain_step(model: Transformer, cache: KVCache, token: Tensor, input_pos: Tensor) -> Tensor:
    """Logits [vocab] after token [1, 1] at input_pos [1], computed sparsely by the model itself."""
    return model(token, input_pos, cache, DECODE)[0, -1]


def capture(compute: Callable[[], Made], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Made]:
    """What `compute` does as a graph, and what it returned, which each replay fills. Run once before, it compiles."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device):
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph):
            found = compute()
    return graph, found


class CapturedStep:
    """A decode step over one model and one cache, recorded once as a CUDA graph; each replay fills the same logits."""

    mode = "captured"

    @torch.no_grad()
    def __init__(self, model: Transformer, cache: KVCache, compute: Compute | None = None):
        """`compute` None: the fastest that serves this model."""
        started = time.perf_counter()
        fused = compute is None and can_fuse(model)
        what = model.args.beyond_llama(*SERVED) or "biases or heads"
        note = "" if fused or compute else f", in plain PyTorch: no fused kernels serve this model's {what}"
        compute = compute or (fused_step if fused else plain_step)
        device = model.norm.weight.device
        self.cache = cache  # the graph knows its addresses alone
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.input_pos = torch.zeros(1, dtype=torch.long, device=device)
        # The cache's first row is written and means nothing yet.
        self.graph, self.logits = capture(lambda: compute(model, cache, self.token, self.input_pos), device)
        print(f"captured in {time.perf_counter() - started:.1f} s{note}", file=sys.stderr)

    def __call__(self, token: Tensor, input_pos: Tensor) -> Tensor:
        self.token.copy_(token)
        if input_pos.is_cuda:
            self.input_pos.copy_(input_pos)
        else:
            self.input_pos.fill_(int(input_pos))  # a copy from the host would be waited for
        self.graph.replay()
        return self.logits
