"""Measures how the launches of a decode step are best cut on this GPU, and keeps it for all later runs.

    teal-fast tune --checkpoint checkpoints/llama-3-8b
    teal-fast tune --shapes llama-3-8b llama-3.2-1b --formats dense int8 int4

One constant after another is swept, each beside the best of those before, by the time of captured steps at a sparsity.
What was best is written to $XDG_CACHE_HOME/teal-fast/tuning/CARD.json, by the model's shape, if it is faster than the
choice made without it by more than the noise. Text stays the same up to rounding.
"""

import argparse
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import torch

from teal_fast.benchmarks.models import Choice
from teal_fast.benchmarks.shapes import SHAPES
from teal_fast.cli import MAX_SPARSITY, pick_device, run
from teal_fast.cli import sparsity as fraction
from teal_fast.engine.cache import new_cache
from teal_fast.engine.cuda_step import CapturedStep
from teal_fast.engine.staged_step import StagedStep, build_stages, stage_shape
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.store import check_writable, new_file
from teal_fast.kernels.nvrtc import CudaError
from teal_fast.kernels.stage_shape import GRANULES, THREADS, TUNED, StageShape, cut
from teal_fast.kernels.tuning import key_of, own_file, read_tuned
from teal_fast.model import Transformer
from teal_fast.sparse_model import format_of
from teal_fast.weights.formats import FORMATS

CONTEXT, START, STEPS, ROUNDS = 256, 32, 60, 5  # positions of the cache, the first one timed, steps a round
GAIN = 0.995  # of the time: less is noise


def candidates(shape: StageShape, processors: int) -> dict[str, list[int]]:
    """What is tried of each constant, in this order."""
    chosen, granule = cut(shape, processors), GRANULES[shape.bits_m]
    unrolled = [1, 2, 3, 4, 6, 8]
    channels = [count for count in range(granule, THREADS + 1, granule) if count <= 2 * chosen["CHANNELS"]]
    return {"unroll_m": unrolled, "channels": channels, "unroll_a": unrolled, "sharers": [1, 2, 3, 4, 6, 8]}


def microseconds(model: Transformer, wanted: dict[str, int]) -> float:
    """Of a step with its launches cut so; infinite where no kernel can be built so."""
    try:
        stages = build_stages(model, **wanted)
    except (ValueError, CudaError):
        return float("inf")
    return step_microseconds(StagedStep(model, new_cache(model, CONTEXT), stages))


def step_microseconds(step: StagedStep | CapturedStep) -> float:
    """Of a captured step over a cache of CONTEXT, the median of rounds."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 2)]
    position = START
    for event in events:
        event.record()
        for _ in range(STEPS if position > START else 3):
            step(step.token, torch.tensor([position]))
            position = START + 1 + (position - START) % (CONTEXT - START - 1)
    torch.cuda.synchronize()
    return 1000 / STEPS * statistics.median(a.elapsed_time(b) for a, b in pairwise(events[1:]))


def tune(model: Transformer, processors: int) -> tuple[dict[str, int], float, float]:
    """The best constants for a model at the thresholds now set; microseconds of a step without them and with them."""
    shape = stage_shape(model)
    chosen = {name: cut(shape, processors)[name.upper()] for name in TUNED}
    try:
        build_stages(model, **chosen)
    except CudaError as error:
        raise ValueError(str(error)) from error
    microseconds(model, chosen)  # warms up
    default = best = microseconds(model, chosen)
    wanted = dict(chosen)
    for name, values in candidates(shape, processors).items():
        times = {value: microseconds(model, wanted | {name: value}) for value in values}
        value = min(times, key=times.__getitem__)
        shown = ", ".join(f"{v}: {time:.1f}" for v, time in times.items() if time < float("inf"))
        print(f"  {name} {shown} us", file=sys.stderr)
        if times[value] < GAIN * times.get(wanted[name], best):
            wanted, best = wanted | {name: value}, times[value]
    return {name: value for name, value in wanted.items() if value != chosen[name]}, default, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", nargs="+", help="a model's checkpoints, which are calibrated")
    what.add_argument("--shapes", nargs="+", choices=SHAPES, help="random weights in these models' shapes")
    parser.add_argument(
        "--formats", nargs="+", choices=("dense", *FORMATS), default=["dense"], help="of the random weights"
    )
    parser.add_argument("--device", help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--sparsity", type=fraction, default=0.5, help=f"0 to {MAX_SPARSITY} (default: 0.5)")
    parser.add_argument("--out", type=Path, help="the file to write (default: the cache's own)")
    options = parser.parse_args()
    device = pick_device(options.device or "cuda")
    if device.type != "cuda":
        raise ValueError(f"--device {options.device}: the step on a CPU has nothing to tune, give a CUDA device")
    gpu = torch.cuda.get_device_properties(device)
    path = options.out or own_file(gpu.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    found = read_tuned(path) if path.is_file() else {}
    if options.checkpoint:
        choices = [Choice(device, tuple(options.checkpoint))]
    else:
        choices = [Choice(device, shape=name, formats=(form,)) for name in options.shapes for form in options.formats]
    for choice in choices:
        for model, calibration in choice.load():
            set_sparsity(model, calibration, options.sparsity)
            shape, name = stage_shape(model), choice.shape or "the checkpoint"
            print(f"{name} in {format_of(model)} on {gpu.name}:", file=sys.stderr)
            wanted, default, best = tune(model, gpu.multi_processor_count)
            print(f"{name} in {format_of(model)}: {default:.1f} us a token, {best:.1f} with {wanted or 'nothing else'}")
            found.pop(key_of(shape), None)
            found |= {key_of(shape): wanted} if wanted else {}
            with new_file(path) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n")
        torch.cuda.empty_cache()
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
