"""What a GPU does for a token, kernel by kernel: in the step of Triton, eight launches a layer, and in three stages.

    python -m teal_fast.benchmarks.timeline --shapes llama-3-8b --formats dense int8 int4 --out timeline-h200.json

Random weights, thresholds calibrated on random tokens. `us` is a token's time by CUDA events without the profiler,
`drawn_us` the same where the next token is drawn (temperature 0.8, top-k 200) and not the likeliest. `kernels` is one
replay of the captured step as PyTorch's profiler saw it: of each its number in `names`, the nanoseconds from the first
one's begin, and those that it took, with ";" between. A kernel may begin, and wait, while the one before it runs.
report/timeline.py draws the records. Prints one JSON line of them; --out writes the same.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from teal_fast.benchmarks.models import Choice
from teal_fast.benchmarks.shapes import SHAPES
from teal_fast.benchmarks.tune import CONTEXT, START, step_microseconds
from teal_fast.cli import pick_device, run
from teal_fast.cli import sparsity as fraction
from teal_fast.engine.cache import new_cache
from teal_fast.engine.cuda_step import CapturedStep
from teal_fast.engine.sampling import GREEDY, Sampling
from teal_fast.engine.staged_step import StagedStep, build_stages
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.files.calibration import set_sparsity
from teal_fast.model import Transformer
from teal_fast.sparse_model import format_of

REPLAYS = 4  # under the profiler, of which the last counts
DRAWN = Sampling(0.8, top_k=200)  # as generate.py draws by default


def traced(step: StagedStep | CapturedStep) -> dict:
    """The kernels of one replay, by the fields of a record."""
    step(step.token.clone(), torch.tensor([START]))
    torch.cuda.synchronize()
    graph = step.graphs[False, False] if isinstance(step, StagedStep) else step.graph
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            graph.replay()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = sorted((event["ts"], event["dur"], event["name"]) for event in events if event.get("cat") == "kernel")
    if not found or len(found) % REPLAYS:
        raise ValueError(f"the profiler saw {len(found)} kernels in {REPLAYS} replays: expected as many in each")
    last = found[-len(found) // REPLAYS :]
    names = list(dict.fromkeys(name for _, _, name in last))
    kernels = (
        f"{names.index(name)} {1000 * (ts - last[0][0]):.0f} {1000 * duration:.0f}" for ts, duration, name in last
    )
    return {"names": names, "kernels": ";".join(kernels)}


@torch.no_grad()
def measure(model: Transformer) -> list[dict]:
    """A record for either step at the thresholds now set, without what they have in common."""
    cache, records = new_cache(model, CONTEXT), []
    for name in ("triton", "stages"):
        step = CapturedStep(model, cache) if name == "triton" else StagedStep(model, cache, build_stages(model))
        record = {"step": name, "us": step_microseconds(step)}
        if isinstance(step, StagedStep):
            step.draw(DRAWN, 1234)
            record["drawn_us"] = step_microseconds(step)
            step.draw(GREEDY, 0)
        records.append(record | traced(step))
        shown = ", ".join(f"{key} {value:.1f}" for key, value in record.items() if key != "step")
        print(f"{format_of(model)} {name}: {shown}, {records[-1]['kernels'].count(';') + 1} kernels", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b", help="random weights in this model's shapes")
    parser.add_argument("--formats", nargs="+", choices=("dense", "int8", "int4"), default=["dense", "int8", "int4"])
    parser.add_argument("--sparsity", type=fraction, default=0.5, help="nominal (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    device, records = pick_device("cuda"), []
    common = describe(options.shapes, device, "")
    common |= {"benchmark": "timeline", "sparsity": options.sparsity, "context": START}
    for format in options.formats:
        ((model, calibration),) = Choice(device, shape=options.shapes, formats=(format,)).load()
        set_sparsity(model, calibration, options.sparsity)
        records += [common | {"format": format_of(model)} | record for record in measure(model)]
        del model, calibration
        torch.cuda.empty_cache()
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
