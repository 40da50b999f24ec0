"""Several answers at once: tokens a second by the number of sequences, what they read together, and ways to multiply.

    python -m teal_fast.benchmarks.batch --checkpoint demo --device cpu
    python -m teal_fast.benchmarks.batch --shapes llama-3-8b --formats dense int8 int4 --out batch-h200.json

First decoding: different prompts, greedy, as several users have them, and samples of one prompt, which a random model
has no use for. A batch of 1 is a single stream. Beside the tokens of all sequences a second stands what share of the
sparse layers' bytes a step reads, that is, rows that any sequence keeps, and what a token keeps by itself. Then the
products of a layer, on cold random weights and inputs whose masks are independent: the rows of each token by itself
(`rows`), those that any token keeps once for all (`union`), every row once by the same kernel (`all`), and PyTorch's
dense product of masked inputs (`masked`). Everything takes turns. Prints one JSON line of records; --out writes the
same.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.benchmarks.asked import QUESTIONS
from teal_fast.benchmarks.bandwidth import bandwidth_meter
from teal_fast.benchmarks.kernels import COLD_BYTES, layer_products, time_passes
from teal_fast.benchmarks.models import Choice
from teal_fast.benchmarks.rows import Row, measure, take_turns
from teal_fast.benchmarks.shapes import COMMON, SHAPES
from teal_fast.cli import open_checkpoint, pick_device, positive_int, run, sparsity
from teal_fast.engine.accounting import bytes_per_token
from teal_fast.engine.batch import Batch, batch_logits
from teal_fast.engine.engine import Engine
from teal_fast.engine.measure import cache_length
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.families.config import model_args
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.kernels.sparse_gemm import sparse_gemm
from teal_fast.model import ModelArgs, Transformer
from teal_fast.sparse_model import KEEP_ALL, KINDS, format_of, watch_inputs
from teal_fast.weights.dense import DenseWeight, RowSkippingWeight
from teal_fast.weights.formats import FORMATS, Format

SIZES = (1, 2, 4, 8)
PROMPT_TOKENS = 16  # of a random model's prompts
LOOKED_AT = 4  # steps of a batch whose masks are united
SKIPPED = 0.5  # of each token's channels in the products


@torch.no_grad()
def look(model: Transformer, batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of the sparse layers' bytes, by kind and "all": what a sequence of a batch keeps, and what any keeps.

    The batch must be over, its answers all of one length. Of some steps, which the model makes again in plain PyTorch.
    """
    kept: dict[str, float] = {}
    read: dict[str, float] = {}
    held: dict[str, float] = {}

    def unite(name: str, layer: torch.nn.Module, x: Tensor, _) -> None:
        keeps = layer.dropped(x).logical_not()
        for kind in (KINDS[name.rsplit(".", 1)[1]], "all"):
            for shares, channels in ((kept, keeps.sum() / len(x)), (read, keeps.any(0).sum()), (held, x.shape[-1])):
                shares[kind] = shares.get(kind, 0) + float(channels) * layer.weight.row_bytes

    device, length = model.norm.weight.device, len(batch.rows[0].tokens)
    with watch_inputs(model, unite):
        for place in range(length // LOOKED_AT // 2, length - 1, length // LOOKED_AT):
            tokens = [answer.tokens[place].id for answer in batch.rows]
            positions = [len(answer.request.prompt) + place for answer in batch.rows]
            batch_logits(model, batch.cache, *(torch.tensor(ids, device=device) for ids in (tokens, positions)))
    return tuple({kind: shares[kind] / held[kind] for kind in held} for shares in (kept, read))


@dataclass
class Together:
    """So many sequences of an engine at one sparsity. `what`: prompts or samples."""

    engine: Engine
    what: str
    requests: list[Request]
    kept: dict[str, float] | None = None
    read: dict[str, float] | None = None

    def decode(self) -> float:
        """Tokens a second of all, from the third on: on CUDA the second's step is recorded as a graph."""
        batch = self.engine.batch(self.requests)
        tokens = batch if len(self.requests) > 1 else self.engine.stream(self.requests[0])
        began = count = 0
        for _ in tokens:
            count += 1
            if count == 2 * len(self.requests):
                began = time.perf_counter()
        rate = (count - 2 * len(self.requests)) / (time.perf_counter() - began)
        if self.read is None:
            for _ in batch:  # one sequence has not been decoded as a batch yet
                pass
            self.kept, self.read = look(self.engine.model, batch)
        return rate

    def row(self) -> Row:
        one = self.requests[0]
        about = {"format": format_of(self.engine.model), "mode": self.engine.step.mode, "sparsity": one.sparsity}
        about |= {"sequences": self.what, "batch": len(self.requests), "new_tokens": one.max_new_tokens}
        return Row(about, self.decode, self.details)

    def details(self) -> dict:
        read = bytes_per_token(self.engine.model, 1 - self.read["all"]) / len(self.requests)
        return {"kept": self.kept, "read": self.read, "bytes_per_token": round(read)}


def make_rows(engine: Engine, prompts: list[list[int]], sparsities: list[float], new_tokens: int, samples: bool):
    """A row for each sparsity and number of sequences."""
    rows = []
    for share in sparsities:
        for size in SIZES:
            asked = [Request(prompt, Sampling(0.0), share, new_tokens, ()) for prompt in prompts[:size]]
            rows.append(Together(engine, "prompts", asked).row())
            if samples and size > 1:
                asked = [Request(prompts[0], Sampling(1.0), share, new_tokens, (), seed) for seed in range(size)]
                rows.append(Together(engine, "samples", asked).row())
    return rows


def find_prompts(choice: Choice, vocab_size: int) -> list[list[int]]:
    """Questions to a checkpoint; random tokens, each prompt its own, for a random model."""
    if choice.shape is None:
        tokenizer = Tokenizer.load(open_checkpoint(choice.checkpoints[0]))
        return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS["chat"]]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (max(SIZES), PROMPT_TOKENS), generator=generator).tolist()


# --- products


def make_layer(args: ModelArgs, format: str, device: torch.device) -> list[list[RowSkippingWeight]]:
    """Random weights of a layer's products, each in as many copies as no cache holds of the layer."""
    groups = {"int4": 128 if args.dim % 128 == 0 else 64}
    found = []
    for K, N in layer_products(args).values():
        if format in FORMATS:
            weight = Format(format, groups.get(format, 0)).pack(torch.randn(K, N, device=device))
        else:
            weight = DenseWeight(torch.randn(K, N, device=device).bfloat16())
        found.append(weight)
    copies = 1 + COLD_BYTES[device.type] // sum(weight.row_bytes * weight.in_features for weight in found)
    return [[weight, *(copy.deepcopy(weight) for _ in range(copies))] for weight in found]


def by_rows(weight: RowSkippingWeight, x: Tensor, threshold: Tensor) -> Tensor:
    return torch.stack([weight.sparse_matvec(row, threshold) for row in x])


def by_union(weight: RowSkippingWeight, x: Tensor, threshold: Tensor) -> Tensor:
    return sparse_gemm(x, weight.operand, threshold)


def masked(weight: RowSkippingWeight, x: Tensor, threshold: Tensor) -> Tensor:
    return weight.matmul(x.masked_fill(x.abs() <= threshold, 0))


def by_all(weight: RowSkippingWeight, x: Tensor, threshold: Tensor) -> Tensor:
    kept = x.masked_fill(x.abs() <= threshold, 0)
    return sparse_gemm(kept, weight.operand, torch.full_like(threshold, KEEP_ALL))


WAYS = {"rows": by_rows, "masked": masked, "union": by_union, "all": by_all}  # the last two on the CPU alone


@torch.no_grad()
def product_records(args: ModelArgs, formats: list[str], device: torch.device, rounds: int) -> list[dict]:
    """Microseconds of a layer's products, one after another, by format, number of tokens and way."""
    records = []
    for format in formats:
        layer = make_layer(args, format, device)
        ways = list(WAYS)[: 2 if device.type == "cuda" else 4]
        cases = [(tokens, way) for tokens in SIZES for way in ways]
        passes: list[Callable[[], None]] = []
        for tokens, way in cases:
            x = [torch.randn(tokens, weights[0].in_features, device=device).bfloat16() for weights in layer]
            cuts = [each.abs().float().quantile(SKIPPED).expand(each.shape[1]).contiguous() for each in x]
            compare(layer, x, cuts, way)
            passes.append(partial(run_layer, layer, x, cuts, WAYS[way]))
        if device.type == "cuda":
            times = [time_passes(each, 1) for each in passes]
        else:
            times = [seconds for seconds, _ in take_turns(list(map(timed, passes)), rounds, lambda: 0.0, "products")]
        for (tokens, way), seconds in zip(cases, times, strict=True):
            us = [1e6 * second for second in seconds]
            record = {"format": format, "op": "layer", "way": way, "batch": tokens, "sparsity": SKIPPED}
            records.append(record | {"us": statistics.median(us), "us_spread": [min(us), max(us)]})
    return records


def compare(layer: list[list[RowSkippingWeight]], x: list[Tensor], cuts: list[Tensor], way: str) -> None:
    """Raises where a way is not the masked product."""
    for weights, each, cut in zip(layer, x, cuts, strict=True):
        found, expected = (one(weights[0], each, cut).float() for one in (WAYS[way], masked))
        assert (found - expected).norm() < 0.02 * expected.norm(), f"{way} is off"


def run_layer(layer: list[list[RowSkippingWeight]], x: list[Tensor], cuts: list[Tensor], way: Callable) -> None:
    """A layer's products, on the next copies of the weights."""
    for weights, each, cut in zip(layer, x, cuts, strict=True):
        weights.append(weights.pop(0))
        way(weights[0], each, cut)


def timed(function: Callable[[], None]) -> Callable[[], float]:
    def seconds() -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    return seconds


def print_record(record: dict) -> None:
    if "way" in record:
        said = f"{record['way']:<7} {record['us']:>9.1f} us a layer"
    else:
        said = f"{record['sequences']:<8} {record['tokens_per_s']:>8.1f} tokens/s, reads {record['read']['all']:.1%}"
    print(
        f"{record['model']} {record['format']:<5} {record['sparsity']:.0%} batch {record['batch']}  {said}", flush=True
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", nargs="+", help="a model's checkpoints, such as demo and quantized ones")
    what.add_argument("--shapes", choices=SHAPES, help="random weights in this model's shapes")
    parser.add_argument("--formats", nargs="+", choices=("dense", *FORMATS), default=["dense"], help="random weights'")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.5], help="nominal")
    parser.add_argument("--new_tokens", type=positive_int, default=32, help="tokens an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="(default: %(default)s)")
    parser.add_argument("--products", choices=("none", "too", "only"), default="too", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    return parser.parse_args()


def decode_records(choice: Choice, options: argparse.Namespace, common: dict) -> list[dict]:
    rows: list[Row] = []
    for model, calibration in choice.load(calibrated=any(options.sparsity)):
        prompts = find_prompts(choice, model.args.vocab_size)
        context = cache_length(model, max(map(len, prompts)) + options.new_tokens)
        engine = Engine(model, calibration, (), context)
        rows += make_rows(engine, prompts, options.sparsity, options.new_tokens, samples=choice.shape is None)
    measure(rows, options.rounds, bandwidth_meter(choice.device))
    return [common | row.record() for row in rows]


def main() -> None:
    options = parse_arguments()
    device = pick_device(options.device)
    check_records_path(options.out)
    if options.new_tokens < 2 * LOOKED_AT:
        raise ValueError(
            f"--new_tokens {options.new_tokens}: expected at least {2 * LOOKED_AT}, to look at {LOOKED_AT}"
        )
    choice = Choice(device, tuple(options.checkpoint or ()), options.shapes, tuple(options.formats))
    name = options.shapes or open_checkpoint(options.checkpoint[0]).resolve().name
    common = describe(name, device, "bf16") | {"benchmark": "batch"}
    records = decode_records(choice, options, common) if options.products != "only" else []
    if options.shapes and options.products != "none":
        formats = ["bf16" if format == "dense" else format for format in options.formats]
        args = model_args(COMMON | SHAPES[options.shapes])
        records += [common | found for found in product_records(args, formats, device, options.rounds)]
    for record in records:
        print_record(record)
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
