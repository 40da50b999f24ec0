"""How long decoding takes: times of one stream of tokens, a profile, the size of a cache for a measurement."""

import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from teal_fast.engine.request import Token
from teal_fast.engine.speculation.statistics import Statistics
from teal_fast.files.store import new_file
from teal_fast.model import Transformer


@dataclass
class Sample:
    """One timed stream: its tokens, seconds to the first one, and seconds of each decode step after it.

    achieved: the sparsity of those steps, by tensor kind and "all", once it is counted. finish_reason: "stop" at a stop
    token or string, "length", or None where it was interrupted. cut: whether the full context ended the text. drafted:
    what drafting brought to a lossless one. batch: how many streams were decoded together, achieved then being of all.
    """

    prompt_tokens: int
    tokens: list[Token] = field(default_factory=list)
    first_token_s: float = 0.0
    decode_s: list[float] = field(default_factory=list)
    achieved: dict[str, float] = field(default_factory=dict)
    finish_reason: str | None = None
    cut: bool = False
    drafted: Statistics | None = None
    batch: int = 1

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens a second, without the first; 0 where there is none."""
        return len(self.decode_s) / sum(self.decode_s) if self.decode_s else 0.0

    @property
    def skipped(self) -> float | None:
        """The share of the sparse layers' bytes that its steps did not read; None where a batch's are not counted."""
        if self.batch == 1:
            return self.achieved["all"]
        counted = [token.achieved for token in self.tokens[1:]]
        return None if None in counted else statistics.mean(counted)

    def add(self, token: Token, seconds: float) -> None:
        """Takes a token and how long it took."""
        if self.tokens:
            self.decode_s.append(seconds)
        else:
            self.first_token_s = seconds
        self.tokens.append(token)

    def watch(self, stream: Iterable[Token]) -> Iterator[Token]:
        """Yields the stream's tokens and takes their times; what was taken survives an interruption."""
        before = time.perf_counter()
        for token in stream:
            now = time.perf_counter()
            self.add(token, now - before)
            before = now
            yield token


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
        try:
            json.loads(temporary.read_bytes())
        except ValueError:  # PyTorch says nothing of a full disk, and may leave a file of its own
            temporary.with_name(f"{temporary.name}.tmp").unlink(missing_ok=True)
            raise OSError(f"{path}: the trace could not be written whole, is the disk full?") from None
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=15), file=sys.stderr)
