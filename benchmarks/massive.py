"""What massive activations, entries 1,000 and 5,000 times the rest, cost the step in three stages: time, exactness.

    python -m teal_fast.benchmarks.massive --shapes llama-3-8b --out massive-h200.json

Random weights, whose norms make one channel that large in front of q/k/v and of the MLP, in every layer and for every
token: more than any model has. That channel's own weights are zero, so that nothing that comes out may depend on it.
`error` is by how much logits at 0 % differ from those without it, `rounding` by how much those differ from a dense pass
in PyTorch over the same weights, each relative to their size (thresholds of random weights magnify any rounding to 1).
Prints one JSON line of records; --out writes the same.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.benchmarks.models import Choice
from teal_fast.benchmarks.shapes import SHAPES
from teal_fast.benchmarks.tune import CONTEXT, step_microseconds
from teal_fast.cli import pick_device, run
from teal_fast.cli import sparsity as fraction
from teal_fast.engine.cache import new_cache
from teal_fast.engine.prefill import prefill
from teal_fast.engine.staged_step import StagedStep, build_stages
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.files.calibration import set_sparsity
from teal_fast.model import Transformer
from teal_fast.sparse_model import SparseLinear, format_of

SIZES = (1, 1000, 5000)  # times the rest; 1: there is none
CHANNEL, TOKENS = 33, 24  # the large one; of the text that logits are compared after


def fed(model: Transformer) -> list[tuple[torch.nn.RMSNorm, SparseLinear]]:
    """The norms in front of layers, and these."""
    pairs = [
        ((layer.attention_norm, layer.attention.wqkv), (layer.ffn_norm, layer.feed_forward.w13))
        for layer in model.layers
    ]
    return [pair for both in pairs for pair in both]


def clear_channel(layer: SparseLinear) -> None:
    """Sets the large channel's weights to zero."""
    row = layer.weight.operand.packed[CHANNEL]
    if layer.weight.format == "int4":
        row[: layer.weight.out_features // 2] = 0x88  # eight in both halves stands for zero
    else:
        row.zero_()


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def logits_after(step: StagedStep, ids: list[int]) -> Tensor:
    for position, id in enumerate(ids):
        logits = step(torch.tensor([[id]], device=step.device), torch.tensor([position]))
    return logits.clone()


@torch.no_grad()
def measure(model: Transformer, calibration, sparsities: list[float]) -> list[dict]:
    """The records of one model, without what they have in common."""
    vocab, device, records = model.args.vocab_size, model.norm.weight.device, []
    ids = torch.randint(vocab, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    for _, layer in fed(model):
        clear_channel(layer)
    cache, usual = new_cache(model, CONTEXT), None
    dense = prefill(model, cache, torch.tensor([ids], device=device))
    for size in SIZES:
        for norm, _ in fed(model):
            norm.weight[CHANNEL] = size
        step = StagedStep(model, cache, build_stages(model))
        for sparsity in sparsities:
            set_sparsity(model, calibration, sparsity)
            found = {"sparsity": sparsity, "size": size, "us": step_microseconds(step)}
            if sparsity == 0:
                logits = logits_after(step, ids)
                usual = logits if size == SIZES[0] else usual
                found |= {"error": error(logits, usual), "rounding": error(usual, dense)}
            records.append(found | {"beyond_grids": step.beyond_grids})
            print(" · ".join(f"{name} {value:.4g}" for name, value in records[-1].items()), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b", help="random weights in this model's shapes")
    parser.add_argument("--formats", nargs="+", choices=("dense", "int8", "int4"), default=["int8", "int4"])
    parser.add_argument("--sparsity", type=fraction, nargs="+", default=[0.0, 0.5], help="nominal")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    device, records = pick_device("cuda"), []
    common = describe(options.shapes, device, "") | {"benchmark": "massive"}
    for format in options.formats:
        ((model, calibration),) = Choice(device, shape=options.shapes, formats=(format,)).load()
        print(format_of(model), flush=True)
        common["format"] = format_of(model)
        records += [common | record for record in measure(model, calibration, options.sparsity)]
        del model, calibration
        torch.cuda.empty_cache()
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
