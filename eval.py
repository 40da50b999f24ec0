"""Perplexity of a model at a list of sparsities, on text that it was not calibrated on; or its answers to tasks.

    python eval.py --checkpoint demo --text data/evaluation --sparsity 0 0.25 0.4 0.5
    python eval.py --checkpoint demo --tasks hellaswag piqa --task_data data/tasks --limit 200 --sparsity 0 0.4

For perplexity the text is tokenized whole and cut into windows; the first position of a window is not scored. BOS
stands where the tokenizer puts it, at the start of a document, not of a window. docs/usage.md says how the perplexities
of llama.cpp and lm-evaluation-harness differ.
`--prefill` chooses the tokens of a window that are sparse: full, all but the first (an attention sink); half, the
second half, as TEAL's release does; dense, none. In a task (evaluation/tasks.py) it chooses those of the context; the
continuation is always sparse, as decoded tokens are. This choice moves a score as much as the calibration method does,
so it stands beside every number. `--baseline` zeroes weights instead (evaluation/pruning.py), for comparison.
"""

import argparse
from functools import partial
from pathlib import Path

from teal_fast.calibration.corpus import read_ids
from teal_fast.cli import (
    ModelChoice,
    add_model_arguments,
    open_model,
    parse_with_model,
    positive_int,
    run,
    sparsity,
)
from teal_fast.evaluation.models import models_at, pruned_models, wanda_batch
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, WindowProtocol, evaluate_text
from teal_fast.evaluation.pruning import BASELINES
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.evaluation.tasks import PREFILLS, evaluate_tasks, read_task
from teal_fast.files.load import load_model
from teal_fast.files.paths import DATA
from teal_fast.sparse_model import format_of
from teal_fast.weights.formats import DTYPES

TASK_DATA = DATA / "tasks"
WANDA_TEXT = DATA / "calibration"


def print_perplexities(records: list[dict]) -> None:
    """One line for each record of `evaluate_text`."""
    print(f"{'sparsity':>8}  {'achieved':>8}  {'perplexity':>10}  {'±':>6}  {'tokens/s':>8}   by tensor kind")
    for record in records:
        kinds = "  ".join(f"{kind} {value:.1%}" for kind, value in record["achieved_by_kind"].items())
        error = "-" if record["standard_error"] is None else f"{record['standard_error']:.3f}"
        print(
            f"{record['sparsity']:>8.0%}  {record['achieved_sparsity']:>8.1%}  {record['perplexity']:>10.3f}  "
            f"{error:>6}  {record['tokens_per_s']:>8.0f}   {kinds}"
        )


def print_tasks(records: list[dict]) -> None:
    """One line for each record of `evaluate_tasks`."""
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


def parse_arguments() -> tuple[argparse.Namespace, ModelChoice]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="text, .jsonl files or folders")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5], help="nominal")
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the checkpoint's own)")
    parser.add_argument("--prefill", choices=PREFILLS, default="full", help="which tokens are sparse")
    parser.add_argument("--context", type=positive_int, default=1024, help="tokens a window (default: %(default)s)")
    parser.add_argument("--stride", type=positive_int, help="tokens between windows (default: the context)")
    parser.add_argument("--windows", type=positive_int, help="windows to score, spread over the text (default: all)")
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="score tasks instead of text, e.g. hellaswag lambada"
    )
    parser.add_argument(
        "--task_data", type=Path, default=TASK_DATA, help="folder of their NAME.jsonl (see evaluation/tasks.py)"
    )
    parser.add_argument("--limit", type=positive_int, help="items of each task, spread over it (default: all)")
    parser.add_argument("--baseline", choices=BASELINES, help="zero this share of the weights instead, to compare with")
    parser.add_argument(
        "--wanda_text", type=Path, nargs="+", default=[WANDA_TEXT], help="what Wanda measures inputs on"
    )
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    return parse_with_model(parser)


def main() -> None:
    options, choice = parse_arguments()
    check_records_path(options.out)
    pruned = options.baseline is not None
    opened = open_model(choice, calibrated=any(options.sparsity) and not pruned)
    model, tokenizer = opened.model, opened.tokenizer
    if pruned:
        load_again = partial(load_model, opened.folder, opened.device, DTYPES.get(options.dtype))
        wanda = options.baseline == "wanda" and any(options.sparsity)
        ids = read_ids(options.wanda_text, tokenizer, model.args) if wanda else []
        tokens = wanda_batch(ids, model.args.max_position, opened.device, tokenizer.prefix) if wanda else None
        models = pruned_models(load_again, options.baseline, options.sparsity, tokens)
    else:
        models = models_at(model, opened.calibration, options.sparsity)
    if options.tasks:
        tasks = {name: read_task(options.task_data, name, options.limit) for name in options.tasks}
        records = evaluate_tasks(models, len(options.sparsity), tokenizer, tasks, options.prefill, pruned)
        print(f"tasks ({records[0]['protocol']})")
        print_tasks(records)
    else:
        protocol = WindowProtocol(options.context, options.stride, options.windows, options.prefill)
        windows = protocol.cut(read_ids(options.text, tokenizer, model.args), model.args.max_position, tokenizer.prefix)
        records = evaluate_text(models, len(options.sparsity), windows, protocol, pruned)
        names = [path.name for path in options.text]
        print(f"perplexity on {', '.join(names)} ({records[0]['protocol']})")
        print_perplexities(records)
        records = [{"text": names} | record for record in records]
    common = describe(opened.name, opened.device, format_of(model)) | {
        "benchmark": "eval",
        "baseline": options.baseline,
        "calibration": opened.calibration.origin if opened.calibration else None,
    }
    records = [common | record for record in records]
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
