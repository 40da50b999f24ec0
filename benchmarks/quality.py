"""What methods of calibration lose at equal bytes: perplexity at target sparsities, against uniform thresholds.

    python -m teal_fast.benchmarks.quality --checkpoint demo --calibration uniform.safetensors measured.safetensors \\
        --text wiki.test.raw --windows 20 --out quality.json

The first calibration is what the others are compared with. `loss_share` is a method's loss of perplexity over the dense
model's, as a share of the first one's; `difference` is its mean loss in nats over the dense one's, with the standard
error of paired differences from the first over windows. Windows and `--prefill` as in eval.py. Achieved sparsities
differ a little: compare them before the perplexities.
"""

import argparse
import math
from pathlib import Path

import torch
from tqdm import tqdm

from teal_fast.calibration.corpus import read_ids
from teal_fast.cli import (
    ModelChoice,
    add_model_arguments,
    open_model,
    positive_int,
    run,
    sparsity,
)
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, Score, cut_windows, evaluate
from teal_fast.evaluation.record import check_records_path, describe, read_records, write_records
from teal_fast.evaluation.tasks import PREFILLS
from teal_fast.files.calibration import load_calibration, set_sparsity
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, format_of, sparse_layers


def losses(scores: list[Score]) -> torch.Tensor:
    """Mean loss of each window in nats, fp64."""
    return torch.tensor([math.log(score.perplexity) for score in scores], dtype=torch.float64)


def mean_by_kind(scores: list[Score]) -> dict[str, float]:
    return {kind: sum(s.achieved_by_kind[kind] for s in scores) / len(scores) for kind in scores[0].achieved_by_kind}


def score_windows(
    model: Transformer, windows: list[tuple[list[int], int]], dense_tokens: int, target: float, progress: tqdm
) -> list[Score]:
    """One score a window, so that methods can be compared in pairs."""
    return [evaluate(model, [window], dense_tokens, target, progress) for window in windows]


def row(scores: list[Score], dense: torch.Tensor, first: torch.Tensor) -> dict:
    """What is recorded of a method at a target; dense, first: losses by window of the dense model and the first."""
    own = losses(scores)
    perplexity, dense_perplexity, first_perplexity = (x.mean().exp().item() for x in (own, dense, first))
    lost = first_perplexity - dense_perplexity
    return {
        "achieved_sparsity": sum(score.achieved_sparsity for score in scores) / len(scores),
        "achieved_by_kind": mean_by_kind(scores),
        "perplexity": perplexity,
        "dense_perplexity": dense_perplexity,
        "loss_share": (perplexity - dense_perplexity) / lost if lost else None,
        "difference": (own - first).mean().item(),
        "difference_error": (own - first).std().item() / math.sqrt(len(own)) if len(own) > 1 else None,
    }


def describe_row(record: dict) -> str:
    share = "-" if record["loss_share"] is None else f"{record['loss_share']:.0%}"
    return (
        f"{record['sparsity']:.0%} {record['calibration'].get('method', '?'):>10}: achieved "
        f"{record['achieved_sparsity']:.1%}, perplexity {record['perplexity']:.2f}, share of the loss {share}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="files to compare with the first")
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="text, .jsonl files or folders")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.25, 0.4, 0.5, 0.6], help="targets")
    parser.add_argument("--prefill", choices=("half", "full"), default="full", help="what is sparsified")
    parser.add_argument("--context", type=positive_int, default=1024, help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=positive_int, help="windows to score, spread over the text (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file of records, to which these are added")
    options = parser.parse_args()
    check_records_path(options.out)
    records = read_records(options.out) if options.out and options.out.exists() else []
    choice = ModelChoice(options.checkpoint, options.device, options.dtype, no_prepare=options.no_prepare)
    opened = open_model(choice, calibrated=False)
    model = opened.model
    ids = read_ids(options.text, opened.tokenizer, model.args)
    calibrations = [load_calibration(opened.folder, path) for path in options.calibration]
    if not 2 <= options.context <= model.args.max_position:
        raise ValueError(f"--context {options.context}: expected 2 to this model's {model.args.max_position}")
    windows = cut_windows(ids, options.context, options.context, options.windows, opened.tokenizer.prefix)
    if not windows:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window: use a smaller --context")
    dense_tokens = PREFILLS[options.prefill](options.context)
    common = describe(opened.name, opened.device, format_of(model)) | {
        "benchmark": "quality",
        "text": [path.name for path in options.text],
        "protocol": f"context {options.context}, {len(windows)} windows, prefill {options.prefill}",
    }
    runs = 1 + len(options.sparsity) * len(calibrations)
    with tqdm(total=runs * len(windows) * options.context, desc="evaluating", unit="token") as progress:
        for layer in sparse_layers(model).values():
            layer.threshold.fill_(KEEP_ALL)
        dense = losses(score_windows(model, windows, dense_tokens, 0.0, progress))
        for target in options.sparsity:
            first = None
            for calibration in calibrations:
                set_sparsity(model, calibration, target)
                scores = score_windows(model, windows, dense_tokens, target, progress)
                first = losses(scores) if first is None else first
                about = {"sparsity": target, "calibration": calibration.origin}
                records.append(common | about | row(scores, dense, first))
                print(describe_row(records[-1]), flush=True)
            if options.out:
                write_records(options.out, records)


if __name__ == "__main__":
    run(main)
