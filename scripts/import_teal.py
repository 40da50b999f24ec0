"""Makes our calibration of the histograms and greedy tables in TEAL's public release.

    python -m teal_fast.scripts.import_teal TEAL/models/Llama-2-7B --checkpoint checkpoints/llama-2-7b

The release (https://github.com/FasterDecoding/TEAL, MIT) has for each block histograms of the inputs of its linear
layers and, made by its greedy search, a table of their sparsities. Histograms become quantiles of |x|, without its
assumption that x is symmetric: `--allocation uniform`, every layer at the sparsity asked for. `greedy` bends a layer's
quantiles so that a target reads the threshold of the sparsity that its block's table gives the layer there.
"""

import argparse
import csv
import math
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from teal_fast.calibration.probe import POINTS
from teal_fast.cli import MAX_SPARSITY, open_checkpoint, run
from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION, Calibration
from teal_fast.files.checkpoint import fingerprint, read_config
from teal_fast.files.store import check_writable
from teal_fast.model import ModelArgs

INPUTS = {  # a layer of a block: file and key of the histogram of its input
    "attention.wqkv": ("self_attn", "h1"),
    "attention.wo": ("self_attn", "h2"),
    "feed_forward.w13": ("mlp", "h1"),
    "feed_forward.w2": ("mlp", "h2"),
}
PROJECTIONS = {  # a layer: the columns of a table that it joins, since one threshold a channel serves them all
    "attention.wqkv": ("q", "k", "v"),
    "attention.wo": ("o",),
    "feed_forward.w13": ("gate", "up"),
    "feed_forward.w2": ("down",),
}
EFFECTIVE = "Effective Sparsity"
WHOLE = 2**24  # up to here fp32 counts exactly
TOLERANCE = 0.005  # of realised sparsity, beyond what bins leave open: half a step between quantiles


@dataclass(frozen=True)
class Histogram:
    """Counts of x in bins from `low` to `high` of one width (its 1st to 99th percentile), and in all of it, tails too.

    What lies in a tail is known to lie beyond `low` or `high` and no more, so |x| is resolved up to the nearer one.
    """

    counts: np.ndarray  # fp64 [bins]
    low: float
    high: float
    total: float

    @property
    def edges(self) -> np.ndarray:
        return np.linspace(self.low, self.high, len(self.counts) + 1)

    @property
    def largest_resolved(self) -> float:
        """The largest |x| to which both sides are resolved."""
        return max(0.0, min(-self.low, self.high))

    def share(self, threshold: np.ndarray | float) -> np.ndarray | float:
        """The share of entries with |x| <= threshold, at most `largest_resolved`; linear inside a bin."""
        reached = np.concatenate(([0], self.counts.cumsum())) / self.total
        return np.interp(threshold, self.edges, reached) - np.interp(-threshold, self.edges, reached)

    def abs_quantiles(self, levels: np.ndarray) -> np.ndarray:
        """|x| at each level; at levels that are not resolved `largest_resolved`, which drops less than asked for."""
        edges = np.abs(self.edges)
        thresholds = np.unique(np.concatenate(([0.0], edges[edges <= self.largest_resolved], [self.largest_resolved])))
        return np.interp(levels, self.share(thresholds), thresholds)

    def bounds(self, threshold: float) -> tuple[float, float]:
        """The least and the most that may be dropped, wherever in the bins that hold ±threshold the entries lie."""
        width = (self.high - self.low) / len(self.counts)
        inside, outside = max(0.0, threshold - width), min(self.largest_resolved, threshold + width)
        return float(self.share(inside)), float(self.share(outside))


def read_histogram(path: Path, key: str) -> Histogram:
    """One histogram of a release's file, which is a pickle: read without running code out of it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        data = torch.load(path, weights_only=True, map_location="cpu")
        counts, centers = (data[name].double().numpy() for name in (key, f"{key}_centers"))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no histograms.pt of TEAL with {key} ({type(error).__name__})") from error
    if counts.ndim != 1 or counts.shape != centers.shape or len(counts) < 4:
        raise ValueError(f"{path}: {key} has counts {counts.shape} at centers {centers.shape}, expected equal rows")
    steps = np.diff(centers[1:-1])
    sound = np.isfinite(centers).all() and (counts >= 0).all() and counts.sum() > 0 and steps[0] > 0
    width = (centers[-2] - centers[1]) / len(steps)
    if not (sound and np.allclose(steps, width, rtol=0, atol=width / 10 + 1e-6 * abs(centers[1:-1]).max())):
        raise ValueError(f"{path}: the bins of {key} between its tails are not of one width, or its counts are broken")
    return Histogram(counts[1:-1], centers[1] - width / 2, centers[-2] + width / 2, counts.sum())


def read_histograms(folder: Path, args: ModelArgs) -> dict[str, Histogram]:
    """All histograms of a set by the name of the layer whose input they count. Raises when it is not this model's."""
    files = {part for part, _ in INPUTS.values()}
    lacking = [
        str(number)
        for number in range(args.n_layers)
        if not all((folder / f"layer-{number}" / part / "histograms.pt").is_file() for part in files)
    ]
    if lacking:
        raise ValueError(f"{folder} lacks layers {', '.join(lacking)} of the checkpoint's {args.n_layers}")
    if (folder / f"layer-{args.n_layers}").exists():
        raise ValueError(f"{folder} has a layer-{args.n_layers}, the checkpoint has {args.n_layers} layers")
    widths = dict(zip(INPUTS, (args.dim, args.n_heads * args.head_dim, args.dim, args.ffn_dim), strict=True))
    histograms = {}
    for number in range(args.n_layers):
        block = {
            layer: read_histogram(folder / f"layer-{number}" / part / "histograms.pt", key)
            for layer, (part, key) in INPUTS.items()
        }
        _check_widths(folder / f"layer-{number}", block, widths)
        histograms |= {f"layers.{number}.{layer}": histogram for layer, histogram in block.items()}
    return histograms


def _check_widths(path: Path, block: dict[str, Histogram], widths: dict[str, int]) -> None:
    """Every token counts a layer's width of entries, and every layer the same tokens."""
    tokens = round(block["attention.wqkv"].total / widths["attention.wqkv"])
    for layer, histogram in block.items():
        large = histogram.counts[histogram.counts > WHOLE]
        rounding = (np.spacing(large.astype(np.float32)) / 2).sum()
        if abs(histogram.total - tokens * widths[layer]) > rounding:
            found = f"{histogram.total / max(tokens, 1):.10g}"
            raise ValueError(
                f"{path} is another model's: the input of {layer} is {found} wide over {tokens} tokens, "
                f"the checkpoint's {widths[layer]}"
            )


def find_set(release: Path, args: ModelArgs) -> tuple[Path, dict[str, Histogram]]:
    """The set of histograms in a model's folder of the release that is this model's; what it refuses goes to stderr.

    The release holds more than one for Llama-3-8B, of which the first is a copy of Llama-2-7B's.
    """
    if not release.is_dir():
        raise FileNotFoundError(f"{release} is no folder: expected a model's folder of TEAL's release")
    folders = sorted({path.parents[2] for path in release.glob("**/layer-*/*/histograms.pt")})
    if not folders:
        raise FileNotFoundError(f"{release} holds no layer-*/*/histograms.pt: expected a model's folder of the release")
    refused = []
    for folder in folders:
        try:
            return folder, read_histograms(folder, args)
        except ValueError as error:
            refused.append(str(error))
            print(f"refused: {error}", file=sys.stderr)
    raise ValueError(f"no set of histograms in {release} fits the checkpoint: {refused[-1]}")


def projection_sizes(args: ModelArgs) -> dict[str, int]:
    """Weights of each projection of a block, by its column in the release's tables."""
    heads, kv_heads = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    q_and_o, k_and_v, mlp = args.dim * heads, args.dim * kv_heads, args.dim * args.ffn_dim
    return {"q": q_and_o, "k": k_and_v, "v": k_and_v, "o": q_and_o, "gate": mlp, "up": mlp, "down": mlp}


def read_table(path: Path, args: ModelArgs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A block's curve: effective sparsity, ascending from 0, and the sparsities of its layers there.

    Layers get the mean of their projections weighted by size, and effective sparsity is computed from them: the one
    in the file rests on a table of sizes that is wrong for some models.
    """
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        columns = {name: np.array([0.0] + [float(row[name]) for row in rows]) for name in projection_sizes(args)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of TEAL's greedy search ({type(error).__name__}: {error})") from error
    sizes = projection_sizes(args)
    curves = {
        layer: sum(sizes[name] * columns[name] for name in names) / sum(sizes[name] for name in names)
        for layer, names in PROJECTIONS.items()
    }
    effective = sum(size * columns[name] for name, size in sizes.items()) / sum(sizes.values())
    sound = len(rows) and all((curve >= 0).all() and (curve <= 1 + 1e-6).all() for curve in curves.values())
    if not (sound and (np.diff(effective) > 0).all()):
        raise ValueError(f"{path}: expected sparsities from 0 to 1 that grow from row to row")
    return effective, {layer: curve.clip(0, 1) for layer, curve in curves.items()}


def greedy_levels(release: Path, args: ModelArgs, targets: np.ndarray) -> dict[str, np.ndarray]:
    """By layer name, the sparsity that its block's table gives it at each target; past a table's end, its last row."""
    tables = {int(re.sub(r"\D", "", path.parent.name)): path for path in release.glob("**/lookup/layer-*/results.csv")}
    if lacking := [str(number) for number in range(args.n_layers) if number not in tables]:
        raise ValueError(f"{release} lacks the greedy tables of layers {', '.join(lacking)}: use --allocation uniform")
    levels = {}
    for number in range(args.n_layers):
        effective, curves = read_table(tables[number], args)
        levels |= {f"layers.{number}.{layer}": np.interp(targets, effective, c) for layer, c in curves.items()}
    return levels


def check_realised(calibration: Calibration, histograms: dict[str, Histogram], levels: dict[str, np.ndarray]) -> float:
    """The widest gap, over layers and targets, between the nominal sparsity and that of the calibration's threshold.

    Raises when a gap is more than bins and the quantiles' spacing explain. Levels that are not resolved count as the
    last one that is.
    """
    widest = 0.0
    for name, histogram in histograms.items():
        most = float(histogram.share(histogram.largest_resolved))
        for target in np.arange(0.05, MAX_SPARSITY + 0.01, 0.0475):  # mostly between two stored points
            nominal = min(most, float(np.interp(target, np.linspace(0, 1, POINTS), levels[name])))
            threshold = min(float(calibration.threshold(name, float(target))), histogram.largest_resolved)
            low, high = histogram.bounds(threshold)
            if not low - TOLERANCE <= nominal <= high + TOLERANCE:
                raise ValueError(f"{name}: the threshold for {nominal:.1%} drops {low:.1%} to {high:.1%} of its inputs")
            widest = max(widest, abs(float(histogram.share(threshold)) - nominal))
    return widest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", type=Path, metavar="FOLDER", help="a model's folder of TEAL's release")
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="the same model, converted")
    parser.add_argument("--allocation", choices=("uniform", "greedy"), default="greedy", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {CALIBRATION} in the checkpoint's folder)")
    options = parser.parse_args()

    folder = open_checkpoint(options.checkpoint)
    out = options.out or folder / CALIBRATION
    check_writable(out)
    args = model_args(read_config(folder))
    chosen, histograms = find_set(options.release, args)
    targets = np.linspace(0, 1, POINTS)
    uniform = options.allocation == "uniform"
    levels = dict.fromkeys(histograms, targets) if uniform else greedy_levels(options.release, args, targets)
    quantiles = {
        name: torch.from_numpy(histogram.abs_quantiles(levels[name])).float() for name, histogram in histograms.items()
    }
    origin = {
        "corpus": f"TEAL's release, {chosen.relative_to(options.release.parent)}",
        "allocation": options.allocation,
    }
    calibration = Calibration(quantiles, fingerprint(folder), origin)
    widest = check_realised(calibration, histograms, levels)
    calibration.save(out)
    name, resolved = min(
        ((name, h.share(h.largest_resolved)) for name, h in histograms.items()), key=lambda pair: pair[1]
    )
    coarse, bin_share = max(((n, h.counts.max() / h.total) for n, h in histograms.items()), key=lambda pair: pair[1])
    print(f"wrote {out}: {options.allocation} thresholds of {len(histograms)} layers from {chosen}")
    print(f"realised on the histograms: within {widest:.2%}; widest bin: {bin_share:.1%} of the inputs of {coarse}")
    print(f"above {math.floor(resolved * 1000) / 1000:.1%} ({name}) nothing is resolved: a layer stays there")


if __name__ == "__main__":
    run(main)
