"""Times single ops on cold weights: the four products of a layer, sparse at several sparsities and dense.

    python -m benchmarks.kernels --shapes llama-3-8b --out benchmarks/results/kernels-h200.json
    python -m benchmarks.kernels --shapes llama-3-8b --tune      # sweeps block sizes for the tables in kernels/

Every sparse op is compared with a plain fp32 product first. Weights rotate among copies that no cache holds. On CUDA
the ops of a pass are captured in one graph, so that launch gaps count as they do in decoding; "layer" is qkv, o,
gate+up and down one after another. Microseconds, bytes really read, and their share of the read bandwidth measured in
the same run. Prints one JSON line of records; --out writes the same.
"""

import argparse
import json
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bandwidth import read_bandwidth
from benchmarks.shapes import COMMON, SHAPES
from checkpoint import DTYPES
from cli import run, sparsity
from kernels import compact_gemv, gate_up, sparse_gemv
from model import ModelArgs
from record import describe, write_records
from sparse_model import pick_device

COLD_BYTES = 1 << 29  # rotated through by each op: many times any cache
GEMV_CONFIGS = [  # splits, rows and columns a step, warps
    (8, 128, 64, 4), (8, 64, 64, 2), (8, 128, 64, 2), (16, 64, 64, 2), (16, 32, 64, 1), (4, 128, 64, 4),
    (32, 32, 64, 1),
]  # fmt: skip
GATE_UP_CONFIGS = [(128, 64, 4), (128, 64, 8), (64, 64, 4), (128, 32, 4), (128, 128, 8), (256, 64, 8)]


class Op:
    """One product of a layer with copies of its weight [K, N], and an input of which a share is kept."""

    def __init__(self, name: str, K: int, N: int, slots: int, device: torch.device, dtype: torch.dtype):
        """`slots`: in how many slots the op's producer hands on its input."""
        self.name, self.K, self.N, self.slots = name, K, N, slots
        generator = torch.Generator(device).manual_seed(0)
        copies = max(2, -(-COLD_BYTES // (K * N * dtype.itemsize)))
        self.weights = [
            torch.empty(K, N, dtype=dtype, device=device).normal_(0, 0.02, generator=generator) for _ in range(copies)
        ]
        self.x = torch.empty(K, dtype=dtype, device=device).normal_(generator=generator)
        self.keep_h = torch.zeros(N // 2, device=device) if name == "gate+up" else None

    def threshold(self, sparsity: float) -> Tensor:
        cut = self.x.float().abs().quantile(sparsity).item() if sparsity else -1.0
        return torch.full((self.K,), cut, device=self.x.device)

    def kept(self, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
        """Index, value and count of x as the op's producer would hand them on."""
        slots = -(-self.K // gate_up.config(self.K)[1]) if self.name == "down" else self.slots  # as tuned by now
        width = -(-self.K // slots)
        mask = F.pad(self.x.abs() > self.threshold(sparsity), (0, slots * width - self.K)).view(slots, width)
        order = mask.int().argsort(dim=1, descending=True, stable=True)
        index = order + torch.arange(slots, device=self.x.device)[:, None] * width
        value = self.x[index.clamp(max=self.K - 1)]
        return index.int().contiguous(), value.contiguous(), mask.sum(1).int()

    def sparse(self, sparsity: float) -> Callable[[Tensor], Tensor]:
        """The op on one weight, by the kernel that decoding uses on this device."""
        if not self.x.is_cuda:
            threshold = self.threshold(sparsity)
            return lambda weight: sparse_gemv.sparse_gemv(self.x, weight, threshold)
        kept = self.kept(sparsity)
        if self.name == "gate+up":
            return lambda weight: gate_up.gate_up(*kept, weight, self.keep_h)
        return lambda weight: compact_gemv.compact_gemv(*kept, weight)

    def check(self, sparsity: float) -> None:
        """Raises when the kernel and plain PyTorch disagree."""
        weight = self.weights[0]
        expected = self.x.float().masked_fill(self.x.abs() <= self.threshold(sparsity), 0) @ weight.float()
        found = self.sparse(sparsity)(weight)
        if self.name == "gate+up" and self.x.is_cuda:
            gate, up = expected.chunk(2)
            expected, (index, value, count) = F.silu(gate) * up, found
            valid = torch.arange(index.shape[1], device=index.device) < count[:, None]
            found = torch.zeros_like(expected).index_put((index[valid].long(),), value[valid].float())
        elif self.x.is_cuda:
            found = found.sum(0)
        error = ((found.float() - expected).norm() / expected.norm()).item()
        assert error < 0.01, f"{self.name} at sparsity {sparsity}: relative error {error}"


def time_passes(run_pass: Callable[[], object], ops: int, device: torch.device, repeats: int = 20) -> list[float]:
    """Seconds an op of `repeats` passes of `ops` ops, after a warm-up; on CUDA a pass is one graph."""
    if device.type == "cpu":
        run_pass()
        return [_seconds(run_pass) / ops for _ in range(repeats)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_pass()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_pass()
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / ops)
    return times[3:]


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def make_ops(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> list[Op]:
    heads = args.n_heads * args.head_dim
    sizes = {
        "qkv": (args.dim, heads + 2 * args.n_kv_heads * args.head_dim),
        "o": (heads, args.dim),
        "gate+up": (args.dim, 2 * args.ffn_dim),
        "down": (args.ffn_dim, args.dim),
    }
    return [Op(name, K, N, args.n_heads if name == "o" else 1, device, dtype) for name, (K, N) in sizes.items()]


Timing = tuple[str, str, float, list[float], int]  # op, implementation, sparsity, seconds, bytes really read


def measure(ops: list[Op], sparsities: list[float], device: torch.device) -> Iterator[Timing]:
    """Times every op, sparse and dense, and the four as a layer."""
    size = {op.name: op.K * op.N * op.x.element_size() for op in ops}
    for nominal in sparsities:
        for op in ops:
            op.check(nominal)
            call = op.sparse(nominal)
            seconds = time_passes(lambda op=op, call=call: [call(w) for w in op.weights], len(op.weights), device)
            yield op.name, "sparse", nominal, seconds, round(size[op.name] * (1 - nominal))
        calls, layers = [op.sparse(nominal) for op in ops], max(len(op.weights) for op in ops)

        def run_layers(calls=calls, layers=layers) -> None:
            for layer in range(layers):
                for op, call in zip(ops, calls, strict=True):
                    call(op.weights[layer % len(op.weights)])

        seconds = time_passes(run_layers, layers, device)
        yield "layer", "sparse", nominal, seconds, round(sum(size.values()) * (1 - nominal))
    for op in ops:
        x, weights = op.x[None], [w.t().contiguous() for w in op.weights]  # [N, K], as a dense model has them
        seconds = time_passes(lambda x=x, weights=weights: [F.linear(x, w) for w in weights], len(weights), device)
        yield op.name, "dense", 0.0, seconds, size[op.name]


def tune(ops: list[Op], device: torch.device) -> None:
    """Prints the best block sizes at 50 %, in the form of the tables in kernels/."""
    for op in ops:
        table, key, configs = compact_gemv.TUNED, (op.K, op.N), GEMV_CONFIGS
        if op.name == "gate+up":
            table, key, configs = gate_up.TUNED, op.N // 2, GATE_UP_CONFIGS
        timed = []
        for config in configs:
            table[key] = config
            call = op.sparse(0.5)
            seconds = time_passes(lambda op=op, call=call: [call(w) for w in op.weights], len(op.weights), device)
            timed.append((statistics.median(seconds) * 1e6, config))
        timed.sort()
        table[key] = timed[0][1]
        print(f"{op.name} {key}: " + "  ".join(f"{config} {us:.2f} us" for us, config in timed[:4]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3-8b"], help="models' shapes")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default: %(default)s)")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5, 0.65], help="nominal")
    parser.add_argument("--tune", action="store_true", help="sweep block sizes instead (CUDA)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    device, dtype = pick_device(options.device), DTYPES[options.dtype]
    if options.tune and device.type != "cuda":
        raise ValueError("--tune sweeps the CUDA kernels: it needs a CUDA device")
    run_id, bandwidth = uuid.uuid4().hex[:12], read_bandwidth(device)
    records = []
    for name in options.shapes:
        ops = make_ops(ModelArgs.from_config(COMMON | SHAPES[name]), device, dtype)
        if options.tune:
            print(name)
            tune(ops, device)
            continue
        about = describe(name, device, dtype) | {
            "benchmark": "kernels",
            "run": run_id,
            "read_gb_per_s": bandwidth / 1e9,
        }
        for op, implementation, nominal, seconds, read in measure(ops, options.sparsity, device):
            us = [second * 1e6 for second in seconds]
            median = statistics.median(us)
            row = {"op": op, "implementation": implementation, "sparsity": nominal, "us": median}
            row |= {"us_spread": [min(us), max(us)], "bytes": read, "bandwidth_share": read / median * 1e6 / bandwidth}
            records.append(about | row)
            share = f"{row['bandwidth_share']:.0%} of read bandwidth"
            print(f"{name:<14} {op:<8} {implementation:<7} {nominal:>4.0%}  {median:>8.2f} us  {share}", flush=True)
    print(json.dumps(records))
    if options.out and records:
        write_records(options.out, records)


if __name__ == "__main__":
    run(main)
