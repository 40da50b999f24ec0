"""Our engine as a row of a benchmark: one configuration that decodes after a prompt, as often as it is asked."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from teal_fast.benchmarks.dense import cublas_step
from teal_fast.benchmarks.rows import Row
from teal_fast.engine.accounting import bytes_per_token
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.cuda_step import CapturedStep, can_fuse
from teal_fast.engine.engine import Engine
from teal_fast.engine.measure import Sample, cache_length
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.staged_step import StagedStep
from teal_fast.engine.steps import PlainStep, fast_step
from teal_fast.files.calibration import Calibration
from teal_fast.model import Transformer
from teal_fast.sparse_model import format_of
from teal_fast.weights.formats import DTYPES


class TimedCalls:
    """A function that adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., None]):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments) -> None:
        started = time.perf_counter()
        self.function(*arguments)
        self.seconds += time.perf_counter() - started


@dataclass
class Decoder:
    """An engine at one sparsity after one prompt, whose prefix stays in the engine's cache from round to round.

    native: what times the calls into C++, where the step is in C++. reads: whether the row also times its prompt, which
    is dense at every sparsity, so that one of an engine's rows is enough.
    """

    engine: Engine
    mode: str
    sparsity: float
    prompt: list[int]
    new_tokens: int
    native: TimedCalls | None = None
    reads: bool = False
    achieved: float | None = None
    host_shares: list[float] = field(default_factory=list)

    def decode(self) -> float:
        """Decodes once; tokens a second. The first time it also counts what is skipped."""
        before = self.native.seconds if self.native else 0.0
        sample = Sample(len(self.prompt))
        request = Request(self.prompt, Sampling(0.0), self.sparsity, self.new_tokens, stop=())
        for _ in sample.watch(self.engine.stream(request)):
            pass
        if self.native:
            self.host_shares.append(1 - (self.native.seconds - before) / sum(sample.decode_s))
        if self.achieved is None:
            self.achieved = self.engine.achieved_sparsity()["all"]
        return sample.tokens_per_s

    def read(self) -> float:
        """Computes the whole prompt; seconds to the first token."""
        self.engine.forget()
        sample, request = Sample(len(self.prompt)), Request(self.prompt, Sampling(0.0), 0.0, 1, stop=())
        for _ in sample.watch(self.engine.stream(request)):
            pass
        return sample.first_token_s

    def row(self) -> Row:
        """The configuration as a row that takes turns with others."""
        about = {
            "format": format_of(self.engine.model),
            "mode": self.mode,
            "sparsity": self.sparsity,
            "prompt_tokens": len(self.prompt),
        }
        return Row(about, self.decode, self.details, self.read if self.reads else None)

    def details(self) -> dict:
        """Fields of the row's record that were counted on the way."""
        contexts = range(len(self.prompt), len(self.prompt) + self.new_tokens - 1)  # of the steps after the first token
        read = bytes_per_token(self.engine.model, self.achieved, contexts)
        fields = {"achieved_sparsity": self.achieved, "bytes_per_token": read}
        if isinstance(self.engine.step, StagedStep):
            fields["beyond_grids"] = self.engine.step.beyond_grids  # of all rows of this engine
        return fields | ({"host_share": statistics.median(self.host_shares[1:])} if self.host_shares else {})


def make_decoders(
    model: Transformer,
    calibration: Calibration | None,
    prompt: list[int],
    new_tokens: int,
    sparsities: list[float],
    eager: bool = False,
    baselines: bool = False,
) -> list[Decoder]:
    """One decoder a sparsity, all on one engine; before them, if `baselines`, one of the captured step with cuBLAS, and
    those of the step in Triton, eight kernels a layer, where a faster one serves the model.
    """
    decoders, context = [], cache_length(model, len(prompt) + new_tokens)
    engine, native = Engine(model, calibration, (), context, PlainStep if eager else fast_step), None
    if baselines and format_of(model) in DTYPES:
        dense = Engine(model, calibration, (), context, partial(CapturedStep, compute=cublas_step))
        decoders.append(Decoder(dense, "captured cublas", 0.0, prompt, new_tokens))
    if baselines and isinstance(engine.step, StagedStep) and can_fuse(model):
        triton = Engine(model, calibration, (), context, CapturedStep)
        decoders += [Decoder(triton, "captured triton", sparsity, prompt, new_tokens) for sparsity in sparsities]
    if isinstance(engine.step, CpuStep):
        engine.step.native = native = TimedCalls(engine.step.native)
    return decoders + [
        Decoder(engine, engine.step.mode, sparsity, prompt, new_tokens, native, reads=not i)
        for i, sparsity in enumerate(sparsities)
    ]
