"""The step in three stages in plain PyTorch: what its kernels compute, in fp32 and fp64, rounded where they round."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.engine.grids import Grids
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import SparseLinear
from teal_fast.weights.output import output_weight


def on_grid(x: Tensor, constant: Tensor) -> Tensor:
    return (x + constant) - constant


@torch.no_grad()
def staged_reference(
    model: Transformer, cache: KVCache, grids: list[Grids], token: int, position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits fp32 [vocab], the residual after the last attention, the last update; the cache's row is written."""
    args, dtype = model.args, model.norm.weight.dtype
    residual, update = model.tok_embeddings.weight[token].float(), 0
    for number, (layer, grid, window) in enumerate(zip(model.layers, grids, args.sliding_windows, strict=True)):
        attention, ffn = layer.attention, layer.feed_forward
        residual = residual + update
        qkv = on_grid(product(attention.wqkv, norm(residual, layer.attention_norm, dtype)), grid.qkv)
        if attention.wqkv.bias is not None:
            qkv = qkv + attention.wqkv.bias.float()
        y = attend(attention, qkv, model, cache.k[number][0], cache.v[number][0], position, window).to(dtype)
        residual = residual + on_grid(biased(attention.wo, y), grid.o)
        gate, up = biased(ffn.w13, norm(residual, layer.ffn_norm, dtype)).chunk(2)
        update = on_grid(biased(ffn.w2, (F.silu(gate) * up).to(dtype)), grid.down)
    x = norm(residual + update, model.norm, dtype)
    return (output_weight(model.output).double() @ x.double()).float(), residual, update


def norm(x: Tensor, module: torch.nn.RMSNorm, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, x.shape, module.weight.float(), module.eps).to(dtype)


def product(layer: SparseLinear, x: Tensor) -> Tensor:
    kept = x.masked_fill(layer.dropped(x), 0).double()
    operand = layer.weight.operand
    y = kept @ operand.values().double()
    return (y if operand.scale is None else y * operand.scale).float()


def biased(layer: SparseLinear, x: Tensor) -> Tensor:
    return product(layer, x) if layer.bias is None else product(layer, x) + layer.bias.float()


def attend(attention, qkv: Tensor, model: Transformer, keys: Tensor, values: Tensor, position: int, window) -> Tensor:
    args, dtype = model.args, keys.dtype
    heads, kv_heads, D = args.n_heads, args.n_kv_heads, args.head_dim
    q, k, v = qkv.view(-1, D).split([heads, kv_heads, kv_heads])
    if args.qk_norm:
        q, k = (
            F.rms_norm(x, (D,), module.weight.float(), module.eps)
            for x, module in ((q, attention.q_norm), (k, attention.k_norm))
        )
    cos, sin = (position * model.frequencies[0]).cos(), (position * model.frequencies[0]).sin()
    q, k = (
        torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
        for low, high in (x.chunk(2, dim=-1) for x in (q, k))
    )
    q = (q / math.sqrt(D)).to(dtype).double()
    keys[:, position], values[:, position] = k.to(dtype), v.to(dtype)
    begin = max(0, position + 1 - window) if window else 0
    seen = slice(begin, position + 1)
    scores = q.view(kv_heads, -1, D) @ keys[:, seen].double().transpose(1, 2)
    return (scores.softmax(-1) @ values[:, seen].double()).view(-1).float()
