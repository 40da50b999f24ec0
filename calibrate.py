"""Sets thresholds for any sparsity of a model by running it over some text; sparse_model.py reads them.

    python calibrate.py --checkpoint checkpoints/<model> [--method METHOD] [--corpus FILE|DIR …] [--tokens N]

The model runs densely, then sparse at a few levels, with the thresholds found so far: what counts is how the sparse
model's own hidden states are spread, errors of earlier layers included, so that targets are hit. Methods differ in how
a sparsity is shared out among layers (allocation.py), by costs or by given shares:

measured   costs start as those of `global` and are corrected on the way to higher sparsities by what dropping really
           costs there: the gradient of the divergence from the dense model's predictions, times what is at the border
           of being dropped (probe.py). The default.
fisher     the empirical Fisher information of each channel's input, mean (dL/dx)²: channels differ in their thresholds.
global     its mean over a layer's channels.
blockwise  greedy within each block, by the error of what the block gives (blockwise.py): TEAL's method.
uniform    every layer drops the same share of its entries: TEAL's baseline.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from allocation import Costs, Sizes, Spread, correct, curves, spend, thresholds
from blockwise import blockwise_shares
from checkpoint import DTYPES, ROOT, check_writable, find_checkpoint, fingerprint, new_file, open_safetensors
from cli import add_model_arguments, positive_int, run
from corpus import read_corpus
from model import Transformer
from probe import POINTS, observe
from sharing import fetch, push, repo_id
from sparse_model import (
    CALIBRATION,
    CALIBRATION_VERSION,
    KEEP_ALL,
    Calibration,
    load_model,
    pick_device,
    sparse_layers,
)
from tokenizer import Tokenizer

DEFAULT_CORPUS = ROOT / "data" / "calibration"
METHODS = ("measured", "fisher", "global", "blockwise", "uniform")
CORRECTED = (0.3, 0.5, 0.65)  # sparsities at which "measured" measures costs, each with those of the one before
LEVELS = (0.25, 0.5, 0.6, 0.75, 0.9)  # at which the sparse model's hidden states are observed
SMALLEST = 1e-4  # of a channel's Fisher information, in its layer's mean: a channel that never mattered yet may

Seen = dict[str, dict[str, Tensor]]


class Journal:
    """Passes over the text that are finished, kept in a file beside the output until that is written.

    A run that was cut off goes on from there, if it is the same in all that `about` says.
    """

    def __init__(self, path: Path, about: dict):
        self.path, self.about = path, json.dumps(about)
        self.tensors: dict[str, Tensor] = {}
        if path.exists():
            with open_safetensors(path) as file:
                if (file.metadata() or {}).get("about") == self.about:
                    self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def keep(self, title: str, make: Callable[[], Seen]) -> Seen:
        """What `make` gives, or gave in an earlier run."""
        found: Seen = {}
        for name, tensor in self.tensors.items():
            of, layer, what = name.split("/")
            if of == title:
                found.setdefault(layer, {})[what] = tensor
        if not found:
            found = make()
            self.tensors |= {f"{title}/{layer}/{what}": t for layer, seen in found.items() for what, t in seen.items()}
            with new_file(self.path) as temporary:
                temporary.write_bytes(save(self.tensors, {"about": self.about}))
        return found


def cut_sequences(documents: list[list[int]], length: int, tokens: int, seed: int) -> list[list[int]]:
    """Up to `tokens` tokens of the documents as sequences of at most `length`, drawn at random from all of them."""
    pieces = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # the first token of a sequence is not counted
    random.Random(seed).shuffle(pieces)
    chosen = []
    for piece in pieces:
        if tokens <= 1:
            break
        chosen.append(piece[:tokens])
        tokens -= len(chosen[-1])
    return chosen


class Passes:
    """Passes of a model over the text, each over another part of about `tokens` tokens."""

    def __init__(self, model: Transformer, sequences: list[list[int]], tokens: int, journal: Journal):
        self.model, self.sequences, self.journal = model, sequences, journal
        average = sum(map(len, sequences)) / len(sequences)
        self.count = min(max(round(tokens / average), 1), len(sequences))
        self.tokens = round(self.count * average)
        self.turn = 0

    def next(self, title: str, found: Tensor | None, factors: list[Tensor], loss: str | None = None) -> Seen:
        """What is observed at thresholds [layers] times the layers' factors [K], densely when there are none."""
        for index, layer in enumerate(sparse_layers(self.model).values()):
            layer.threshold.copy_(torch.tensor(KEEP_ALL) if found is None else found[index] * factors[index])
        start, self.turn = self.turn * self.count, self.turn + 1
        part = [self.sequences[(start + i) % len(self.sequences)] for i in range(self.count)]
        seen = self.journal.keep(f"{self.turn} {title}", lambda: observe(self.model, part, title, loss, factors))
        return {name: seen[name] for name in sparse_layers(self.model)}  # the journal has an order of its own


def column(seen: Seen, what: str) -> list[Tensor]:
    return [found[what] for found in seen.values()]


def find_costs(passes: Passes, sizes: Sizes, flat: list[Tensor], method: str) -> tuple[Costs, list[Tensor]]:
    """What dropping costs, and the factors [K] by which the thresholds of each layer's channels differ.

    flat: factors of 1.
    """
    seen = passes.next("gradients", None, flat, "text")
    fisher = [values.clamp(min=SMALLEST * values.mean().item() + 1e-300) for values in column(seen, "fisher")]
    cost = torch.stack([values.mean() for values in fisher])
    if method == "fisher":
        return Costs({0.0: cost}), [(values / values.mean()).rsqrt() for values in fisher]
    if method == "global":
        return Costs({0.0: cost}), flat
    corrected = {}
    for level in CORRECTED:
        found = spend(Spread(level, torch.stack(column(seen, "quantiles"))), sizes, cost, level)
        seen = passes.next(f"costs at {level:.0%}", found, flat, "divergence")
        corrected[level] = cost = correct(cost, torch.stack(column(seen, "cost")))
    return Costs(corrected), flat


def calibrate(passes: Passes, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Curves and factors of a `Calibration`, by the method called so; leaves the model's thresholds at sparsity 0."""
    layers = sparse_layers(passes.model)
    sizes = Sizes.of([layer.weight.rows for layer in layers.values()])
    factors = [torch.ones(layer.weight.in_features).double() for layer in layers.values()]
    if method in ("measured", "fisher", "global"):
        rule, factors = find_costs(passes, sizes, factors, method)
    seen = passes.next("dense", None, factors)
    if method == "uniform":
        rule = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(len(layers), 2)
    elif method == "blockwise":
        quantiles = dict(zip(layers, column(seen, "quantiles"), strict=True))
        rule = blockwise_shares(passes.model, passes.sequences[0], quantiles)
    spreads = [Spread(0.0, torch.stack(column(seen, "quantiles")))]
    for level in LEVELS:
        seen = passes.next(f"sparse {level:.0%}", thresholds(spreads[-1], sizes, rule, level), factors)
        spreads.append(Spread(level, torch.stack(column(seen, "quantiles"))))
    for layer in layers.values():
        layer.threshold.fill_(KEEP_ALL)
    found = curves(spreads, sizes, rule, POINTS).float()
    scaled = {name: factor.float() for name, factor in zip(layers, factors, strict=True) if (factor != 1).any()}
    return dict(zip(layers, found, strict=True)), scaled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--method", choices=METHODS, default="measured", help="see above (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[DEFAULT_CORPUS], help="text files or folders")
    parser.add_argument("--tokens", type=positive_int, default=16384, help="tokens to read (default: %(default)s)")
    parser.add_argument(
        "--pass_tokens", type=positive_int, default=4096, help="of them for each pass (default: %(default)s)"
    )
    parser.add_argument("--context", type=positive_int, default=1024, help="longest sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="draws the sequences (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {CALIBRATION} in the checkpoint's folder)")
    parser.add_argument("--push_to_hub", type=repo_id, metavar="REPO", help="share the file that an earlier run wrote")
    parser.add_argument("--results", type=Path, help="eval.py's records (its --out) to show on the shared file's card")
    parser.add_argument("--from_hub", type=repo_id, metavar="REPO", help="fetch a shared file instead of measuring")
    options = parser.parse_args()

    folder = find_checkpoint(options.checkpoint)
    out = options.out or folder / CALIBRATION
    check_writable(out)
    if options.from_hub:
        return fetch(options.from_hub, folder, out)
    if options.push_to_hub:
        return push(options.push_to_hub, folder, out, options.results, pick_device(options.device))
    tokenizer = Tokenizer.load(folder)
    documents = [tokenizer.encode(text) for text in read_corpus(options.corpus)]
    model = load_model(folder, pick_device(options.device), DTYPES.get(options.dtype))
    context = min(options.context, model.args.max_position)
    sequences = cut_sequences(documents, context, options.tokens, options.seed)
    if not sequences:
        raise ValueError("the corpus has fewer than 2 tokens to calibrate on: give more text, or a larger --tokens")
    tokens = sum(map(len, sequences))
    if tokens < options.tokens:
        print(f"the corpus holds {tokens} tokens, fewer than the {options.tokens} asked for", file=sys.stderr)
    origin = {
        "corpus": ", ".join(path.name for path in options.corpus),
        "tokens": str(tokens),
        "pass_tokens": str(options.pass_tokens),
        "context": str(context),
        "seed": str(options.seed),
        "method": options.method,
    }
    about = {"version": CALIBRATION_VERSION, "model": fingerprint(folder), "dtype": options.dtype} | origin
    journal = Journal(out.with_name(f"{out.name}.partial"), about)
    passes = Passes(model, sequences, options.pass_tokens, journal)
    found, factors = calibrate(passes, options.method)
    Calibration(found, fingerprint(folder), origin, factors).save(out)
    journal.path.unlink(missing_ok=True)
    print(f"wrote {out}: thresholds of {len(found)} layers by the method {options.method} over {tokens} tokens")


if __name__ == "__main__":
    run(main)
