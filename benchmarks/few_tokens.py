"""Times the products of a few tokens with a layer's weights in int8 and int4 on CUDA: ours beside Triton's.

    python -m teal_fast.benchmarks.few_tokens --shapes llama-3-8b --out few-tokens-h200.json

Weights are cold: a pass takes copies of them that no cache holds, captured as one CUDA graph. Beside microseconds
stands what share of the time reading the weight takes at the read bandwidth measured in the same run. cuBLAS in bf16 is
there for its time alone: its weights are 2 and 4 times the bytes. Prints one JSON line of records; --out writes them.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.benchmarks.bandwidth import bandwidth_meter
from teal_fast.benchmarks.kernels import COLD_BYTES, layer_products, time_passes
from teal_fast.benchmarks.shapes import COMMON, SHAPES
from teal_fast.cli import run
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.families.config import model_args
from teal_fast.kernels.few_token_gemm import few_token_gemm
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.quantized_gemm import quantized_gemm
from teal_fast.weights.formats import Format

TOKENS = (1, 2, 4, 8, 16)
KERNELS = {"few_token_gemm": few_token_gemm, "quantized_gemm": quantized_gemm}


def copies(K: int, N: int, format: str, device: torch.device) -> list[Tensor | PackedWeight]:
    """Random weights, in all too many for a cache."""
    if format == "bf16":
        return [torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(_number(2 * K * N))]
    layer = Format(format, 128 if format == "int4" else 0).layer("layers.0.feed_forward.w2", K, N)
    found = []
    for _ in range(_number(layer.packed.nbytes)):
        packed = torch.randint(-127, 127, layer.packed.shape, device=device).to(torch.int8).view(layer.packed.dtype)
        if format == "int4":
            packed[:, N // 2 :].view(torch.bfloat16).fill_(1)
        found.append(PackedWeight(packed, torch.ones(N, device=device), layer.group))
    return found


def _number(size: int) -> int:
    return max(4, COLD_BYTES["cuda"] // size)


def microseconds(weights: list, compute: Callable[[Tensor | PackedWeight], Tensor]) -> float:
    def run_pass() -> None:
        for weight in weights:
            compute(weight)

    return 1e6 * statistics.median(time_passes(run_pass, len(weights)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    device, records = torch.device("cuda"), []
    read, common = bandwidth_meter(device)(), describe(options.shapes, device, "int8")
    for name, (K, N) in layer_products(model_args(COMMON | SHAPES[options.shapes])).items():
        for format in ("bf16", "int8", "int4"):
            weights = copies(K, N, format, device)
            nbytes = (weights[0] if format == "bf16" else weights[0].packed).nbytes
            for tokens in TOKENS:
                x = torch.randn(tokens, K, device=device, dtype=torch.bfloat16)
                kernels = {"cublas": F.linear} if format == "bf16" else KERNELS
                for kernel, function in kernels.items():
                    time = microseconds(weights, partial(function, x))
                    record = {"benchmark": "few_tokens", "format": format, "product": name, "K": K, "N": N}
                    record |= {"kernel": kernel, "tokens": tokens, "us": time, "bytes": nbytes}
                    records.append(common | record | {"bandwidth_share": nbytes / (time * 1e-6) / read})
                    print(f"{name:<8} {format:<5} {kernel:<15} {tokens:>3} tokens {time:>7.1f} us  "
                          f"{records[-1]['bandwidth_share']:.0%} of read bandwidth")  # fmt: skip
            del weights
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
