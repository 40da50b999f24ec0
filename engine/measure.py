"""TODO."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from teal_fast.files.store import new_file
from teal_fast.model import Transformer


def cache_length(model: Transformer, tokens: int) -> int:
    """A cache size for `tokens` tokens: a power of two, so that runs of similar length share compiled code."""
    return min(max(256, 1 << (tokens - 1).bit_length()), model.args.max_position)


@contextmanager
def profiler(path: Path | None) -> Iterator[None]:
    """Profiles the block when there is a path: a chrome trace goes there, a table by operator to stderr."""
    if path is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    with new_file(path) as temporary:
        profile.export_chrome_trace(str(temporary))
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=15), file=sys.stderr)
