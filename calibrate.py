"""Measures how large a model's hidden states are, so that sparse_model.py can set thresholds for any sparsity.

    python calibrate.py --checkpoint checkpoints/<model> [--corpus FILE|DIR …] [--tokens N]

The dense model reads a corpus; at the input of every sparse layer the values of |x| are counted in a histogram whose
bins are the leading bits of the float itself. That is exact for bf16, resolves 0.8 % in fp16 and fp32, needs no range
in advance and no activations kept: 256 KB a layer. Only uniform allocation: every layer gets the sparsity asked for.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import DTYPES, ROOT, check_writable, find_checkpoint, fingerprint
from cli import add_model_arguments, positive_int, run
from corpus import read_corpus
from model import Transformer
from sharing import fetch, push, repo_id
from sparse_model import CALIBRATION, Calibration, SparseLinear, load_model, pick_device, sparse_layers, watch_inputs
from tokenizer import Tokenizer

DEFAULT_CORPUS = ROOT / "data" / "calibration"
SHIFT = 23 - 7  # bins keep fp32's sign, exponent and 7 of its 23 mantissa bits, as bf16 does
BINS = 1 << (31 - SHIFT)
POINTS = 201  # quantile levels stored: every half per cent


class AbsHistogram:
    """A histogram of |x| with logarithmic bins, 128 to the octave, over the whole range of fp32."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Counts every entry of x, any shape and floating type."""
        # Positive floats sort like the integers that their bits spell; rounding up makes a bin's edge its upper end.
        bits = x.float().abs().flatten().view(torch.int32)
        self.counts += torch.bincount((bits + ((1 << SHIFT) - 1)) >> SHIFT, minlength=BINS)[:BINS]

    def quantiles(self, points: int) -> Tensor:
        """|x| at `points` levels evenly spaced from 0 to 1, fp32 [points] on the CPU; linear inside a bin."""
        counts = self.counts.cpu().double()
        reached = counts.cumsum(0)
        target = torch.linspace(0, 1, points, dtype=torch.float64) * reached[-1]
        index = torch.searchsorted(reached, target).clamp(max=BINS - 1)
        edge = (torch.arange(BINS, dtype=torch.int32) << SHIFT).view(torch.float32)
        share = 1 - (reached[index] - target) / counts[index].clamp(min=1)
        return torch.lerp(edge[(index - 1).clamp(min=0)], edge[index], share.clamp(0, 1).float())


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


@torch.no_grad()
def measure(model: Transformer, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Quantiles of |x| by layer name over the sequences, without their first tokens (attention sinks, always dense)."""
    device = model.norm.weight.device
    histograms = {name: AbsHistogram(device) for name in sparse_layers(model)}

    def observe(name: str, layer: SparseLinear, x: Tensor) -> None:
        histograms[name].add(x[:, 1:])

    total = sum(map(len, sequences))
    with watch_inputs(model, observe), tqdm(total=total, desc="calibrating", unit="token") as progress:
        for sequence in sequences:
            if not model.hidden(torch.tensor([sequence], device=device)).isfinite().all():
                raise ValueError("the model's hidden states hold NaN or inf on this corpus: is the checkpoint sound?")
            progress.update(len(sequence))
    return {name: histogram.quantiles(POINTS) for name, histogram in histograms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--corpus", type=Path, nargs="+", default=[DEFAULT_CORPUS], help="text files or folders")
    parser.add_argument("--tokens", type=positive_int, default=16384, help="tokens to read (default: %(default)s)")
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
        "context": str(context),
        "seed": str(options.seed),
        "allocation": "uniform",
    }
    Calibration(measure(model, sequences), fingerprint(folder), origin).save(out)
    print(f"wrote {out}: quantiles of |x| at the input of {len(sparse_layers(model))} layers over {tokens} tokens")


if __name__ == "__main__":
    run(main)
