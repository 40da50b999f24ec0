"""Times single-stream decoding at several sparsities, in one process and interleaved, so that ratios can be trusted.

    python -m teal_fast.benchmarks.decode --checkpoint demo checkpoints/demo-int8 --sparsity 0 0.25 0.4 0.5
    python -m teal_fast.benchmarks.decode --checkpoint demo --device cpu --peers llama.cpp bf16 q8_0 q4_0, transformers
    python -m teal_fast.benchmarks.decode --shapes llama-3-8b --formats dense int8 int4 --dense \\
        --peers transformers

Each round decodes once in every configuration; the median over rounds is reported, with the extremes. The first round
warms up. The read bandwidth that the shares refer to is measured in between. `--shapes` takes random weights, and
thresholds calibrated on random tokens. Prints one JSON line of records; --out writes the same.

Peers are other programs on the same weights, which --gguf names for other checkpoints than the demo. On the CPU they
take turns with our rows; on CUDA they need the memory and come after our model is gone. A row's host share is what a
token costs outside the C++ step: Python and drawing it.
"""

import argparse
import json
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.benchmarks.bandwidth import bandwidth_meter
from teal_fast.benchmarks.dense import cublas_step
from teal_fast.benchmarks.peers import check_installed, parse_peers, peer_rows
from teal_fast.benchmarks.rows import Row, Task, measure, random_prompt, ratios
from teal_fast.benchmarks.shapes import COMMON, SHAPES, calibrate_on_random_tokens, random_model
from teal_fast.cli import open_calibration, open_checkpoint, pick_device, positive_int, run, sparsity
from teal_fast.engine.accounting import bytes_per_token
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.decode import (
    CapturedStep,
    Prefill,
    Sample,
    Step,
    achieved_sparsity,
    decode,
    decode_step,
    fast_step,
    prefill,
)
from teal_fast.engine.measure import cache_length, profiler
from teal_fast.engine.sampling import Sampling
from teal_fast.evaluation.record import describe, write_records
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.files.demo import find_gguf
from teal_fast.files.load import load_model
from teal_fast.model import Transformer
from teal_fast.sparse_model import dtype_name, format_of
from teal_fast.weights.formats import DTYPES, QUANTIZED, Format

GREEDY = Sampling(0.0)


class TimedCalls:
    """A function that adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., None]):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments) -> None:
        started = time.perf_counter()
        self.function(*arguments)
        self.seconds += time.perf_counter() - started


class KeptPrefill:
    """`prefill` that computes a prompt once and later copies its keys and values: 2,000 tokens take a CPU seconds."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, model: Transformer, prompt: Tensor) -> Tensor:
        tokens = prompt.shape[1]
        caches = [cache for layer in model.layers for cache in layer.attention.kv_cache.buffers()]
        if tokens not in self.kept:
            logits = prefill(model, prompt)
            self.kept[tokens] = logits, [cache[:, :, :tokens].clone() for cache in caches]
        logits, rows = self.kept[tokens]
        for cache, kept in zip(caches, rows, strict=True):
            cache[:, :, :tokens] = kept
        return logits


@dataclass
class Decoder:
    """Our model in one configuration, and what its decodings tell besides their rate."""

    model: Transformer
    calibration: Calibration
    mode: str
    step: Step
    sparsity: float
    prompt: list[int]
    new_tokens: int
    prefill: Prefill
    achieved: float | None = None
    host_shares: list[float] = field(default_factory=list)

    def decode(self) -> float:
        """Decodes once; tokens a second. The first time it also counts what is skipped."""
        set_sparsity(self.model, self.calibration, self.sparsity)
        native = getattr(self.step, "native", None)
        native = native if isinstance(native, TimedCalls) else None
        before = native.seconds if native else 0.0
        sample, draws = Sample(len(self.prompt)), torch.Generator(self.model.norm.weight.device)
        for _ in decode(
            self.model, self.step, self.prompt, self.new_tokens, GREEDY, draws, frozenset(), sample, self.prefill
        ):
            pass
        if native:
            self.host_shares.append(1 - (native.seconds - before) / sum(sample.decode_s))
        if self.achieved is None:
            self.achieved = achieved_sparsity(self.model, sample)["all"]
        return sample.tokens_per_s

    def row(self) -> Row:
        about = {
            "format": format_of(self.model),
            "mode": self.mode,
            "sparsity": self.sparsity,
            "prompt_tokens": len(self.prompt),
        }
        return Row(about, self.decode, self.details)

    def details(self) -> dict:
        """Fields of the row's record that were counted on the way."""
        read = bytes_per_token(self.model, self.achieved, context=len(self.prompt) + self.new_tokens // 2)
        fields = {"achieved_sparsity": self.achieved, "bytes_per_token": read}
        return fields | ({"host_share": statistics.median(self.host_shares[1:])} if self.host_shares else {})


def make_decoders(
    model: Transformer, calibration: Calibration, prompts: list[list[int]], options: argparse.Namespace
) -> list[Decoder]:
    """Our configurations, the dense baseline first."""
    cuda = model.norm.weight.is_cuda
    steps: list[tuple[str, Step, list[float]]] = []
    if options.dense and format_of(model) in DTYPES:
        steps.append(("captured cublas", CapturedStep(model, cublas_step), [0.0]))
    step = fast_step(model) if options.compile or not cuda else decode_step
    mode = "plain" if step is decode_step else "captured" if cuda else "compiled"
    if isinstance(step, CpuStep):
        step.native = TimedCalls(step.native)
    steps.append((mode, step, options.sparsity))
    first = prefill if cuda else KeptPrefill()
    return [
        Decoder(model, calibration, mode, step, value, prompt, options.new_tokens, first)
        for prompt in prompts
        for mode, step, values in steps
        for value in values
    ]


def print_record(record: dict) -> None:
    shares = [f"{record['bandwidth_share']:>4.0%} of read bandwidth"] if "bandwidth_share" in record else []
    shares += [f"host {record['host_share']:.1%}"] if "host_share" in record else []
    mode = record["peer"] or f"{record['format']} {record['mode']}"
    print(
        f"{record['model']:<14} {mode:<21} {record['sparsity']:>4.0%} after "
        f"{record['prompt_tokens']:>5}  {record['tokens_per_s']:>7.1f} tokens/s  {', '.join(shares)}",
        flush=True,
    )


def benchmark(name: str, options: argparse.Namespace, device: torch.device, common: dict) -> list[dict]:
    """The records of one model in all its formats and, where asked for, of the peers on its weights."""
    models = load(name, options, device)
    model = models[0]
    prompts = [random_prompt(model.args.vocab_size, tokens) for tokens in options.prompt_tokens]
    rows = []
    for model, calibration in zip(models, calibrations_of(models, options, device), strict=True):
        model.setup_caches(1, cache_length(model, max(options.prompt_tokens) + options.new_tokens))
        rows += [decoder.row() for decoder in make_decoders(model, calibration, prompts, options)]
    about = describe(name, device, format_of(model)) | common
    weights = options.gguf or COMMON | SHAPES.get(name, {})
    task = Task(weights, model.args.vocab_size, prompts, options.new_tokens, device, dtype_name(models[0]))
    meter = bandwidth_meter(device)
    others, cuda, memory = [], device.type == "cuda", {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # calibration and models before this one do not count
        measure(rows, options.rounds, meter)
        if len(models) == 1:
            memory["max_memory_bytes"] = torch.cuda.max_memory_allocated()
    else:
        others += peer_rows(options.peers, task)
        measure(rows + others, options.rounds, meter)
    if options.profile:
        with profiler(options.profile):
            rows[-1].decode()
    records = [about | row.record() | memory for row in rows]
    del model, models, rows  # peers on CUDA need the memory
    for row in peer_rows(options.peers, task) if cuda else ():
        measure([row], options.rounds, meter)  # alone: its one cache would grow with the other prompts
        others.append(row)
    return records + [about | row.record() for row in others]


def load(name: str, options: argparse.Namespace, device: torch.device) -> list[Transformer]:
    """The model called `name` in every format asked for."""
    if options.checkpoint:
        models = [
            load_model(open_checkpoint(folder), device, DTYPES.get(options.dtype)) for folder in options.checkpoint
        ]
        if any(model.args != models[0].args for model in models):
            raise ValueError("--checkpoint takes formats of one model, got several models: run them one by one")
        return models
    config, dtype = COMMON | SHAPES[name], DTYPES[options.dtype or "bf16"]
    groups = {"int4": 128 if config["hidden_size"] % 128 == 0 else 64}  # outputs a scale
    formats = [Format(format, groups.get(format, 0)) if format in QUANTIZED else None for format in options.formats]
    return [random_model(config, device, dtype, format=format) for format in formats]


def calibrations_of(models: list[Transformer], options: argparse.Namespace, device: torch.device) -> list[Calibration]:
    if options.checkpoint:
        return [open_calibration(open_checkpoint(folder), device=device) for folder in options.checkpoint]
    return list(map(calibrate_on_random_tokens, models))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkpoint", nargs="+", help="a model's converted checkpoints, such as demo and quantized ones"
    )
    what.add_argument("--shapes", nargs="+", choices=SHAPES, help="random weights in these models' shapes")
    parser.add_argument(
        "--formats", nargs="+", choices=("dense", *QUANTIZED), default=["dense"], help="of the random weights"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="computation type (default: the stored one; bf16)")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5], help="nominal")
    parser.add_argument("--prompt_tokens", type=positive_int, nargs="+", default=[5], help="(default: 5)")
    parser.add_argument("--new_tokens", type=positive_int, default=64, help="tokens a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--compile", action="store_true", help="capture the decode step as a CUDA graph (the CPU's is always compiled)"
    )
    parser.add_argument("--dense", action="store_true", help="a dense baseline row: cuBLAS in the captured step (CUDA)")
    parser.add_argument(
        "--peers", nargs="+", default=[], help="programs to time as well: llama.cpp [FORMAT], transformers"
    )
    parser.add_argument("--gguf", type=Path, help="file with the checkpoint's weights, for peers (default: the demo's)")
    parser.add_argument("--profile", type=Path, metavar="TRACE.json", help="profile one more decoding of the last row")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    return parser.parse_args()


def check_peers(options: argparse.Namespace) -> None:
    """Puts into the options which peers they ask for, and the GGUF file for them; raises when something is missing."""
    options.peers = parse_peers(options.peers)
    check_installed(options.peers)
    if not options.peers or options.shapes:
        options.gguf = None
    elif options.gguf is None and options.checkpoint[0] == "demo":
        options.gguf = find_gguf()
    elif options.gguf is None:
        raise ValueError("--peers decode the GGUF file that the checkpoint was converted from: name it with --gguf")
    elif not options.gguf.is_file():
        raise FileNotFoundError(f"{options.gguf} does not exist: expected the checkpoint's GGUF file")


def main() -> None:
    options = parse_arguments()
    device = pick_device(options.device)
    if options.dense and device.type != "cuda":
        raise ValueError("--dense measures cuBLAS: it needs a CUDA device")
    check_peers(options)
    common = {"benchmark": "decode", "run": uuid.uuid4().hex[:12], "new_tokens": options.new_tokens}
    records: list[dict] = []
    for name in options.shapes or [open_checkpoint(options.checkpoint[0]).resolve().name]:
        found = benchmark(name, options, device, common)
        for record in found:
            print_record(record)
        print("\n".join(ratios(found)), flush=True)
        records += found
    print(json.dumps(records))
    if options.out:
        write_records(options.out, records)


if __name__ == "__main__":
    run(main)
