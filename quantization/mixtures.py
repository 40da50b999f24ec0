"""Which block type each matrix of a model gets in quantize.py's modes of GGUF types: llama.cpp's mixtures.

q4_k and q5_k are what llama.cpp calls Q4_K_M and Q5_K_M: some values and down projections and the output layer are in
Q6_K. Where inputs are no multiple of 256, a type with blocks of 32 stands in; a layer whose inputs are no multiple of
32 either stays as it is. Source: llama.cpp's src/llama-quant.cpp.
"""

from collections import Counter
from itertools import groupby

import torch

from teal_fast.kernels.blocks import BLOCK_TYPES
from teal_fast.model import ModelArgs
from teal_fast.weights.formats import EMBEDDINGS, OUTPUT, BlockFormat

MIXTURES = {  # the usual type, and that of what needs more bits
    "q4_k": ("Q4_K", "Q6_K"),
    "q5_k": ("Q5_K", "Q6_K"),
    "q6_k": ("Q6_K", "Q6_K"),
    "q8_0": ("Q8_0", "Q8_0"),
}
STANDS_IN = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def needs_more(layer: int, layers: int) -> bool:
    """Whether values and down projections of a layer get more bits: the first and last eighth, of others each third."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def make_format(mode: str, args: ModelArgs, dtype: torch.dtype) -> tuple[BlockFormat, str | None]:
    """The format of a model quantized in this mode, and what there is to say of types that do not fit.

    dtype: what is computed in. Raises ValueError when no layer's inputs are a multiple of 32.
    """
    usual, finer = MIXTURES[mode]
    instead: Counter[str] = Counter()

    def parts(K: int, *types: tuple[str, int]) -> tuple[tuple[str, int], ...] | None:
        found = []
        for name, N in types:
            kind = name if K % BLOCK_TYPES[name].inputs == 0 else STANDS_IN.get(name, name)
            if K % BLOCK_TYPES[kind].inputs:
                instead[f"{K} inputs as they are"] += 1
                return None
            if kind != name:
                instead[f"{K} inputs in {kind} instead of {name}"] += 1
            found.append((kind, N))
        return tuple((kind, sum(N for _, N in group)) for kind, group in groupby(found, lambda part: part[0]))

    query, value = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    layout = {EMBEDDINGS: parts(args.dim, (finer if args.tie_embeddings else usual, args.vocab_size))}
    if not args.tie_embeddings:
        layout[OUTPUT] = parts(args.dim, (finer, args.vocab_size))
    for i in range(args.n_layers):
        some = finer if needs_more(i, args.n_layers) else usual
        layout |= {
            f"layers.{i}.attention.wqkv": parts(args.dim, (usual, query + value), (some, value)),
            f"layers.{i}.attention.wo": parts(query, (usual, args.dim)),
            f"layers.{i}.feed_forward.w13": parts(args.dim, (usual, 2 * args.ffn_dim)),
            f"layers.{i}.feed_forward.w2": parts(args.ffn_dim, (some, args.dim)),
        }
    kept = {name: found for name, found in layout.items() if found}
    if not kept:
        raise ValueError(f"no layer's inputs are a multiple of 32, as --mode {mode} needs: take int8")
    note = ", ".join(f"{count} matrices of {what}" for what, count in instead.items())
    return BlockFormat(mode, kept, dtype), note or None
