"""Scales that are tuned bring a quantized model nearer to the original, dense and sparse; a known error is found."""

import pytest
import torch
from torch.nn import functional as F

from teal_fast.calibration.probe import measure_quantiles
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.files.checkpoint import fingerprint
from teal_fast.files.load import load_model
from teal_fast.quantization import tuning
from teal_fast.quantization.tuning import SPARSITIES, STEP_TOKENS, cut_steps, rescaled, tune_scales
from teal_fast.sparse_model import DENSE, KEEP_ALL, DenseWeight, Phase, SparseLinear, sparse_layers
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output


def draw_sequences(count, seed, length=32):
    return torch.randint(3, 40_000, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def load(even):
    """Random weights give logits that hardly differ; 30 times as large they tell tokens apart as a real model's do."""
    model = load_model(even, dtype=torch.float32)
    model.norm.weight = torch.nn.Parameter(30 * model.norm.weight, requires_grad=False)
    return model


@pytest.fixture(scope="module")
def original(even):
    return load(even)


@pytest.fixture(scope="module")
def calibration(even, original):
    return Calibration(measure_quantiles(original, draw_sequences(8, 2)), fingerprint(even), {})


@pytest.fixture
def short_steps(monkeypatch):
    """As many steps as sequences."""
    monkeypatch.setattr(tuning, "STEP_TOKENS", 32)


def quantized(even, format):
    model = load(even)
    for name, layer in sparse_layers(model).items():
        layer.weight = format.within(name).pack(layer.weight.packed)
    model.output = Int8Output.pack(model.output.weight)
    return model


@torch.no_grad()
def divergence(model, original, sequences):
    """From the dense original, in nats a token."""
    tokens = torch.tensor(sequences)
    found, expected = (
        m(tokens, phase=phase).float().log_softmax(-1) for m, phase in ((model, Phase(1)), (original, DENSE))
    )
    return F.kl_div(found, expected, log_target=True, reduction="sum").item() / tokens.numel()


def apply(model, factors):
    for name, layer in sparse_layers(model).items():
        layer.weight.scale.mul_(factors[name])


def test_the_model_comes_nearer_on_other_tokens_too(even, original, calibration, short_steps):
    model, others = quantized(even, Format("int4", 64)), draw_sequences(8, 3)

    def measured():
        found = []
        for sparsity in SPARSITIES:
            set_sparsity(model, calibration, sparsity)
            found.append(divergence(model, original, others))
        return found

    before = measured()
    factors = tune_scales(model, original, calibration, draw_sequences(48, 1))
    assert measured() == before  # nothing but thresholds was touched
    apply(model, factors)
    assert sum(measured()) < 0.95 * sum(before)


def test_scales_that_are_wrong_are_moved_back(even, original, calibration, short_steps):
    model = quantized(even, Format("int8"))
    wrong = sparse_layers(model)["layers.0.feed_forward.w2"].weight.scale
    wrong[:64] *= 1.1
    calibration = Calibration({name: torch.full((2,), KEEP_ALL) for name in calibration.curves}, {}, {})
    factors = tune_scales(model, original, calibration, draw_sequences(48, 1))["layers.0.feed_forward.w2"]
    assert factors[:64].mean() < 0.985 and factors[64:].mean() == pytest.approx(1, abs=0.005)


def test_equal_runs_give_equal_factors(even, original, calibration, short_steps):
    model, sequences = quantized(even, Format("int4", 64)), draw_sequences(3, 1)
    first, second = (tune_scales(model, original, calibration, sequences) for _ in range(2))
    assert first.keys() == sparse_layers(model).keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(factor.dtype == torch.float32 and not factor.requires_grad for factor in first.values())


def test_factors_are_of_the_weight_and_not_of_the_bias():
    generator = torch.Generator().manual_seed(5)
    x, rows, bias = (torch.randn(shape, generator=generator) for shape in ((1, 3, 8), (8, 16), (16,)))
    factor = torch.rand(16, generator=generator) + 0.5
    for given in (None, bias):
        layer = torch.nn.ModuleDict({"w": SparseLinear(DenseWeight(rows), given)})
        with rescaled(layer, {"w": factor}):
            found = layer["w"](x)
        expected = x @ (rows * factor) + (0 if given is None else bias)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(layer["w"](x), x @ rows + (0 if given is None else bias))


def test_hidden_states_that_are_not_finite_are_refused(even, original, calibration):
    model = quantized(even, Format("int8"))
    model.norm.weight = torch.nn.Parameter(model.norm.weight * float("inf"), requires_grad=False)
    with pytest.raises(ValueError, match="NaN or inf"):
        tune_scales(model, original, calibration, draw_sequences(1, 1))


def test_short_sequences_share_a_step():
    lengths = [STEP_TOKENS, 36, STEP_TOKENS, STEP_TOKENS - 1, 2, 2]
    steps = cut_steps([[1] * length for length in lengths])
    assert [[len(sequence) for sequence in step] for step in steps] == [
        [STEP_TOKENS],
        [36, STEP_TOKENS],
        [STEP_TOKENS - 1, 2],
        [2],
    ]


@pytest.mark.gpu
def test_tuning_on_cuda(even, original, calibration, short_steps):
    sequences = draw_sequences(3, 1)
    expected = tune_scales(quantized(even, Format("int4", 64)), original, calibration, sequences)
    found = tune_scales(quantized(even, Format("int4", 64)).cuda(), load(even).cuda(), calibration, sequences)
    for name, factors in expected.items():
        torch.testing.assert_close(found[name].cpu(), factors, rtol=0, atol=2e-3)
