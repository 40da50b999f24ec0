"""Statistics of the hidden states at the input of every sparse layer: distribution, fits to it, outlier channels.

Values are counted in two histograms of calibration/probe.py, one for each sign, so that memory does not grow with the
corpus; otherwise a layer keeps a few numbers per channel. The first token of a sequence is left out: it is an attention
sink and always dense. Drawing is figures.py's matter.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from teal_fast.calibration.probe import BINS, SHIFT, AbsHistogram
from teal_fast.engine.accounting import tally_kept
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.model import Transformer
from teal_fast.sparse_model import DENSE, KINDS, Phase, SparseLinear, sparse_layers, watch_inputs

HOT = 0.95  # a channel is hot if at least this share of the tokens keeps it
SHOWN = 5  # a histogram shows so many mean deviations on each side of the median: all but 0.7 % of a Laplacian
BARS = 81  # of a histogram; an odd number has a bar in the middle of a symmetric distribution
ACTIVITY_POINTS = 51  # of the curve of channel activities
OUTLIERS = 8  # channels named per layer


class SignedHistogram:
    """Counts of x by value: two histograms of |x|, one for each sign."""

    def __init__(self, device: torch.device):
        self.negative, self.positive = AbsHistogram(device), AbsHistogram(device)

    def add(self, x: Tensor) -> None:
        """Counts every entry of x, any shape and floating type."""
        self.negative.add(x[x < 0])
        self.positive.add(x[x >= 0])

    def distribution(self) -> tuple[Tensor, Tensor]:
        """The values that occurred, ascending, and their counts: both fp64 [values] on the CPU."""
        edge = (torch.arange(BINS, dtype=torch.int32) << SHIFT).view(torch.float32).double()
        counts = torch.cat((self.negative.counts.flip(0), self.positive.counts)).cpu().double()
        held = counts > 0
        return torch.cat((-edge.flip(0), edge))[held], counts[held]


@dataclass(frozen=True)
class Fit:
    """A distribution's location and scale by maximum likelihood, and its Kolmogorov-Smirnov distance from the data."""

    center: float
    scale: float
    distance: float


def fit_gaussian(values: Tensor, counts: Tensor) -> Fit:
    """Maximum-likelihood fit of a Gaussian: mean and standard deviation. values, counts: see `distribution`."""
    mean = (values * counts).sum() / counts.sum()
    std = ((values - mean).square() * counts).sum().div(counts.sum()).sqrt()
    cdf = torch.special.ndtr((values - mean) / std.clamp(min=1e-300))
    return Fit(mean.item(), std.item(), ks_distance(counts, cdf))


def fit_laplacian(values: Tensor, counts: Tensor) -> Fit:
    """Maximum-likelihood fit of a Laplacian: median and mean absolute deviation from it. Source: doi:10.2307/2683252.

    values, counts: see `distribution`.
    """
    cumulative = counts.cumsum(0)
    median = values[torch.searchsorted(cumulative, cumulative[-1:] / 2)[0]]
    scale = ((values - median).abs() * counts).sum() / counts.sum()
    z = (values - median) / scale.clamp(min=1e-300)
    cdf = torch.where(z < 0, z.exp() / 2, 1 - (-z).exp() / 2)
    return Fit(median.item(), scale.item(), ks_distance(counts, cdf))


def ks_distance(counts: Tensor, cdf: Tensor) -> float:
    """Kolmogorov-Smirnov distance: the largest gap between two cumulative distributions. Source: doi:10.2307/2280095.

    counts: of the ascending values that occurred; cdf: the other distribution's, at these values. The counts' own
    distribution is a staircase, so both ends of each step are compared.
    """
    after = counts.cumsum(0) / counts.sum()
    before = after - counts / counts.sum()
    return torch.maximum((after - cdf).abs(), (cdf - before).abs()).max().item()


def excess_kurtosis(values: Tensor, counts: Tensor) -> float:
    """The fourth central moment over the squared variance, minus 3: 0 for a Gaussian, 3 for a Laplacian."""
    mean = (values * counts).sum() / counts.sum()
    second, fourth = (((values - mean) ** power * counts).sum() / counts.sum() for power in (2, 4))
    return (fourth / second.square() - 3).item() if second > 0 else 0.0


def bars(values: Tensor, counts: Tensor, low: float, high: float) -> dict[str, float | list[float]]:
    """Densities over BARS equal intervals from `low` to `high`.

    Each value's count is spread halfway to its neighbours, because values are rounded. Counted as points, two or three
    of them would fall into each bar and draw a comb.
    """
    cumulative = counts.cumsum(0) / counts.sum()
    ends = torch.cat((values[:1], torch.lerp(values[:-1], values[1:], 0.5), values[-1:]))
    edges = np.linspace(low, high, BARS + 1)
    at_edges = np.interp(edges, ends, torch.cat((torch.zeros(1), cumulative)))
    return {"low": low, "high": high, "density": (np.diff(at_edges) / np.diff(edges)).tolist()}


class LayerStatistics:
    """Sums over one layer's inputs. thresholds: fp32 [sparsities, K], at which kept entries are counted."""

    def __init__(self, thresholds: Tensor):
        self.thresholds = thresholds
        self.histogram = SignedHistogram(thresholds.device)
        self.magnitude = torch.zeros(thresholds.shape[1], dtype=torch.float64, device=thresholds.device)
        self.kept = torch.zeros(thresholds.shape, dtype=torch.int64, device=thresholds.device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Counts the inputs x [T, K]."""
        self.histogram.add(x)
        magnitude = x.float().abs()
        self.magnitude += magnitude.sum(0, dtype=torch.float64)
        self.kept += torch.stack([(magnitude > threshold).sum(0) for threshold in self.thresholds])
        self.tokens += len(x)

    def summary(self) -> dict:
        """The layer's part of a record: plain numbers and lists, with one entry per sparsity where that matters."""
        values, counts = self.histogram.distribution()
        activity = (self.kept / self.tokens).double().cpu()  # [sparsities, K]
        mean = (self.magnitude / self.tokens).cpu()
        ratio = mean / mean.median().clamp(min=1e-300)
        laplacian = fit_laplacian(values, counts)
        half_width = SHOWN * laplacian.scale or 1e-6
        return {
            "channels": len(mean),
            "gaussian": asdict(fit_gaussian(values, counts)),
            "laplacian": asdict(laplacian),
            "excess_kurtosis": excess_kurtosis(values, counts),
            "histogram": bars(values, counts, laplacian.center - half_width, laplacian.center + half_width),
            "thresholds": self.thresholds.median(dim=1).values.tolist(),  # one value, unless channels have their own
            "activity": torch.quantile(activity, torch.linspace(0, 1, ACTIVITY_POINTS).double(), dim=1).T.tolist(),
            "hot": (activity >= HOT).double().mean(1).tolist(),
            "outliers": [
                {"channel": k, "ratio": ratio[k].item(), "mean": mean[k].item(), "activity": activity[:, k].tolist()}
                for k in ratio.topk(min(OUTLIERS, len(ratio))).indices.tolist()
            ],
        }


@torch.no_grad()
def measure_activations(
    model: Transformer, calibration: Calibration, sequences: list[list[int]], sparsities: list[float]
) -> list[dict]:
    """One dict per sparse layer: statistics of its inputs in the dense model, and the sparsity achieved when sparse.

    sequences: token ids; sparsities: nominal. The sparse passes drop entries of all tokens but a sequence's first.
    """
    thresholds = {name: [] for name in sparse_layers(model)}
    for nominal in [*sparsities, 0]:
        set_sparsity(model, calibration, nominal)
        for name, layer in sparse_layers(model).items():
            thresholds[name].append(layer.threshold.clone())
    statistics = {name: LayerStatistics(torch.stack(rows[:-1])) for name, rows in thresholds.items()}

    def observe(name: str, layer: SparseLinear, x: Tensor, phase: Phase) -> None:
        statistics[name].add(x[0, 1:])

    total = sum(map(len, sequences)) * (1 + len(sparsities))
    with tqdm(total=total, desc="measuring", unit="token") as progress:
        with watch_inputs(model, observe):
            read(model, sequences, progress, DENSE)
        achieved = achieved_sparsities(model, calibration, sequences, sparsities, progress)
    return [
        {"name": name, "layer": int(name.split(".")[1]), "kind": KINDS[name.rsplit(".", 1)[1]]}
        | {"row_bytes": sparse_layers(model)[name].weight.row_bytes}
        | layer.summary()
        | {"achieved": achieved[name]}
        for name, layer in statistics.items()
    ]


def achieved_sparsities(
    model: Transformer,
    calibration: Calibration,
    sequences: list[list[int]],
    sparsities: list[float],
    progress: tqdm,
) -> dict[str, list[float]]:
    """The share of entries that each layer drops at each nominal sparsity, by layer name."""
    achieved: dict[str, list[float]] = {name: [] for name in sparse_layers(model)}
    for nominal in sparsities:
        set_sparsity(model, calibration, nominal)
        with tally_kept(model) as tally:
            read(model, sequences, progress, Phase(1))
        for name, kept in tally.kept.items():
            achieved[name].append(1 - kept.item() / tally.seen[name])
    return achieved


def read(model: Transformer, sequences: list[list[int]], progress: tqdm, phase: Phase) -> None:
    """Runs the model over the sequences. Raises ValueError when its hidden states are not finite."""
    device = model.norm.weight.device
    for sequence in sequences:
        if not model.hidden(torch.tensor([sequence], device=device), phase=phase).isfinite().all():
            raise ValueError("the model's hidden states hold NaN or inf on this corpus: is the checkpoint sound?")
        progress.update(len(sequence))


def density(fit: dict[str, float], kind: str, x: np.ndarray) -> np.ndarray:
    """Density at x of a "gaussian" or "laplacian" fit."""
    scale = max(fit["scale"], 1e-300)
    z = (x - fit["center"]) / scale
    if kind == "gaussian":
        return np.exp(-(z**2) / 2) / (scale * math.sqrt(2 * math.pi))
    return np.exp(-np.abs(z)) / (2 * scale)
