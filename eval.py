"""Perplexity of a model at a list of sparsities, on text that it was not calibrated on; or its answers to tasks.

    python eval.py --checkpoint demo --text data/evaluation --sparsity 0 0.25 0.4 0.5
    python eval.py --checkpoint demo --tasks hellaswag piqa --task_data data/tasks --limit 200 --sparsity 0 0.4

For perplexity the text is tokenized whole and cut into windows; the first position of a window is not scored.
`--prefill` says which tokens of a window are sparsified: full, all but the first (an attention sink); half, the second
half, as TEAL's release does; dense, none. Of a task's item (tasks.py) it says the same about the context; what follows
the context is always sparse, as decoded tokens are. The convention moves a score as much as the method does, so it
stands beside every number. `--baseline` zeroes weights instead (pruning.py), to compare with.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from teal_fast.calibration.corpus import read_corpus
from teal_fast.cli import (
    add_model_arguments,
    open_calibration,
    open_checkpoint,
    pick_device,
    positive_int,
    run,
    sparsity,
)
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, Score, cut_windows, evaluate
from teal_fast.evaluation.pruning import METHODS, prune, zeros_by_kind
from teal_fast.evaluation.record import describe, write_records
from teal_fast.evaluation.tasks import PREFILLS, TaskScore, read_task, score_task, summarize
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.files.load import load_model
from teal_fast.files.paths import DATA
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer
from teal_fast.sparse_model import format_of
from teal_fast.weights.formats import DTYPES

TASK_DATA = DATA / "tasks"
WANDA_TEXT = DATA / "calibration"
WANDA_SEQUENCES, WANDA_LENGTH = 16, 512  # read at once, so that memory bounds them
Models = Iterator[tuple[float, Transformer]]  # each with its nominal sparsity


def print_table(scores: list[Score]) -> None:
    print(f"{'sparsity':>8}  {'achieved':>8}  {'perplexity':>10}  {'±':>6}  {'tokens/s':>8}   by tensor kind")
    for score in scores:
        kinds = "  ".join(f"{kind} {value:.1%}" for kind, value in score.achieved_by_kind.items())
        error = "-" if score.standard_error is None else f"{score.standard_error:.3f}"
        print(
            f"{score.sparsity:>8.0%}  {score.achieved_sparsity:>8.1%}  {score.perplexity:>10.3f}  "
            f"{error:>6}  {score.tokens_per_s:>8.0f}   {kinds}"
        )


def print_tasks(records: list[dict]) -> None:
    for record in records:
        parts = []
        for name in ("acc", "acc_norm", "loss"):
            if name in record:
                parts.append(f"{name} {_with_error(record, name)}")
            if f"{name}_change" in record and record["sparsity"]:
                parts[-1] += f" (change {_with_error(record, f'{name}_change', '+')})"
        if "perplexity" in record:
            parts.append(f"perplexity {record['perplexity']:.2f}")
        print(
            f"{record['task']:<14} {record['sparsity']:>4.0%}  achieved {record['achieved_sparsity']:>5.1%}  "
            f"{record['items']} items  {'  '.join(parts)}"
        )


def _with_error(record: dict, name: str, sign: str = "") -> str:
    error = record[f"{name}_error"]
    return f"{record[name]:{sign}.3f} ± {'-' if error is None else f'{error:.3f}'}"


def models_at(
    options: argparse.Namespace, folder: Path, model: Transformer, calibration: Calibration | None, tokenizer: Tokenizer
) -> Models:
    """The model at each sparsity asked for: at its thresholds, or with a baseline loaded and pruned anew."""
    device = model.norm.weight.device
    for nominal in options.sparsity:
        if options.baseline is None:
            if calibration is not None:
                set_sparsity(model, calibration, nominal)
            yield nominal, model
            continue
        fresh = load_model(folder, device, DTYPES.get(options.dtype))
        tokens = None
        if options.baseline == "wanda" and nominal:
            ids = [token for text in read_corpus(options.wanda_text) for token in tokenizer.encode(text)]
            length = min(WANDA_LENGTH, model.args.max_position, len(ids))
            windows = cut_windows(ids, length, length, WANDA_SEQUENCES)
            tokens = torch.tensor([window for window, _ in windows], device=device)
        if nominal:
            prune(fresh, options.baseline, nominal, tokens)
        yield nominal, fresh


def measure_perplexity(
    options: argparse.Namespace, tokenizer: Tokenizer, models: Models, max_position: int
) -> list[dict]:
    """Prints the perplexity of the text at each sparsity and returns the records."""
    ids = [token for text in read_corpus(options.text) for token in tokenizer.encode(text)]
    context = options.context
    if not 2 <= context <= max_position:
        raise ValueError(f"--context {context}: expected 2 to this model's {max_position}")
    stride = options.stride or context
    if stride > context:
        raise ValueError(f"--stride {stride} would skip text: expected at most the context, {context}")
    windows = cut_windows(ids, context, stride, options.windows)
    if not windows:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {context}: use a smaller --context")
    dense_tokens = PREFILLS[options.prefill](context)
    scores = []
    with tqdm(total=context * len(windows) * len(options.sparsity), desc="evaluating", unit="token") as progress:
        for nominal, model in models:
            score = evaluate(model, windows, dense_tokens, nominal, progress)
            if options.baseline:
                zeros = zeros_by_kind(model)
                score = replace(score, achieved_sparsity=zeros.pop("all"), achieved_by_kind=zeros)
            scores.append(score)
    protocol = f"context {context}, stride {stride}, {len(windows)} windows, prefill {options.prefill}"
    names = [path.name for path in options.text]
    print(f"perplexity on {', '.join(names)} ({protocol})")
    print_table(scores)
    return [{"text": names, "protocol": protocol} | asdict(score) for score in scores]


def measure_tasks(options: argparse.Namespace, tokenizer: Tokenizer, models: Models) -> list[dict]:
    """Prints the tasks' metrics and returns the records, with changes from sparsity 0 where that came before."""
    tasks = {name: read_task(options.task_data, name, options.limit) for name in options.tasks}
    protocol = f"zero-shot, prefill {options.prefill}, continuations sparse"
    dense: dict[str, TaskScore] = {}
    records = []
    total = sum(map(len, tasks.values())) * len(options.sparsity)
    with tqdm(total=total, desc="evaluating", unit="item") as progress:
        for nominal, model in models:
            for name, requests in tasks.items():
                score = score_task(model, tokenizer, requests, PREFILLS[options.prefill], progress)
                if options.baseline:
                    score = replace(score, achieved=zeros_by_kind(model))
                if not nominal:
                    dense[name] = score
                fields = summarize(score, dense.get(name))
                records.append({"task": name, "protocol": protocol, "sparsity": nominal} | fields)
    records.sort(key=lambda record: options.tasks.index(record["task"]))
    print(f"tasks ({protocol})")
    print_tasks(records)
    return records


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="text, .jsonl files or folders")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5], help="nominal")
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the checkpoint's own)")
    parser.add_argument("--prefill", choices=PREFILLS, default="full", help="what is sparsified")
    parser.add_argument("--context", type=positive_int, default=1024, help="tokens a window (default: %(default)s)")
    parser.add_argument("--stride", type=positive_int, help="tokens between windows (default: the context)")
    parser.add_argument("--windows", type=positive_int, help="windows to score, spread over the text (default: all)")
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="score tasks instead of text, e.g. hellaswag lambada"
    )
    parser.add_argument("--task_data", type=Path, default=TASK_DATA, help="folder of their NAME.jsonl (see tasks.py)")
    parser.add_argument("--limit", type=positive_int, help="items of each task, spread over it (default: all)")
    parser.add_argument("--baseline", choices=METHODS, help="zero this share of the weights instead, to compare with")
    parser.add_argument(
        "--wanda_text", type=Path, nargs="+", default=[WANDA_TEXT], help="what Wanda measures inputs on"
    )
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    folder, device = open_checkpoint(options.checkpoint), pick_device(options.device)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, device, DTYPES.get(options.dtype))
    thresholds = any(options.sparsity) and options.baseline is None
    calibration = open_calibration(folder, options.calibration, device) if thresholds else None
    models = models_at(options, folder, model, calibration, tokenizer)
    if options.tasks:
        records = measure_tasks(options, tokenizer, models)
    else:
        records = measure_perplexity(options, tokenizer, models, model.args.max_position)
    common = describe(folder.resolve().name, device, format_of(model)) | {
        "benchmark": "eval",
        "baseline": options.baseline,
        "calibration": calibration.origin if calibration else None,
    }
    records = [common | record for record in records]
    print(json.dumps(records))
    if options.out:
        write_records(options.out, records)


if __name__ == "__main__":
    run(main)
