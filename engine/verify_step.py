"""The dense pass over a few tokens on CUDA, in a graph: what verifies drafts (engine/speculation/lossless.py).

It always computes TOKENS tokens. Fewer are followed by copies of the last one at its own position, which write the same
keys and values again. So the shapes of all products, and with them the order of their sums, never change, and a token
has the bits of a pass of its own: neither its row nor what others hold matters (tests/engine/test_verify_step.py).

A layer is nine launches: norm, q/k/v, attention, its merge, o, norm, gate/up, SiLU, down. Each lets the next start at
once: the first weights of a product come while small launches run.
"""

import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from teal_fast.engine.cache import first_row_kept
from teal_fast.engine.cuda_step import capture
from teal_fast.engine.scoring import parts
from teal_fast.kernels.add_norm import add_norm
from teal_fast.kernels.few_token_gemm import few_token_gemm
from teal_fast.kernels.merge_spans import merge_spans
from teal_fast.kernels.output_gemm import output_gemm
from teal_fast.kernels.silu_mul import silu_mul
from teal_fast.kernels.verify_attention import verify_attention
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import SparseLinear
from teal_fast.weights.blocks import in_blocks
from teal_fast.weights.output import operand_of

TOKENS = 8  # of a pass
SERVED = ("ropes", "sizes", "embedding_scale", "qk_norm")  # of what ModelArgs.beyond_llama knows


def check_verifiable(model: Transformer) -> None:
    """Raises ValueError saying what of a model the pass does not compute."""
    args, dtype = model.args, model.norm.weight.dtype
    what = args.beyond_llama(*SERVED)
    if in_blocks(model):
        what = "weights in blocks"
    elif dtype not in (torch.bfloat16, torch.float16) or model.tok_embeddings.weight.dtype != dtype:
        what = "fp32"
    elif args.head_dim < 32 or args.head_dim & (args.head_dim - 1) or args.n_heads // args.n_kv_heads > 16:
        what = f"heads of {args.head_dim}, {args.n_heads // args.n_kv_heads} to a key/value head"
    if what:
        raise ValueError(f"lossless on CUDA does not serve {what}: leave it out, or take --device cpu")


def product(layer: SparseLinear, x: Tensor) -> Tensor:
    """y [T, N] of x [T, K] by every channel, in x's dtype."""
    return few_token_gemm(x, layer.weight.operand, layer.bias)


def dense_tokens(model: Transformer, cache: KVCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [TOKENS, vocab] fp32 of tokens [TOKENS] at positions [TOKENS], both int64, on CUDA or interpreted.

    Their keys and values are written. Positions before them must be filled.
    """
    args, dtype = model.args, model.norm.weight.dtype
    turns = []
    for frequencies, sizes in zip(cache.frequencies, model.rope_sizes, strict=True):
        angles = positions[:, None].float() * frequencies
        turns.append(torch.stack((angles.cos(), angles.sin())) * sizes)
    residual, update = model.embed(tokens).float(), None
    for number, (layer, window) in enumerate(zip(model.layers, args.sliding_windows, strict=True)):
        attention, ffn = layer.attention, layer.feed_forward
        residual, x = add_norm(residual, update, layer.attention_norm.weight, args.norm_eps)
        sums = verify_attention(
            product(attention.wqkv, x), turns[args.rope_of[number]], positions, cache.k[number][0], cache.v[number][0],
            getattr(attention.q_norm, "weight", None), getattr(attention.k_norm, "weight", None), args.n_heads,
            window or 0, args.norm_eps,
        )  # fmt: skip
        update = product(attention.wo, merge_spans(*sums, positions, window or 0, dtype))
        residual, x = add_norm(residual, update, layer.ffn_norm.weight, args.norm_eps)
        update = product(ffn.w2, silu_mul(product(ffn.w13, x)))
    _, x = add_norm(residual, update, model.norm.weight, args.norm_eps)
    output = operand_of(model.output)
    return output_gemm(x, output.packed, output.scale)


class VerifyStep:
    """The pass over one model and one cache as a CUDA graph. Each call fills the same tensors."""

    most = TOKENS  # tokens whose logits a call can give

    @torch.no_grad()
    def __init__(self, model: Transformer, cache: KVCache):
        started = time.perf_counter()
        device = model.norm.weight.device
        self.cache, self.length = cache, cache.length
        self.inputs = torch.zeros(2, TOKENS, dtype=torch.int64, device=device)

        def compute() -> tuple[Tensor, Tensor]:
            logits = dense_tokens(model, cache, *self.inputs)
            largest, best = logits.max(-1)
            return logits, torch.stack((self.inputs[0], best, largest.double().view(torch.int64)))

        with first_row_kept(cache):
            self.graph, (self.logits, self.found) = capture(compute, device)
        print(f"captured in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    def dense(self, tokens: Sequence[int | Tensor], position: int, wanted: int = 1) -> Tensor:
        """Logits [wanted, vocab] fp32 after the last ones of tokens at consecutive positions from `position` on.

        tokens: ids, or tensors int64 [1] of the device, which the host then need not know. Logits, keys and values have
        the bits of passes over one token after another. Earlier positions must be filled. The result holds until the
        next call; more than TOKENS logits can't be had. Raises ValueError on these and outside the cache.
        """
        if not 0 <= wanted <= min(TOKENS, len(tokens)) or not 0 <= position <= self.length - len(tokens):
            found = f"{wanted} logits, {len(tokens)} tokens from {position} on"
            raise ValueError(f"a pass takes up to {TOKENS} logits and {self.length} positions, got {found}")
        last = min(TOKENS, len(tokens))
        rest = parts(0, len(tokens) - last, TOKENS) if len(tokens) > last else ()
        for begin, end in (*rest, (len(tokens) - last, len(tokens))):
            self._pass(tokens[begin:end], position + begin)
        return self.logits[last - wanted : last]

    def read(self) -> tuple[list[int], list[tuple[Tensor, list[Tensor]]]]:
        """What the last call, which is waited for, computed from and found: ids of its tokens, and for each the
        likeliest next token, as StagedStep.best has it. Of equal ones that is the first; NaN is larger than all.
        """
        ids, best, largest = self.found.cpu()
        largest = largest.view(torch.float64).float()
        return ids.tolist(), [(best[i : i + 1], [best[i : i + 1], largest[i : i + 1]]) for i in range(TOKENS)]

    def _pass(self, tokens: Sequence[int | Tensor], position: int) -> None:
        count = len(tokens)
        known = [0 if isinstance(token, Tensor) else token for token in tokens]
        rows = [known + known[-1:] * (TOKENS - count), [position + min(i, count - 1) for i in range(TOKENS)]]
        # From pageable memory, which is copied before the call returns, so that it need not be waited for.
        self.inputs.copy_(torch.tensor(rows), non_blocking=True)
        for i, token in enumerate(tokens):
            if isinstance(token, Tensor):
                self.inputs[0, i : i + 1 if i < count - 1 else TOKENS] = token
        self.graph.replay()
