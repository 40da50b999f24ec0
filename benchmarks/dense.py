"""The dense baseline: the fused decode step of engine/cuda_step.py with cuBLAS in place of the sparse kernels.

It reads the same [K, N] weights, and pays about five small launches a layer that the sparse kernels' fusions save.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.decode_attention import decode_attention
from teal_fast.kernels.merge_attention import merge_attention
from teal_fast.kernels.norm_compact import norm_compact
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import KEEP_ALL


def cublas_step(model: Transformer, cache: KVCache, token: Tensor, input_pos: Tensor) -> Tensor:
    """`cuda_step.fused_step` at sparsity 0 with dense products; nothing is skipped whatever the thresholds say."""
    args, eps = model.args, model.args.norm_eps
    widest = max(args.dim, args.n_heads * args.head_dim)
    # Not right before the kernel that reads it, which may start before its predecessor's writes can be seen.
    keep = torch.full((widest,), KEEP_ALL, device=token.device)
    residual = model.tok_embeddings(token)[0, 0].float()
    update = None
    for number, (layer, window) in enumerate(zip(model.layers, args.sliding_windows, strict=True)):
        attention, ffn, k_cache, v_cache = layer.attention, layer.feed_forward, cache.k[number], cache.v[number]
        residual, x = norm_compact(residual, update, layer.attention_norm.weight, keep[: args.dim], eps)
        qkv = F.linear(x.value, attention.wqkv.weight.packed.t(), attention.wqkv.bias)[0].float()
        turn = cache.frequencies[0]
        shares = decode_attention(qkv, turn, k_cache[0], v_cache[0], input_pos, args.n_heads, window or 0)
        y = merge_attention(*shares, keep[: args.n_heads * args.head_dim], k_cache.dtype)
        update = F.linear(y.value.view(1, -1), attention.wo.weight.packed.t())[0].float()
        residual, x = norm_compact(residual, update, layer.ffn_norm.weight, keep[: args.dim], eps)
        gate, up = F.linear(x.value, ffn.w13.weight.packed.t()).chunk(2, dim=-1)
        update = F.linear(F.silu(gate) * up, ffn.w2.weight.packed.t())[0].float()
    _, x = norm_compact(residual, update, model.norm.weight, keep[: args.dim], eps)
    return model.output(x.value)[0]
