"""Times single-stream decoding at several sparsities, in one process and interleaved, so that ratios can be trusted.

    python -m teal_fast.benchmarks.decode --checkpoint demo checkpoints/demo-int8 --sparsity 0 0.25 0.4 0.5
    python -m teal_fast.benchmarks.decode --gguf model.gguf --device cpu --prompt_tokens 12 500 --peers llama.cpp file
    python -m teal_fast.benchmarks.decode --checkpoint demo --device cpu --peers llama.cpp bf16 q8_0 q4_0, transformers
    python -m teal_fast.benchmarks.decode --shapes llama-3-8b --formats dense int8 int4 --dense \\
        --peers transformers, gpt-fast bf16 int8 int4

Each round decodes once in every configuration, then reads each prompt once in every program that has a way to; the
median over rounds is reported, with the extremes. The first round warms up. The read bandwidth that the shares refer to
is measured in between. `--shapes` takes random weights, and thresholds calibrated on random tokens. Prints one JSON
line of records; --out writes the same.

Peers are other programs on the same weights, which lie in the --gguf file, in a --checkpoint that is one, or in the
demo's. We decode the --gguf file too, unless a --checkpoint that was made of it is named. `llama.cpp file` decodes the
file as it is, with other formats a copy of it. On the CPU peers take turns with our rows; on CUDA they need the memory
and come after our model is gone. A row's host share is what a token costs outside the C++ step: Python and drawing it.
"""

import argparse
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from teal_fast.benchmarks.bandwidth import bandwidth_meter
from teal_fast.benchmarks.decoder import Decoder, make_decoders
from teal_fast.benchmarks.models import Choice
from teal_fast.benchmarks.peers import Peer, check_installed, parse_peers, peer_rows
from teal_fast.benchmarks.rows import Task, first_token_ratios, measure, random_prompt, ratios
from teal_fast.benchmarks.shapes import COMMON, SHAPES
from teal_fast.cli import open_checkpoint, pick_device, positive_int, run, sparsity
from teal_fast.engine.measure import profiler
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.files.demo import find_gguf
from teal_fast.sparse_model import dtype_name, format_of
from teal_fast.weights.formats import DTYPES, FORMATS


@dataclass(frozen=True)
class Plan:
    """What is timed: sparsities after prompts of random tokens, for so many rounds, beside other programs."""

    sparsities: list[float]
    prompt_tokens: list[int]
    new_tokens: int
    rounds: int
    eager: bool
    dense: bool
    peers: list[Peer]
    gguf: Path | None
    profile: Path | None


def print_record(record: dict) -> None:
    shares = [f"{record['bandwidth_share']:>4.0%} of read bandwidth"] if "bandwidth_share" in record else []
    shares += [f"host {record['host_share']:.1%}"] if "host_share" in record else []
    if "first_token_s" in record:
        shares.append(f"first token {record['first_token_s']:.2f} s (best {min(record['first_token_s_rounds']):.2f})")
    mode = record["peer"] or f"{record['format']} {record['mode']}"
    print(
        f"{record['model']:<14} {mode:<21} {record['sparsity']:>4.0%} after "
        f"{record['prompt_tokens']:>5}  {record['tokens_per_s']:>7.1f} tokens/s (best "
        f"{record['tokens_per_s_spread'][1]:.1f})  {', '.join(shares)}",
        flush=True,
    )


def benchmark(name: str, choice: Choice, plan: Plan, common: dict) -> list[dict]:
    """The records of one model in all its formats and, where asked for, of the peers on its weights."""
    models = choice.load(calibrated=any(plan.sparsities))
    vocab_size = models[0][0].args.vocab_size
    prompts = [random_prompt(vocab_size, tokens) for tokens in plan.prompt_tokens]
    decoders: list[Decoder] = [
        decoder
        for model, calibration in models
        for prompt in prompts
        for decoder in make_decoders(
            model, calibration, prompt, plan.new_tokens, plan.sparsities, plan.eager, plan.dense
        )
    ]
    rows = [decoder.row() for decoder in decoders]
    about = describe(name, choice.device, format_of(models[-1][0])) | common
    weights = plan.gguf or COMMON | SHAPES.get(name, {})
    task = Task(weights, vocab_size, prompts, plan.new_tokens, choice.device, dtype_name(models[0][0]))
    meter = bandwidth_meter(choice.device)
    others, cuda, memory = [], choice.device.type == "cuda", {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # calibration and models before this one do not count
        measure(rows, plan.rounds, meter)
        if len(models) == 1:
            memory["max_memory_bytes"] = torch.cuda.max_memory_allocated()
    else:
        others += peer_rows(plan.peers, task)
        measure(rows + others, plan.rounds, meter)
    if plan.profile:
        with profiler(plan.profile):
            decoders[-1].decode()
    records = [about | row.record() | memory for row in rows]
    del models, decoders, rows  # peers on CUDA need the memory
    for row in peer_rows(plan.peers, task) if cuda else ():
        measure([row], plan.rounds, meter)  # alone: its one cache would grow with the other prompts
        others.append(row)
    return records + [about | row.record() for row in others]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--checkpoint",
        nargs="+",
        help="a model's checkpoints, such as demo and quantized ones (default: the --gguf file)",
    )
    what.add_argument("--shapes", nargs="+", choices=SHAPES, help="random weights in these models' shapes")
    parser.add_argument(
        "--formats", nargs="+", choices=("dense", *FORMATS), default=["dense"], help="of the random weights"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="computation type (default: the stored one; bf16)")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.25, 0.4, 0.5], help="nominal")
    parser.add_argument("--prompt_tokens", type=positive_int, nargs="+", default=[5], help="(default: 5)")
    parser.add_argument("--new_tokens", type=positive_int, default=64, help="tokens a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="the default, accepted as gpt-fast's flag")
    parser.add_argument("--eager", action="store_true", help="decode by plain PyTorch")
    parser.add_argument(
        "--dense", action="store_true", help="baseline rows: the captured step with cuBLAS, and that in Triton (CUDA)"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        help="programs to time as well: llama.cpp [FORMAT or file], transformers, gpt-fast [FORMAT]",
    )
    parser.add_argument("--gguf", type=Path, help="file with the weights, for peers and without --checkpoint for us")
    parser.add_argument("--profile", type=Path, metavar="TRACE.json", help="profile one more decoding of the last row")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    if options.gguf and not (options.checkpoint or options.shapes):
        options.checkpoint = [str(options.gguf)]
    if not (options.checkpoint or options.shapes):
        parser.error("what is to be timed? name a --checkpoint, a --gguf file or --shapes")
    return options


def find_weights(peers: list[Peer], checkpoints: list[str] | None, gguf: Path | None) -> Path | None:
    """The GGUF file that peers decode; None for peers of random weights. Raises when it is not to be had."""
    if not peers or not checkpoints:
        return None
    if gguf is None and checkpoints[0] == "demo":
        return find_gguf()
    if gguf is None and Path(checkpoints[0]).is_file():
        gguf = Path(checkpoints[0])
    if gguf is None:
        raise ValueError("--peers decode the GGUF file that the checkpoint was converted from: name it with --gguf")
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf} does not exist: expected the checkpoint's GGUF file")
    return gguf


def main() -> None:
    options = parse_arguments()
    device = pick_device(options.device)
    check_records_path(options.out)
    if options.dense and device.type != "cuda":
        raise ValueError("--dense measures cuBLAS: it needs a CUDA device")
    if options.new_tokens < 2:
        raise ValueError(f"--new_tokens {options.new_tokens}: expected at least 2, since the prompt gives the first")
    peers = parse_peers(options.peers)
    check_installed(peers)
    plan = Plan(
        options.sparsity,
        options.prompt_tokens,
        options.new_tokens,
        options.rounds,
        options.eager,
        options.dense,
        peers,
        find_weights(peers, options.checkpoint, options.gguf),
        options.profile,
    )
    common = {"benchmark": "decode", "run": uuid.uuid4().hex[:12], "new_tokens": options.new_tokens}
    records: list[dict] = []
    for shape in options.shapes or [None]:
        checkpoints = tuple(options.checkpoint or ())
        name = shape or open_checkpoint(checkpoints[0]).resolve().name
        choice = Choice(device, checkpoints, shape, tuple(options.formats), options.dtype)
        found = benchmark(name, choice, plan, common)
        for record in found:
            print_record(record)
        print("\n".join(ratios(found) + first_token_ratios(found)), flush=True)
        records += found
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
