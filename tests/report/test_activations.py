"""Statistics against distributions whose fits are known, and the measurement against the model's own hooks."""

import math

import numpy as np
import pytest
import torch

from teal_fast.files.calibration import load_calibration, set_sparsity
from teal_fast.files.load import load_model
from teal_fast.report.activations import (
    BARS,
    LayerStatistics,
    SignedHistogram,
    bars,
    density,
    excess_kurtosis,
    fit_gaussian,
    fit_laplacian,
    ks_distance,
    measure_activations,
)
from teal_fast.sparse_model import sparse_layers, watch_inputs

GENERATOR = torch.Generator().manual_seed(0)
UNIFORM = torch.rand(400_000, generator=GENERATOR) - 0.5
NORMAL = torch.randn(400_000, generator=GENERATOR)
LAPLACIAN = UNIFORM.sign() * torch.log1p(-2 * UNIFORM.abs())  # by the inverse of its distribution function


def distribution(*parts):
    histogram = SignedHistogram(torch.device("cpu"))
    for part in parts:
        histogram.add(part)
    return histogram.distribution()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gaussian_is_known_as_one(dtype):
    values, counts = distribution((0.3 + 2 * NORMAL).to(dtype))
    gaussian, laplacian = fit_gaussian(values, counts), fit_laplacian(values, counts)
    assert gaussian.center == pytest.approx(0.3, abs=0.02) and gaussian.scale == pytest.approx(2, rel=0.01)
    assert laplacian.scale == pytest.approx(2 * math.sqrt(2 / math.pi), rel=0.01)  # a Gaussian's mean deviation
    assert gaussian.distance < 0.01 < 0.03 < laplacian.distance
    assert excess_kurtosis(values, counts) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_laplacian_is_known_as_one(dtype):
    values, counts = distribution((0.5 * LAPLACIAN - 1).to(dtype))
    gaussian, laplacian = fit_gaussian(values, counts), fit_laplacian(values, counts)
    assert laplacian.center == pytest.approx(-1, abs=0.01) and laplacian.scale == pytest.approx(0.5, rel=0.01)
    assert gaussian.scale == pytest.approx(0.5 * math.sqrt(2), rel=0.01)
    assert laplacian.distance < 0.01 < 0.03 < gaussian.distance
    assert excess_kurtosis(values, counts) == pytest.approx(3, abs=0.3)


def test_distance_of_a_staircase():
    counts = torch.ones(2).double()
    assert ks_distance(counts, torch.tensor([0.25, 0.75])) == pytest.approx(0.25)
    assert ks_distance(counts, torch.tensor([0.5, 0.5])) == pytest.approx(0.5)  # before the first step, after the last
    assert ks_distance(torch.ones(1).double(), torch.tensor([0.3])) == pytest.approx(0.7)


def test_a_spike_at_zero_fits_neither():
    values, counts = distribution(torch.where(UNIFORM < 0, 0, NORMAL))
    assert min(fit_gaussian(values, counts).distance, fit_laplacian(values, counts).distance) > 0.2


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_constant_breaks_nothing(value):
    statistics = LayerStatistics(torch.zeros(1, 4))
    statistics.add(torch.full((5, 4), value))
    summary = statistics.summary()
    numbers = [summary["excess_kurtosis"], *summary["gaussian"].values(), *summary["histogram"]["density"]]
    assert all(map(math.isfinite, numbers)) and summary["gaussian"]["center"] == value


def test_signs_and_parts():
    values, counts = distribution(torch.tensor([-2.0, 0.5]), torch.tensor([[0.0, 0.5], [-2.0, 0.5]]))
    assert values.tolist() == [-2, 0, 0.5] and counts.tolist() == [2, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bars_have_the_density_and_no_comb(dtype):
    values, counts = distribution(NORMAL.to(dtype))
    found = np.array(bars(values, counts, -3.0, 3.0)["density"])
    centers = -3 + 6 * (np.arange(BARS) + 0.5) / BARS
    expected = np.exp(-(centers**2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.004)
    assert found.sum() * 6 / BARS == pytest.approx(math.erf(3 / math.sqrt(2)), abs=0.002)


@pytest.mark.parametrize("kind", ["gaussian", "laplacian"])
def test_densities_integrate_to_one(kind):
    x = np.linspace(-40, 40, 80_001)
    y = density({"center": 0.5, "scale": 2.0}, kind, x)
    assert y.sum() * (x[1] - x[0]) == pytest.approx(1, abs=1e-3) and x[y.argmax()] == pytest.approx(0.5, abs=1e-3)


def test_channels():
    """A channel a hundred times the others is an outlier and hot; one that is never above the threshold is neither."""
    x = NORMAL[:6000].view(1000, 6).clone()
    x[:, 4] *= 100
    x[:, 1] = 0
    statistics = LayerStatistics(
        torch.tensor([[0.0], [0.6745]]).expand(2, 6)
    )  # the upper quartile: |x| below it by half
    statistics.add(x[:300])
    statistics.add(x[300:])
    summary = statistics.summary()
    assert summary["outliers"][0]["channel"] == 4 and summary["outliers"][0]["ratio"] == pytest.approx(100, rel=0.15)
    assert summary["outliers"][0]["activity"][1] > 0.95
    assert summary["hot"] == pytest.approx([5 / 6, 1 / 6])
    rare, *_, busy = summary["activity"][1]
    assert rare == 0 and busy > 0.95
    assert summary["activity"][1][25] == pytest.approx(0.5, abs=0.06)


def test_measure_leaves_out_first_tokens_and_sees_the_sparse_model(calibrated):
    model, calibration = load_model(calibrated), load_calibration(calibrated)
    sequences = [list(range(100, 164)), list(range(900, 920))]
    found = measure_activations(model, calibration, sequences, [0.3, 0.6])
    assert [layer["name"] for layer in found] == list(sparse_layers(model))
    assert [layer["kind"] for layer in found] == ["qkv", "o", "gate+up", "down"] * 2

    inputs = {}
    set_sparsity(model, calibration, 0.6)
    with (
        watch_inputs(model, lambda name, layer, x, phase: inputs.setdefault(name, []).append(x[0, 1:].clone())),
        torch.no_grad(),
    ):
        for sequence in sequences:
            model.hidden(torch.tensor([sequence]))
    for layer in found:
        x = torch.cat(inputs[layer["name"]])
        kept = (x.abs() > calibration.threshold(layer["name"], 0.6)).float().mean(0)
        assert layer["channels"] == x.shape[1]
        assert layer["activity"][1][0] == pytest.approx(kept.min().item())
        assert layer["hot"][1] == pytest.approx((kept >= 0.95).float().mean().item())
        assert layer["gaussian"]["scale"] == pytest.approx(x.std().item(), rel=0.02)
        assert layer["achieved"][0] < layer["achieved"][1]
    first, last = found[0], found[-1]
    dropped = 1 - (torch.cat(inputs[first["name"]]).abs() > first["thresholds"][1]).float().mean().item()
    assert first["achieved"][1] == pytest.approx(dropped)  # nothing below it is sparse …
    dropped = 1 - (torch.cat(inputs[last["name"]]).abs() > last["thresholds"][1]).float().mean().item()
    assert last["achieved"][1] != pytest.approx(dropped)  # … while the last layer's inputs have changed
