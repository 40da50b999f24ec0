"""One table of what sparsity and bits cost and bring: perplexity, achieved sparsity, bits, tokens/s and GB/s.

    python -m teal_fast.benchmarks.table --checkpoint demo checkpoints/demo-int8 checkpoints/demo-int4 --windows 8

Perplexity as eval.py computes it with `--prefill full`: all tokens of a window but the first are sparsified. Speed as
benchmarks/decode.py measures it: all rows take turns, and the median counts. Thresholds are the checkpoints' own.
Prints the table as Markdown and one JSON line of records; --out writes the records.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from teal_fast.benchmarks.bandwidth import bandwidth_meter
from teal_fast.benchmarks.decoder import make_decoders
from teal_fast.benchmarks.rows import measure
from teal_fast.calibration.corpus import read_ids
from teal_fast.cli import open_calibration, open_checkpoint, pick_device, positive_int, run, sparsity
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, cut_windows, evaluate
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.families.config import model_args
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.checkpoint import read_config
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer
from teal_fast.sparse_model import format_of, sparse_layers

COLUMNS = ("format", "bits", "sparsity", "achieved", "perplexity", "tokens/s", "MB a token", "GB/s")


def bits_a_weight(model: Transformer) -> float:
    """Bits that a weight of the sparse layers takes, its share of the scales among them."""
    weights = [layer.weight for layer in sparse_layers(model).values()]
    read = sum(parameter.nbytes for weight in weights for parameter in weight.parameters())
    return 8 * read / sum(weight.in_features * weight.out_features for weight in weights)


def markdown(records: list[dict]) -> str:
    lines = [" | ".join(("", *COLUMNS, "")).strip(), "|---" * len(COLUMNS) + "|"]
    for r in records:
        cells = (
            r["format"],
            f"{r['bits']:.2f}",
            f"{r['sparsity']:.0%}",
            f"{r['achieved_sparsity']:.1%}",
            f"{r['perplexity']:.2f}",
            f"{r['tokens_per_s']:.1f}",
            f"{r['bytes_per_token'] / 1e6:.0f}",
            f"{r['tokens_per_s'] * r['bytes_per_token'] / 1e9:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", nargs="+", required=True, help="a model's checkpoints, the first one unquantized"
    )
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5, 0.65], help="nominal")
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="text, .jsonl files or folders")
    parser.add_argument("--context", type=positive_int, default=1024, help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=positive_int, help="windows to score, spread over the text (default: all)")
    parser.add_argument("--new_tokens", type=positive_int, default=64, help="to decode a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)

    device, folders = pick_device(options.device), list(map(open_checkpoint, options.checkpoint))
    tokenizer = Tokenizer.load(folders[0])
    args = model_args(read_config(folders[0]))
    ids = read_ids(options.text, tokenizer, args)
    if not 2 <= options.context <= args.max_position:
        raise ValueError(f"--context {options.context} exceeds what this model was made for, or is below 2")
    windows = cut_windows(ids, options.context, options.context, options.windows, tokenizer.prefix)
    if not windows:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window: use a smaller --context")
    prompt = windows[0][0][:17]  # real text, whose sparsity the thresholds are for
    rows, scores = [], []
    with tqdm(total=len(windows) * options.context * len(options.sparsity) * len(folders), unit="token") as progress:
        for folder in folders:
            model, calibration = load_model(folder, device), open_calibration(folder, device=device)
            for nominal in options.sparsity:
                set_sparsity(model, calibration, nominal)
                scores.append((evaluate(model, windows, 1, nominal, progress), bits_a_weight(model)))
            decoders = make_decoders(model, calibration, prompt, options.new_tokens, options.sparsity)
            rows += [decoder.row() for decoder in decoders]
    measure(rows, options.rounds, bandwidth_meter(device))
    about = describe(folders[0].resolve().name, device, format_of(model)) | {
        "benchmark": "table",
        "text": [path.name for path in options.text],
        "protocol": f"context {options.context}, {len(windows)} windows, prefill full",
        "new_tokens": options.new_tokens,
    }
    records = []
    for row, (score, bits) in zip(rows, scores, strict=True):
        quality, speed = asdict(score), row.record()
        quality["eval_tokens_per_s"] = quality.pop("tokens_per_s")
        # The speed's own sparsity; the text's stands with the quality.
        speed["decode_achieved_sparsity"] = speed.pop("achieved_sparsity")
        records.append(about | speed | quality | {"bits": bits})
    print(markdown(records))
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
