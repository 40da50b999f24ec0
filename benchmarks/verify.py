"""The verification of drafts on a GPU: its time beside that of a dense step, and cycles of drafts and verification.

    python -m teal_fast.benchmarks.verify --shapes llama-3-8b --out verify.json

Random weights. First a captured pass over 8 tokens beside the dense step of one token of the same model, in each
format, by turns. Then cycles: some tokens drafted by a quantized copy, at a sparsity, and verified with the token
before them by the unquantized model; the host reads once a cycle, as the engine does. `speedup` is over the dense step,
had each draft stood with a probability (`acceptance`) if those before it did.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from teal_fast.benchmarks.shapes import COMMON, SHAPES, calibrate_on_random_tokens, random_model
from teal_fast.cli import pick_device, run
from teal_fast.engine.speculation.drafters import DraftModel, ModelDrafter, likeliest
from teal_fast.engine.staged_step import StagedStep, build_stages
from teal_fast.engine.verify_step import TOKENS, VerifyStep
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.files.calibration import set_sparsity
from teal_fast.kernels.decode_stages import SHORT
from teal_fast.model import KVCache, Transformer
from teal_fast.weights.formats import Format

FORMATS = {"bf16": None, "int8": Format("int8"), "int4": Format("int4", 128)}
ACCEPTANCES = (0.7, 0.8, 0.85, 0.9)
DRAFTS = (1, 2, 3, 4, 5, 7)
REPEATS, ROUNDS = 20, 7  # of a round, by turns


def milliseconds(functions: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Medians over rounds in which each takes its turn, by CUDA events."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            function()
            begin.record()
            for _ in range(REPEATS):
                function()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / REPEATS)
    return {name: statistics.median(found) for name, found in times.items()}


def staged(model: Transformer, cache: KVCache) -> StagedStep:
    return StagedStep(model, cache, build_stages(model))


def time_passes(model: Transformer, cache: KVCache, step: StagedStep, format: str, contexts: list[int]) -> list[dict]:
    """A pass over TOKENS tokens beside one step at 0 %, at each context."""
    verify, records = VerifyStep(model, cache), []
    for context in contexts:
        step(torch.tensor([[3]]), torch.tensor([context]))
        # Each of its replays is one position further: 147 in all.
        ways = {"dense": step.graphs[min(context + 1, step.longest) > SHORT, False].replay}
        verify.dense(list(range(3, 3 + TOKENS)), context, TOKENS)
        found = milliseconds(ways | {"verify": verify.graph.replay})
        for name, ms in found.items():
            tokens = 1 if name == "dense" else TOKENS
            record = {"mode": name, "format": format, "context": context, "tokens": tokens, "ms": ms}
            records.append(record | {"of_dense": ms / found["dense"]})
            print(f"{format} {name} after {context}: {ms:.3f} ms, {ms / found['dense']:.3f}x dense", flush=True)
    return records


def time_cycles(drafter: ModelDrafter, verify: VerifyStep, context: int, dense_ms: float, acceptances) -> list[dict]:
    """Cycles over the same place of the text, of which nothing is accepted."""
    text, records = list(range(3, 4 + context)), []
    for count in DRAFTS:
        times, drafting = [], []
        for i in range(4 + 3 * REPEATS):
            began, events = time.perf_counter(), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            drafts = drafter.propose(text, count, likeliest)
            events[1].record()
            verify.dense([text[-1], *(draft.id for draft in drafts)], context, count + 1)
            verify.read()
            if i >= 4:
                times.append(1000 * (time.perf_counter() - began))
                drafting.append(events[0].elapsed_time(events[1]))
        ms, draft_ms = statistics.median(times), statistics.median(drafting)
        record = {"mode": "cycle", "drafts": count, "context": context, "ms": ms, "draft_ms": draft_ms}
        for acceptance in acceptances:
            tokens = sum(acceptance**n for n in range(count + 1))
            found = {"acceptance": acceptance, "tokens_per_cycle": tokens, "tokens_per_s": 1000 * tokens / ms}
            records.append(record | found | {"dense_ms": dense_ms, "speedup": dense_ms * tokens / ms})
        rates = ", ".join(f"{r['acceptance']}: {r['speedup']:.2f}x" for r in records[-len(acceptances) :])
        print(f"cycle of {count} drafts after {context}: {ms:.3f} ms ({draft_ms:.3f} drafting); {rates}", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[5, 1000], help="tokens before the first one timed")
    parser.add_argument("--draft_format", choices=("int8", "int4"), default="int4")
    parser.add_argument("--draft_sparsity", type=float, default=0.5)
    parser.add_argument("--acceptance", type=float, nargs="*", default=[], help="measured ones, besides the usual")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    device, config = pick_device("cuda"), COMMON | SHAPES[options.shapes]
    common = describe(options.shapes, device, "bf16") | {"benchmark": "verify"}
    records, length = [], max(options.contexts) + 1024
    with torch.no_grad():
        for format in sorted(FORMATS, key=lambda name: name == "bf16"):  # bf16 last: its model also verifies
            model = random_model(config, device, torch.bfloat16, format=FORMATS[format])
            cache = model.new_cache(1, length)
            step = staged(model, cache)
            records += time_passes(model, cache, step, format, options.contexts)
            if format == options.draft_format:
                draft = model
            del step
            gc.collect()
        calibration = calibrate_on_random_tokens(draft)
        set_sparsity(draft, calibration, options.draft_sparsity)
        drafter = ModelDrafter(DraftModel("draft", draft, calibration, True), staged(draft, cache), length)
        verify = VerifyStep(model, cache)
        for context in options.contexts:
            dense = next(
                r["ms"] for r in records if (r["mode"], r["format"], r["context"]) == ("dense", "bf16", context)
            )
            about = {"draft_format": options.draft_format, "draft_sparsity": options.draft_sparsity, "format": "bf16"}
            cycles = time_cycles(drafter, verify, context, dense, [*ACCEPTANCES, *options.acceptance])
            records += [about | record for record in cycles]
    records = [common | record for record in records]
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
