"""What quality costs in speed, of one GGUF file: ours by sparsity, llama.cpp's by the formats it makes of the file.

    python -m teal_fast.benchmarks.tradeoff --gguf model.gguf --text wiki.test.raw --windows 40 --out tradeoff.json

Both programs score the same windows, as benchmarks/agree.py does; ours with all tokens of a window but the first
sparsified. A row's loss is that over what its program scores on the file itself, dense. Then all rows decode in turns,
in one process, as in benchmarks/decode.py. Prints one JSON line of records; --out writes the same, and
report/results.py draws them.
"""

import argparse
import statistics
import uuid
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from tqdm import tqdm

from teal_fast.benchmarks.agree import PROMPT, UNSCORED, WINDOW, Scorer, cut, vocabulary_of
from teal_fast.benchmarks.bandwidth import bandwidth_meter
from teal_fast.benchmarks.decoder import make_decoders
from teal_fast.benchmarks.peer_llama import FILE, load, requantized, rows
from teal_fast.benchmarks.peers import check_installed
from teal_fast.benchmarks.rows import Row, Task, measure
from teal_fast.calibration.corpus import read_ids
from teal_fast.cli import ModelChoice, Opened, open_model, positive_int, run, sparsity
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, window_loss
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.demo import find_gguf
from teal_fast.sparse_model import Phase, format_of
from teal_fast.weights.output import output_weight

FORMATS = ("q8_0", "q5_k_m", "q3_k_m", "q2_k")


@dataclass(frozen=True)
class Plan:
    """sparsities: of our rows, 0 first. formats: that llama.cpp requantizes the file to, which is a row itself."""

    sparsities: list[float]
    formats: list[str]
    new_tokens: int
    rounds: int


@torch.no_grad()
def our_losses(opened: Opened, windows: list[list[int]], sparsities: list[float]) -> list[list[float]]:
    """The mean loss of each window in nats, at each sparsity."""
    model, found = opened.model, []
    output = output_weight(model.output)
    for nominal in sparsities:
        set_sparsity(model, opened.calibration, nominal)
        turn = tqdm(windows, f"{nominal:.0%}", unit="window")
        found.append([window_loss(model, output, window, UNSCORED, Phase(1)).mean().item() for window in turn])
    set_sparsity(model, opened.calibration, 0.0)
    return found


def their_losses(path: Path, windows: list[list[int]], vocab_size: int) -> list[float]:
    scorer = Scorer(load(path), vocab_size, [0], WINDOW - 1)
    return [scorer.loss(window) for window in tqdm(windows, path.stem[-12:], unit="window")]


def loss_fields(losses: list[float], dense: list[float]) -> dict:
    """A row's loss over that of the file itself, in nats, and its standard error over the windows."""
    over = [mine - own for mine, own in zip(losses, dense, strict=True)]
    error = statistics.stdev(over) / sqrt(len(over)) if over[1:] else None
    return {"loss": statistics.fmean(losses), "loss_over_file": statistics.fmean(over), "loss_error": error}


def compare(opened: Opened, gguf: Path, text: list[Path], windows: int | None, plan: Plan) -> list[dict]:
    """The records of all rows."""
    size, bos = vocabulary_of(load(gguf))
    cuts = cut(read_ids(text, opened.tokenizer, opened.model.args), windows, bos)
    formats = [FILE, *plan.formats]
    files = [gguf if format == FILE else requantized(gguf, format) for format in formats]
    ours, theirs = our_losses(opened, cuts, plan.sparsities), [their_losses(path, cuts, size) for path in files]
    scores = [loss_fields(losses, program[0]) for program in (ours, theirs) for losses in program]

    prompt = cuts[0][:PROMPT]  # real text, whose sparsity the thresholds are for
    decoders = make_decoders(opened.model, opened.calibration, prompt, plan.new_tokens, plan.sparsities)
    all_rows: list[Row] = [decoder.row() for decoder in decoders]
    task = Task(gguf, size, [prompt], plan.new_tokens, opened.device, format_of(opened.model))
    for format in formats:
        all_rows += rows(task, format)
    for row in all_rows:
        row.read = None
    measure(all_rows, plan.rounds, bandwidth_meter(opened.device))
    about = describe(opened.name, opened.device, format_of(opened.model)) | {
        "benchmark": "tradeoff",
        "run": uuid.uuid4().hex[:12],
        "text": [path.name for path in text],
        "protocol": f"context {WINDOW}, second half of {len(cuts)} windows, prefill full",
        "tokens": len(cuts) * (WINDOW - UNSCORED),
        "new_tokens": plan.new_tokens,
    }
    return [about | row.record() | score for row, score in zip(all_rows, scores, strict=True)]


def print_record(record: dict) -> None:
    name = record["peer"] or f"ours, {record['sparsity']:.0%}"
    error = "" if record["loss_error"] is None else f" ± {record['loss_error']:.4f}"
    print(f"{name:<20} {record['tokens_per_s']:>7.1f} tokens/s  {record['loss_over_file']:+.4f}{error} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="the file (default: the demo's)")
    parser.add_argument(
        "--sparsity", type=sparsity, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], help="nominal, 0 first"
    )
    parser.add_argument("--formats", nargs="*", default=FORMATS, help="of llama.cpp (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="files or folders of text")
    parser.add_argument("--windows", type=positive_int, help=f"of {WINDOW} tokens, spread over the text (default: all)")
    parser.add_argument("--new_tokens", type=positive_int, default=64, help="tokens a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    if options.sparsity[0]:
        raise ValueError(f"--sparsity begins with {options.sparsity[0]:g}, expected 0: losses are counted from there")
    check_records_path(options.out)
    check_installed([("llama.cpp", FILE)])
    gguf = options.gguf or find_gguf()
    opened = open_model(ModelChoice(str(gguf), "cpu"))
    plan = Plan(options.sparsity, list(options.formats), options.new_tokens, options.rounds)
    records = compare(opened, gguf, options.text, options.windows, plan)
    for record in records:
        print_record(record)
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
