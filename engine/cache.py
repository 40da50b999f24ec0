"""The key/value cache of an engine or an evaluation, which is refused in one line where it does not fit the memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from teal_fast.files.memory import check_memory, memory_for
from teal_fast.model import KVCache, Transformer


def new_cache(model: Transformer, length: int, sequences: int = 1) -> KVCache:
    """An empty cache for sequences of up to `length` tokens. Raises OutOfMemoryError."""
    args, weight = model.args, model.norm.weight
    needed = 2 * args.n_layers * args.n_kv_heads * args.head_dim * weight.element_size() * length * sequences
    what, todo = f"keys and values of {length:,} tokens", "lower the context (--max_seq_length, --max_new_tokens)"
    if sequences > 1:
        what, todo = f"{sequences} times {what}", f"{todo}, or answer fewer requests at once"
    check_memory(needed, weight.device, what, todo)
    with memory_for(what, todo):
        return model.new_cache(sequences, length)


@contextmanager
def first_row_kept(cache: KVCache) -> Iterator[None]:
    """In the block, position 0 may be overwritten, as a step does that is captured; afterwards it is as it was."""
    tensors = [*cache.k, *cache.v]
    rows = [tensor[:, :, :1].clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, row in zip(tensors, rows, strict=True):
            tensor[:, :, :1] = row
