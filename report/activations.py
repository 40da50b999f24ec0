"""Statistics of the hidden states at the input of every sparse layer: the distribution, fits to it, its channels.

Values are counted in histograms whose bins are the leading bits of the float itself (calibrate.py's), one for either
sign: exact for bf16, 0.8 % in fp16 and fp32, and memory does not grow with the corpus. All else that a layer keeps is a
few numbers a channel. The first token of a sequence is left out: attention leans on it, and it is always dense.
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

HOT = 0.95  # a channel kept on at least this share of the tokens is hot
SHOWN = 5  # mean deviations to either side of the median that a histogram shows: of a Laplacian all but 0.7 %
BARS = 81  # of a histogram; odd, so that one stands in the middle of a symmetric distribution
LEVELS = 51  # of the curve of channel activities
OUTLIERS = 8  # channels named a layer


class SignedHistogram:
    """Counts of x by value: two histograms of |x|, for either sign."""

    def __init__(self, device: torch.device):
        self.negative, self.positive = AbsHistogram(device), AbsHistogram(device)

    def add(self, x: Tensor) -> None:
        """Counts every entry of x, any shape and floating type."""
        self.negative.add(x[x < 0])
        self.positive.add(x[x >= 0])

    def distribution(self) -> tuple[Tensor, Tensor]:
        """The values that occurred, ascending, and how often each did: fp64, on the CPU."""
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
    """Mean and standard deviation, the maximum-likelihood fit of a Gaussian."""
    mean = (values * counts).sum() / counts.sum()
    std = ((values - mean).square() * counts).sum().div(counts.sum()).sqrt()
    cdf = torch.special.ndtr((values - mean) / std.clamp(min=1e-300))
    return Fit(mean.item(), std.item(), ks_distance(counts, cdf))


def fit_laplacian(values: Tensor, counts: Tensor) -> Fit:
    """Median and mean absolute deviation from it, the maximum-likelihood fit of a Laplacian (doi:10.2307/2683252)."""
    reached = counts.cumsum(0)
    median = values[torch.searchsorted(reached, reached[-1:] / 2)[0]]
    scale = ((values - median).abs() * counts).sum() / counts.sum()
    z = (values - median) / scale.clamp(min=1e-300)
    cdf = torch.where(z < 0, z.exp() / 2, 1 - (-z).exp() / 2)
    return Fit(median.item(), scale.item(), ks_distance(counts, cdf))


def ks_distance(counts: Tensor, cdf: Tensor) -> float:
    """Kolmogorov-Smirnov distance (doi:10.2307/2280095): the largest gap between two cumulative distributions.

    counts: how often each of the ascending values occurred; cdf: the other distribution's, at these values. The first
    is a staircase, so both ends of each step are compared.
    """
    after = counts.cumsum(0) / counts.sum()
    before = after - counts / counts.sum()
    return torch.maximum((after - cdf).abs(), (cdf - before).abs()).max().item()


def excess_kurtosis(values: Tensor, counts: Tensor) -> float:
    """Fourth central moment over the squared variance, less 3: 0 for a Gaussian, 3 for a Laplacian."""
    mean = (values * counts).sum() / counts.sum()
    second, fourth = (((values - mean) ** power * counts).sum() / counts.sum() for power in (2, 4))
    return (fourth / second.square() - 3).item() if second > 0 else 0.0


def bars(values: Tensor, counts: Tensor, low: float, high: float) -> dict[str, float | list[float]]:
    """Densities over BARS equal intervals from `low` to `high`.

    Values are the centres of what was rounded to them, so their mass is spread halfway to their neighbours; counted as
    points, two or three of them to a bar would draw a comb.
    """
    reached = counts.cumsum(0) / counts.sum()
    ends = torch.cat((values[:1], torch.lerp(values[:-1], values[1:], 0.5), values[-1:]))
    edges = np.linspace(low, high, BARS + 1)
    cumulative = np.interp(edges, ends, torch.cat((torch.zeros(1), reached)))
    return {"low": low, "high": high, "density": (np.diff(cumulative) / np.diff(edges)).tolist()}


class LayerStatistics:
    """What is kept of one layer's inputs; thresholds: fp32 [sparsities, K]."""

    def __init__(self, thresholds: Tensor):
        self.thresholds = thresholds
        self.histogram = SignedHistogram(thresholds.device)
        self.magnitude = torch.zeros(thresholds.shape[1], dtype=torch.float64, device=thresholds.device)
        self.kept = torch.zeros(thresholds.shape, dtype=torch.int64, device=thresholds.device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Takes in x [T, K]."""
        self.histogram.add(x)
        magnitude = x.float().abs()
        self.magnitude += magnitude.sum(0, dtype=torch.float64)
        self.kept += torch.stack([(magnitude > threshold).sum(0) for threshold in self.thresholds])
        self.tokens += len(x)

    def summary(self) -> dict:
        """The layer's part of a record: plain numbers and lists, one entry a sparsity where it depends on it."""
        values, counts = self.histogram.distribution()
        activity = (self.kept / self.tokens).double().cpu()  # [sparsities, K]
        mean = (self.magnitude / self.tokens).cpu()
        ratio = mean / mean.median().clamp(min=1e-300)
        laplacian = fit_laplacian(values, counts)
        reach = SHOWN * laplacian.scale or 1e-6
        return {
            "channels": len(mean),
            "gaussian": asdict(fit_gaussian(values, counts)),
            "laplacian": asdict(laplacian),
            "excess_kurtosis": excess_kurtosis(values, counts),
            "histogram": bars(values, counts, laplacian.center - reach, laplacian.center + reach),
            "thresholds": self.thresholds.median(dim=1).values.tolist(),  # one value, unless channels have their own
            "activity": torch.quantile(activity, torch.linspace(0, 1, LEVELS).double(), dim=1).T.tolist(),
            "hot": (activity >= HOT).double().mean(1).tolist(),
            "outliers": [
                {"channel": k, "ratio": ratio[k].item(), "mean": mean[k].item(), "activity": activity[:, k].tolist()}
                for k in ratio.topk(min(OUTLIERS, len(ratio))).indices.tolist()
            ],
        }


@torch.no_grad()
def measure(
    model: Transformer, calibration: Calibration, sequences: list[list[int]], sparsities: list[float]
) -> list[dict]:
    """A dict a sparse layer: statistics of its inputs in the dense model, and the sparsity achieved in the sparse one.

    The sparse passes drop entries of all tokens of a sequence but the first.
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
        achieved = {name: [] for name in statistics}
        for nominal in sparsities:
            set_sparsity(model, calibration, nominal)
            with tally_kept(model) as tally:
                read(model, sequences, progress, Phase(1))
            for name, kept in tally.kept.items():
                achieved[name].append(1 - kept.item() / tally.seen[name])
    return [
        {"name": name, "layer": int(name.split(".")[1]), "kind": KINDS[name.rsplit(".", 1)[1]]}
        | {"row_bytes": sparse_layers(model)[name].weight.packed[0].nbytes}
        | layer.summary()
        | {"achieved": achieved[name]}
        for name, layer in statistics.items()
    ]


def read(model: Transformer, sequences: list[list[int]], progress: tqdm, phase: Phase) -> None:
    """Runs the model over the sequences."""
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
