"""Times a prompt's way through a model in several formats of storage, in one process and interleaved.

    python -m teal_fast.benchmarks.prompts --shapes llama-3-8b --formats dense int8 int4 --tokens 12 128 512 2048
    python -m teal_fast.benchmarks.prompts --checkpoint demo checkpoints/demo-int8 --tokens 5 100 512

Prompts are computed densely, uncompiled, as generate.py does by default, on a CPU by its step where that is faster.
Each round takes every format once at every length; the median over rounds is reported, and `ratio`, the median of its
times over the first one's in the same round. The first round warms up.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import torch

from teal_fast.benchmarks.models import Choice
from teal_fast.benchmarks.rows import random_prompt, take_turns
from teal_fast.benchmarks.shapes import SHAPES
from teal_fast.cli import open_checkpoint, pick_device, positive_int, run
from teal_fast.engine.measure import cache_length
from teal_fast.engine.prefill import longest_by_steps, prefill, prefill_by_steps
from teal_fast.engine.steps import PlainStep, Step, fast_step
from teal_fast.evaluation.record import check_records_path, describe, write_records
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import format_of
from teal_fast.weights.formats import DTYPES, FORMATS


@torch.no_grad()
def seconds(model: Transformer, step: Step, cache: KVCache, prompt: list[int]) -> float:
    """From the call to the first token, as a user waits for it."""
    started = time.perf_counter()
    if len(prompt) <= longest_by_steps(model, step):
        logits = prefill_by_steps(step, prompt)
    else:
        logits = prefill(model, cache, torch.tensor([prompt], device=model.norm.weight.device))
    logits.argmax().item()
    return time.perf_counter() - started


def benchmark(name: str, choice: Choice, lengths: list[int], turns: int) -> list[dict]:
    """The records of prompts of these lengths in every format, over so many rounds."""
    models, device = [model for model, _ in choice.load(calibrated=False)], choice.device
    caches = [model.new_cache(1, cache_length(model, max(lengths))) for model in models]
    make_step = PlainStep if torch.device(device).type == "cuda" else fast_step  # a captured one reads no prompts
    steps = [make_step(model, cache) for model, cache in zip(models, caches, strict=True)]
    cases = [(*each, tokens) for tokens in lengths for each in zip(models, steps, caches, strict=True)]
    prompts = {n: random_prompt(models[0].args.vocab_size, n) for n in lengths}
    timed = [functools.partial(seconds, *each, prompts[tokens]) for *each, tokens in cases]
    results = [rounds for rounds, _ in take_turns(timed, turns, lambda: 0.0, "prompts")]
    first = {tokens: rounds for (model, *_, tokens), rounds in zip(cases, results, strict=True) if model is models[0]}
    common = describe(name, device, format_of(models[0])) | {"benchmark": "prompts"}
    return [
        common
        | {
            "format": format_of(model),
            "prompt_tokens": tokens,
            "seconds": statistics.median(rounds),
            "seconds_rounds": rounds,
            "ratio": statistics.median(own / other for own, other in zip(rounds, first[tokens], strict=True)),
        }
        for (model, *_, tokens), rounds in zip(cases, results, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", nargs="+", help="a model's converted checkpoints")
    what.add_argument("--shapes", choices=SHAPES, help="random weights in this model's shapes")
    parser.add_argument("--formats", nargs="+", choices=("dense", *FORMATS), default=["dense"], help="of these")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="computation type (default: the stored one; bf16)")
    parser.add_argument("--tokens", type=positive_int, nargs="+", default=[12, 128, 512], help="prompt lengths")
    parser.add_argument("--rounds", type=positive_int, default=9, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    name = options.shapes or open_checkpoint(options.checkpoint[0]).resolve().name
    device, checkpoints = pick_device(options.device), tuple(options.checkpoint or ())
    choice = Choice(device, checkpoints, options.shapes, tuple(options.formats), options.dtype)
    records = benchmark(name, choice, options.tokens, options.rounds)
    for record in records:
        print(
            f"{record['model']:<14} {record['format']:<5} {record['prompt_tokens']:>5} tokens  "
            f"{record['seconds'] * 1e3:>8.1f} ms  {record['ratio']:.2f}x of {records[0]['format']}"
        )
    if options.out:
        write_records(options.out, records)


if __name__ == "__main__":
    run(main)
