"""What the rounding of activations costs the products of quantized decoding, against the weights as they are stored.

    TRITON_INTERPRET=1 python -m teal_fast.benchmarks.rounding --checkpoint demo --out rounding-cpu.json

Inputs are those of some layers of the model at a token of a text, as they are, and with one kept entry put to 1,000 and
5,000 times the mean size of the others. Weights are rounded to nearest. "captured" is the Triton kernels of the
CUDA step, which run without a GPU in Triton's interpreter; "compiled" is the C++ of the CPU's step. An error is the
root mean square over outputs of what differs from the exact product, in per cent of what all entries but that one add.
Prints the records as one JSON line; --out writes the same.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.calibration.corpus import encode_corpus
from teal_fast.cli import ModelChoice, add_model_arguments, open_model, run, sparsity
from teal_fast.evaluation.perplexity import DEFAULT_TEXT
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.files.calibration import Calibration
from teal_fast.kernels import compact_gemv, gate_up
from teal_fast.kernels.backend import INTERPRETED
from teal_fast.kernels.compact_vector import CompactVector, compact_reference
from teal_fast.kernels.launch_config import block_columns
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.semaphore import new_semaphores
from teal_fast.kernels.sparse_gemv import sparse_gemv
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, KINDS, sparse_layers, watch_inputs
from teal_fast.weights.formats import Format

COLUMNS = 64  # of a weight: enough outputs for a mean, and the interpreter takes its time
LAYERS = 2  # the first and the last
CONTEXT = 64  # tokens of the text; inputs are the last one's
FACTORS = (1, 1000, 5000)  # 1: the input as it is


def collect_inputs(model: Transformer, ids: list[int]) -> dict[str, Tensor]:
    """Inputs [K] of the dense model's sparse layers by name, those of LAYERS layers, at the last token."""
    chosen = {f"layers.{round(i * (len(model.layers) - 1) / (LAYERS - 1))}." for i in range(LAYERS)}
    found = {}

    def keep(name, _layer, x, _phase) -> None:
        if name.startswith(tuple(chosen)):
            found[name] = x[0, -1].clone()

    with torch.no_grad(), watch_inputs(model, keep):
        model(torch.tensor([ids], device=model.norm.weight.device))
    return found


def planted(x: Tensor, threshold: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """x [K] with some kept entry `factor` times the mean size of the other kept ones, and what lies there alone."""
    kept = (x.abs() > threshold).nonzero().flatten()
    alone = torch.zeros_like(x)
    if factor == 1:
        return x, alone
    place = kept[torch.randint(len(kept), (1,), generator=torch.Generator().manual_seed(0))]
    x = x.clone()
    x[place] = factor * x[kept[kept != place]].abs().float().mean().to(x.dtype)
    alone[place] = x[place]
    return x, alone


def captured(x: Tensor, threshold: Tensor, weight: PackedWeight, kind: str, heads: int) -> Tensor:
    """The product as the CUDA step computes it: with its slots, and for gate+up with that kernel's splits."""
    K = len(x)
    widths = {"o": K // heads, "down": block_columns(gate_up.DEFAULTS[weight.bits][1], weight)}
    vector = CompactVector(*(part.contiguous() for part in compact_reference(x, threshold, widths.get(kind, K))))
    if kind == "gate+up":
        compact_gemv.TUNED[K, weight.N, weight.bits] = gate_up.DEFAULTS[weight.bits]
    return compact_gemv.compact_gemv(vector, weight, new_semaphores(weight.N, x.device))


def compiled(x: Tensor, threshold: Tensor, weight: PackedWeight, *_) -> Tensor:
    return sparse_gemv(x.float(), weight, threshold)  # fp32 out, as in the step


def error_percent(y: Tensor, x: Tensor, alone: Tensor, threshold: Tensor, weight: PackedWeight) -> float:
    """The error of the product y, as the docstring above defines it."""
    exact = weight.values().double() * weight.scale.double()
    kept = x.double().masked_fill(x.abs() <= threshold, 0)
    others = (kept - alone.double()) @ exact
    return 100 * ((y.double() - kept @ exact).norm() / others.norm()).item()


def measure(
    model: Transformer, calibration: Calibration, ids: list[int], formats: list[str], sparsities: list[float]
) -> Iterator[dict]:
    """The fields of a record for each format, kind of layer, step, sparsity and factor: median and worst error."""
    inputs = collect_inputs(model, ids)
    steps: dict[str, Callable] = {"captured": captured} if INTERPRETED or model.norm.weight.is_cuda else {}
    steps |= {} if model.norm.weight.is_cuda else {"compiled": compiled}
    for name, kind in ((name, kind) for name in formats for kind in KINDS.values()):
        if name == "int4" and kind in ("qkv", "o"):
            continue  # int8
        mine = {n: layer for n, layer in sparse_layers(model).items() if KINDS[n.rsplit(".", 1)[1]] == kind}
        weights = {
            n: Format(name, 64 if name == "int4" else 0).pack(mine[n].weight.dequantize()[:, :COLUMNS].float()).operand
            for n in mine.keys() & inputs.keys()
        }
        for (step, multiply), nominal, factor in itertools.product(steps.items(), sparsities, FACTORS):
            errors = []
            for layer, weight in sorted(weights.items()):
                limit = torch.full_like(mine[layer].threshold, KEEP_ALL)
                if nominal:
                    limit.copy_(calibration.threshold(layer, nominal))
                x, alone = planted(inputs[layer], limit, factor)
                y = multiply(x, limit, weight, kind, model.args.n_heads)
                errors.append(error_percent(y, x, alone, limit, weight))
            yield {
                "format": name,
                "op": kind,
                "mode": step,
                "sparsity": nominal,
                "factor": factor,
                "error_percent": statistics.median(errors),
                "error_percent_most": max(errors),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--formats", nargs="+", choices=("int8", "int4"), default=["int8", "int4"])
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.5], help="nominal")
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="text, .jsonl files or folders")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    choice = ModelChoice(options.checkpoint, options.device, options.dtype, no_prepare=options.no_prepare)
    opened = open_model(choice)
    ids = encode_corpus(options.text, opened.tokenizer, opened.model.args)[0][:CONTEXT]
    about = describe(opened.name, opened.device, "") | {"benchmark": "rounding"}
    records = []
    for found in measure(opened.model, opened.calibration, ids, options.formats, options.sparsity):
        records.append(about | found)
        print(
            f"{found['format']} {found['op']:<8}{found['mode']:<9}{found['sparsity']:>5.0%} x {found['factor']:<5}"
            f"{found['error_percent']:9.4f} %, at most {found['error_percent_most']:.4f} %",
            flush=True,
        )
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
