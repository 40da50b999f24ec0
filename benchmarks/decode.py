"""Times single-stream decoding at several sparsities, in one process and interleaved, so that ratios can be trusted.

    python -m benchmarks.decode --checkpoint demo --sparsity 0 0.25 0.4 0.5

Each round decodes once at every sparsity; the median over rounds is reported, with the extremes. The read bandwidth
that the shares refer to is measured in the same run. Prints one JSON line of records; --out writes the same.
"""

import argparse
import json
import statistics
import time
import uuid
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import DTYPES, find_checkpoint, new_file
from cli import add_model_arguments, positive_int, run, sparsity
from decode import Sample, achieved_sparsity, decode, decode_step, fast_step
from generate import cache_length
from record import describe
from sampling import Sampling
from sparse_model import bytes_per_token, load_calibration, load_model, pick_device, set_sparsity

GREEDY = Sampling(0.0)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large buffer reads, best of several: what a decode step could hope for."""
    values = torch.ones(1 << 28 if device.type == "cuda" else 1 << 26, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        values.sum().item()
        best = min(best, time.perf_counter() - started)
    return values.nbytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5], help="nominal")
    parser.add_argument("--prompt_tokens", type=positive_int, default=5, help="tokens (default: %(default)s)")
    parser.add_argument("--new_tokens", type=positive_int, default=64, help="tokens a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decode step")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()

    folder, device = find_checkpoint(options.checkpoint), pick_device(options.device)
    calibration = load_calibration(folder, device=device)
    model = load_model(folder, device, DTYPES.get(options.dtype))
    model.setup_caches(1, cache_length(model, options.prompt_tokens + options.new_tokens))
    step = fast_step(model) if options.compile else decode_step
    bandwidth = read_bandwidth(device)
    prompt = torch.randint(model.args.vocab_size, (options.prompt_tokens,), generator=torch.Generator().manual_seed(0))
    samples: dict[float, list[Sample]] = {nominal: [] for nominal in options.sparsity}
    achieved = {}
    for number in tqdm(range(options.rounds + 1), desc="decoding", unit="round"):
        for nominal in options.sparsity:
            set_sparsity(model, calibration, nominal)
            sample = Sample(options.prompt_tokens)
            stop = frozenset()  # every round decodes the same number of tokens
            for _ in decode(
                model, step, prompt.tolist(), options.new_tokens, GREEDY, torch.Generator(device), stop, sample
            ):
                pass
            if number == 0:
                achieved[nominal] = achieved_sparsity(model, sample)["all"]
            else:  # the first round warms up
                samples[nominal].append(sample)

    common = describe(folder, device, model.norm.weight.dtype) | {
        "benchmark": "decode",
        "run": uuid.uuid4().hex[:8],
        "mode": "compiled" if options.compile else "plain",
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "read_gb_per_s": bandwidth / 1e9,
    }
    records = []
    for nominal in options.sparsity:
        rates = [sample.tokens_per_s for sample in samples[nominal]]
        read = bytes_per_token(model, achieved[nominal])
        records.append(
            common
            | {
                "sparsity": nominal,
                "achieved_sparsity": achieved[nominal],
                "tokens_per_s": statistics.median(rates),
                "tokens_per_s_spread": [min(rates), max(rates)],
                "bytes_per_token": read,
                "bandwidth_share": read * statistics.median(rates) / bandwidth,
            }
        )
        print(f"{nominal:>5.0%}  {records[-1]['tokens_per_s']:>7.1f} tokens/s  {read / 1e6:>7.0f} MB a token")
    if options.out:
        with new_file(options.out) as temporary:
            temporary.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(records))


if __name__ == "__main__":
    run(main)
