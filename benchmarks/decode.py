"""Times single-stream decoding at several sparsities, in one process and interleaved, so that ratios can be trusted.

    python -m benchmarks.decode --checkpoint demo --sparsity 0 0.25 0.4 0.5
    python -m benchmarks.decode --shapes llama-3-8b --compile --prompt_tokens 5 4096 --dense --peers transformers

Each round decodes once in every configuration; the median over rounds is reported, with the extremes. The first round
warms up. The read bandwidth that the shares refer to is measured in the same run. `--shapes` takes random weights, and
thresholds calibrated on random tokens. Prints one JSON line of records; --out writes the same.
"""

import argparse
import json
import statistics
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.bandwidth import read_bandwidth
from benchmarks.dense import cublas_step
from benchmarks.peers import PEERS
from benchmarks.shapes import COMMON, SHAPES, calibrate_on_random_tokens, random_model
from checkpoint import DTYPES, find_checkpoint
from cli import positive_int, run, sparsity
from decode import CapturedStep, Sample, Step, achieved_sparsity, decode, decode_step, fast_step
from generate import cache_length, profiler
from model import Transformer
from record import describe, write_records
from sampling import Sampling
from sparse_model import (
    Calibration,
    bytes_per_token,
    load_calibration,
    load_model,
    pick_device,
    set_sparsity,
)

GREEDY = Sampling(0.0)


@dataclass
class Row:
    """One configuration and what it measured: a step at a sparsity, after a prompt."""

    mode: str
    step: Step
    sparsity: float
    prompt_tokens: int
    achieved: float = 0.0
    rates: list[float] = field(default_factory=list)


def decode_once(model: Transformer, row: Row, new_tokens: int) -> Sample:
    """Decodes `new_tokens` tokens after a random prompt."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.args.vocab_size, (row.prompt_tokens,), generator=generator).tolist()
    sample = Sample(row.prompt_tokens)
    draws = torch.Generator(model.norm.weight.device)
    for _ in decode(model, row.step, prompt, new_tokens, GREEDY, draws, frozenset(), sample):
        pass
    return sample


def measure_rows(model: Transformer, calibration: Calibration, rows: list[Row], rounds: int, new_tokens: int) -> None:
    """Fills the rows' rates and achieved sparsities."""
    for number in tqdm(range(rounds + 1), desc="decoding", unit="round"):
        for row in rows:
            set_sparsity(model, calibration, row.sparsity)
            sample = decode_once(model, row, new_tokens)
            if number == 0:
                row.achieved = achieved_sparsity(model, sample)["all"]
            else:
                row.rates.append(sample.tokens_per_s)


def make_rows(model: Transformer, options: argparse.Namespace) -> list[Row]:
    """The configurations asked for, the dense baseline first."""
    cuda = model.norm.weight.is_cuda
    steps: list[tuple[str, Step, list[float]]] = []
    if options.dense:
        steps.append(("captured cublas", CapturedStep(model, cublas_step), [0.0]))
    mode, step = ("captured" if cuda else "compiled", fast_step(model)) if options.compile else ("plain", decode_step)
    steps.append((mode, step, options.sparsity))
    return [Row(m, s, value, p) for p in options.prompt_tokens for m, s, values in steps for value in values]


def to_record(row: Row, model: Transformer, new_tokens: int, bandwidth: float) -> dict:
    rate = statistics.median(row.rates)
    read = bytes_per_token(model, row.achieved, context=row.prompt_tokens + new_tokens // 2)
    return {
        "mode": row.mode,
        "sparsity": row.sparsity,
        "achieved_sparsity": row.achieved,
        "prompt_tokens": row.prompt_tokens,
        "tokens_per_s": rate,
        "tokens_per_s_spread": [min(row.rates), max(row.rates)],
        "bytes_per_token": read,
        "bandwidth_share": read * rate / bandwidth,
    }


def print_row(record: dict) -> None:
    share = f"{record['bandwidth_share']:>5.0%} of read bandwidth" if "bandwidth_share" in record else ""
    print(
        f"{record['model']:<14} {record['peer'] or record['mode']:<16} {record['sparsity']:>4.0%} after "
        f"{record['prompt_tokens']:>5}  {record['tokens_per_s']:>7.1f} tokens/s  {share}",
        flush=True,
    )


def benchmark(model: Transformer, calibration: Calibration, options: argparse.Namespace, common: dict) -> list[dict]:
    """The records of one model."""
    longest = max(options.prompt_tokens) + options.new_tokens
    model.setup_caches(1, cache_length(model, longest))
    rows = make_rows(model, options)
    if model.norm.weight.is_cuda:
        torch.cuda.reset_peak_memory_stats()  # calibration and models before this one do not count
    measure_rows(model, calibration, rows, options.rounds, options.new_tokens)
    with profiler(options.profile):
        decode_once(model, rows[-1], options.new_tokens)
    records = [common | to_record(row, model, options.new_tokens, common["read_gb_per_s"] * 1e9) for row in rows]
    if model.norm.weight.is_cuda:
        memory = torch.cuda.max_memory_allocated()
        records = [record | {"max_memory_bytes": memory} for record in records]
    return records


def load(name: str, options: argparse.Namespace, device: torch.device) -> tuple[str, Transformer, Calibration]:
    """The model's name, the model, and its calibration."""
    if options.checkpoint:
        folder = find_checkpoint(name)
        calibration = load_calibration(folder, device=device)
        return folder.resolve().name, load_model(folder, device, DTYPES.get(options.dtype)), calibration
    model = random_model(COMMON | SHAPES[name], device, DTYPES[options.dtype or "bf16"])
    return name, model, calibrate_on_random_tokens(model)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="a converted checkpoint's folder, or demo")
    what.add_argument("--shapes", nargs="+", choices=SHAPES, help="random weights in these models' shapes")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="computation type (default: the stored one; bf16)")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5], help="nominal")
    parser.add_argument("--prompt_tokens", type=positive_int, nargs="+", default=[5], help="(default: 5)")
    parser.add_argument("--new_tokens", type=positive_int, default=64, help="tokens a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the decode step (on CUDA: capture it)")
    parser.add_argument("--dense", action="store_true", help="a dense baseline row: cuBLAS in the captured step (CUDA)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="other programs to time in the same run")
    parser.add_argument("--profile", type=Path, metavar="TRACE.json", help="profile one more decoding of the last row")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    device = pick_device(options.device)
    if options.peers and not options.shapes:
        raise ValueError("--peers times other programs on random weights: use it with --shapes")
    if options.dense and device.type != "cuda":
        raise ValueError("--dense measures cuBLAS: it needs a CUDA device")
    common = {"benchmark": "decode", "run": uuid.uuid4().hex[:12], "new_tokens": options.new_tokens}
    common["read_gb_per_s"] = read_bandwidth(device) / 1e9
    records: list[dict] = []
    for name in options.shapes or [options.checkpoint]:
        name, model, calibration = load(name, options, device)
        about = describe(name, device, model.norm.weight.dtype) | common
        found = benchmark(model, calibration, options, about)
        dtype = model.norm.weight.dtype
        del model  # a peer needs the memory
        for peer in options.peers:
            measured = PEERS[peer](COMMON | SHAPES[name], device, dtype, options.prompt_tokens, options.new_tokens)
            found += [about | {"peer": peer, "mode": "compiled", "sparsity": 0.0} | row for row in measured]
        for record in found:
            print_row(record)
        records += found
    print(json.dumps(records))
    if options.out:
        write_records(options.out, records)


if __name__ == "__main__":
    run(main)
