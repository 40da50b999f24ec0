"""Times single ops on cold weights: the products of a layer, sparse at several sparsities and dense.

    python -m teal_fast.benchmarks.kernels --shapes llama-3-8b --out benchmarks/results/kernels-h200.json
    python -m teal_fast.benchmarks.kernels --shapes llama-3-8b --tune  # sweeps block sizes for kernels/
    python -m teal_fast.benchmarks.kernels --device cpu --shapes llama-3-8b smollm2-135m --sparsity 0 0.5 0.75

Every sparse op is compared with a plain fp32 product first. Weights rotate among copies that no cache holds. "layer" is
qkv, o, gate+up and down one after another; "up", on the CPU, is half of gate+up. Microseconds, bytes really read, and
their share of the read bandwidth measured in the same run. Prints one JSON line of records; --out writes the same.

On CUDA the ops of a pass are captured in one graph, so that launch gaps count as they do in decoding. On the CPU they
are calls of teal::sparse_gemv, with what PyTorch adds to a call, and take turns: each pass is compared with the greater
of the read bandwidths just before and after it, and the share is the median of the rounds'.
"""

import argparse
import functools
import json
import operator
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from teal_fast.benchmarks.bandwidth import bandwidth_meter
from teal_fast.benchmarks.rows import take_turns
from teal_fast.benchmarks.shapes import COMMON, SHAPES
from teal_fast.cli import pick_device, run, sparsity
from teal_fast.evaluation.record import check_records_path, describe, write_records
from teal_fast.families.config import model_args
from teal_fast.kernels import compact_gemv, gate_up, sparse_gemv
from teal_fast.kernels.compact_vector import CompactVector
from teal_fast.kernels.launch_config import pick_config
from teal_fast.kernels.packed import PackedWeight, bits
from teal_fast.kernels.semaphore import new_semaphores
from teal_fast.model import ModelArgs
from teal_fast.weights.formats import DTYPES

COLD_BYTES = {"cuda": 1 << 29, "cpu": 1 << 28}  # rotated through by each op: many times any cache
ROUNDS = 20
GEMV_CONFIGS = [  # splits, columns a program, warps, depth
    (8, 64, 1, 2), (8, 64, 2, 2), (16, 64, 1, 1), (16, 64, 1, 2), (16, 64, 1, 3), (16, 64, 2, 1), (16, 64, 2, 2),
    (32, 64, 1, 1),
]  # fmt: skip
GATE_UP_CONFIGS = [(4, 64, 1, 2), (8, 64, 1, 1), (8, 64, 1, 2), (8, 128, 1, 2), (12, 128, 1, 1), (8, 128, 2, 1)]


class Op:
    """One product of a layer with copies of its weight [K, N], and an input of which a share is kept."""

    def __init__(self, name: str, K: int, N: int, slots: int, device: torch.device, dtype: torch.dtype):
        """`slots`: in how many slots the op's producer hands on its input."""
        self.name, self.K, self.N, self.slots = name, K, N, slots
        generator = torch.Generator(device).manual_seed(0)
        copies = max(2, -(-COLD_BYTES[device.type] // (K * N * dtype.itemsize)))
        weight = torch.empty(K, N, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        self.weights = [weight, *(weight.clone() for _ in range(copies - 1))]
        self.x = torch.empty(K, dtype=dtype, device=device).normal_(generator=generator)
        self.keep_h = torch.zeros(N // 2, device=device) if name == "gate+up" else None

    def threshold(self, sparsity: float) -> Tensor:
        cut = self.x.float().abs().quantile(sparsity).item() if sparsity else -1.0
        return torch.full((self.K,), cut, device=self.x.device)

    def bytes(self, sparsity: float) -> int:
        """What one call reads of the weight."""
        kept = int((self.x.abs() > self.threshold(sparsity)).sum())
        return kept * self.N * self.x.element_size()

    def kept(self, sparsity: float) -> CompactVector:
        """x as the op's producer would hand it on."""
        slots = self.slots
        if self.name == "down":  # from gate_up, as tuned by now
            up = PackedWeight(self.weights[0].new_empty(self.N, 2 * self.K, device="meta"))
            slots = -(-self.K // pick_config(up, gate_up.TUNED, gate_up.DEFAULTS)[1])
        width = -(-self.K // slots)
        mask = F.pad(self.x.abs() > self.threshold(sparsity), (0, slots * width - self.K)).view(slots, width)
        order = mask.int().argsort(dim=1, descending=True, stable=True)
        index = order + torch.arange(slots, device=self.x.device)[:, None] * width
        value = self.x[index.clamp(max=self.K - 1)]
        return CompactVector(index.int().contiguous(), value.contiguous(), mask.sum(1).int())

    def sparse(self, sparsity: float) -> Callable[[Tensor], Tensor]:
        """The op on one weight, by the kernel that decoding uses on this device."""
        if not self.x.is_cuda:
            threshold = self.threshold(sparsity)
            return lambda weight: sparse_gemv.sparse_gemv(self.x, PackedWeight(weight), threshold)
        x, semaphores = self.kept(sparsity), new_semaphores(self.N, self.x.device)
        if self.name == "gate+up":
            return lambda weight: gate_up.gate_up(x, PackedWeight(weight), self.keep_h, semaphores)
        return lambda weight: compact_gemv.compact_gemv(x, PackedWeight(weight), semaphores)

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
        error = ((found.float() - expected).norm() / expected.norm()).item()
        assert error < 0.01, f"{self.name} at sparsity {sparsity}: relative error {error}"


@dataclass
class Case:
    """One op, or a layer of them, to be timed, and what each pass of `calls` calls took."""

    op: str
    implementation: str
    sparsity: float
    bytes: int  # really read by a call
    calls: int
    run: Callable[[], object]
    shape: tuple[int, int] | None = None
    seconds: list[float] = field(default_factory=list)  # a call
    bandwidths: list[float] = field(default_factory=list)  # bytes a second that the device read meanwhile

    def time_pass(self) -> float:
        """Seconds a call of one pass on the CPU."""
        started = time.perf_counter()
        self.run()
        return (time.perf_counter() - started) / self.calls


def time_passes(run_pass: Callable[[], object], calls: int, repeats: int = ROUNDS) -> list[float]:
    """Seconds a call of `repeats` passes of `calls` calls on CUDA, after a warm-up; a pass is one graph."""
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
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return times[3:]


def time_cases(cases: list[Case], device: torch.device) -> None:
    """Fills the cases' times and bandwidths: on CUDA one case after another, on the CPU in turns, each once a round."""
    meter = bandwidth_meter(device)
    if device.type == "cuda":
        for case in tqdm(cases, desc="timing", unit="op"):
            case.seconds = time_passes(case.run, case.calls)
            case.bandwidths = [meter()] * len(case.seconds)
        return
    results = take_turns([case.time_pass for case in cases], ROUNDS, meter, "timing")
    for case, (seconds, bandwidths) in zip(cases, results, strict=True):
        case.seconds, case.bandwidths = seconds, bandwidths


def layer_products(args: ModelArgs) -> dict[str, tuple[int, int]]:
    """K and N of a layer's weights."""
    heads = args.n_heads * args.head_dim
    return {
        "qkv": (args.dim, heads + 2 * args.n_kv_heads * args.head_dim),
        "o": (heads, args.dim),
        "gate+up": (args.dim, 2 * args.ffn_dim),
        "down": (args.ffn_dim, args.dim),
    }


def make_ops(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> list[Op]:
    sizes = layer_products(args)
    if device.type == "cpu":
        sizes["up"] = (args.dim, args.ffn_dim)
    return [Op(name, K, N, args.n_heads if name == "o" else 1, device, dtype) for name, (K, N) in sizes.items()]


def make_cases(ops: list[Op], sparsities: list[float]) -> list[Case]:
    """Every op, sparse and dense, and a layer; the sparse ones checked."""
    cases = []
    for nominal in sparsities:
        for op in ops:
            op.check(nominal)
            call, shape = op.sparse(nominal), (op.K, op.N)
            run_pass = functools.partial(run_ops, [op], [call], len(op.weights))
            cases.append(Case(op.name, "sparse", nominal, op.bytes(nominal), len(op.weights), run_pass, shape))
        layer = [op for op in ops if op.name != "up"]
        calls, layers = [op.sparse(nominal) for op in layer], max(len(op.weights) for op in layer)
        read = sum(op.bytes(nominal) for op in layer)
        cases.append(Case("layer", "sparse", nominal, read, layers, functools.partial(run_ops, layer, calls, layers)))
    for op in ops:
        x, weights = op.x[None], [w.t().contiguous() for w in op.weights]  # [N, K], as a dense model has them
        run_pass = functools.partial(run_dense, x, weights)
        cases.append(Case(op.name, "dense", 0.0, op.bytes(0.0), len(weights), run_pass, (op.K, op.N)))
    return cases


def run_ops(ops: list[Op], calls: list[Callable[[Tensor], Tensor]], times: int) -> None:
    """The ops one after another, several times, each time on other weights."""
    for number in range(times):
        for op, call in zip(ops, calls, strict=True):
            call(op.weights[number % len(op.weights)])


def run_dense(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)


def tune(ops: list[Op]) -> None:
    """Prints the best block sizes at 50 %, in the form of the tables in kernels/."""
    for op in ops:
        key = (op.K, op.N, bits(op.weights[0]))
        table, configs = compact_gemv.TUNED, GEMV_CONFIGS
        if op.name == "gate+up":
            table, configs = gate_up.TUNED, GATE_UP_CONFIGS
        timed = []
        for config in configs:
            table[key] = config
            call = op.sparse(0.5)
            seconds = time_passes(functools.partial(run_ops, [op], [call], len(op.weights)), len(op.weights))
            timed.append((statistics.median(seconds) * 1e6, config))
        timed.sort()
        table[key] = timed[0][1]
        print(f"{op.name} {key}: " + "  ".join(f"{config} {us:.2f} us" for us, config in timed[:4]), flush=True)


def to_record(case: Case) -> dict:
    """A case's fields of a record. A pass's bandwidth is the meter's, or what the case itself read if that is more."""
    us = [second * 1e6 for second in case.seconds]
    reads = [case.bytes / second for second in case.seconds]
    bandwidths = list(map(max, reads, case.bandwidths))
    shares = list(map(operator.truediv, reads, bandwidths))
    return {
        "op": case.op,
        "shape": case.shape,
        "implementation": case.implementation,
        "sparsity": case.sparsity,
        "us": statistics.median(us),
        "us_spread": [min(us), max(us)],
        "bytes": case.bytes,
        "read_gb_per_s": statistics.median(bandwidths) / 1e9,
        "bandwidth_share": statistics.median(shares),
        "bandwidth_share_spread": [min(shares), max(shares)],
    }


def print_record(record: dict) -> None:
    print(
        f"{record['model']:<14} {record['op']:<8} {record['implementation']:<7} {record['sparsity']:>4.0%}  "
        f"{record['us']:>8.2f} us  {record['bandwidth_share']:.0%} of read bandwidth",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3-8b"], help="models' shapes")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default: %(default)s)")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5, 0.65], help="nominal")
    parser.add_argument("--tune", action="store_true", help="sweep block sizes instead (CUDA)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    device, dtype = pick_device(options.device), DTYPES[options.dtype]
    if options.tune and device.type != "cuda":
        raise ValueError("--tune sweeps the CUDA kernels: it needs a CUDA device")
    run_id = uuid.uuid4().hex[:12]
    records = []
    for name in options.shapes:
        ops = make_ops(model_args(COMMON | SHAPES[name]), device, dtype)
        if options.tune:
            print(name)
            tune(ops)
            continue
        cases = make_cases(ops, options.sparsity)
        time_cases(cases, device)
        about = describe(name, device, options.dtype) | {"benchmark": "kernels", "run": run_id}
        found = [about | to_record(case) for case in cases]
        for record in found:
            print_record(record)
        records += found
    print(json.dumps(records))
    if options.out and records:
        write_records(options.out, records)


if __name__ == "__main__":
    run(main)
