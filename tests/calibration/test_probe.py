"""Quantiles of |x| against exact ones, gradients against autograd's own, memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from teal_fast.calibration.probe import BORDER, POINTS, AbsHistogram, measure_quantiles, observe
from teal_fast.files.load import load_model
from teal_fast.files.paths import ROOT
from teal_fast.sparse_model import sparse_layers, watch_inputs

QUANTILE_LEVELS = torch.linspace(0, 1, POINTS)


def draw(name, entries=40_000):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(entries, generator=generator)
    return {
        "normal": normal,
        "asymmetric": normal + 1,
        "heavy-tailed": normal * (normal.abs() * 3).exp(),
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "fp16": normal.half(),
    }[name]


def histogram(*parts):
    counted = AbsHistogram(torch.device("cpu"))
    for part in parts:
        counted.add(part)
    return counted.quantiles(POINTS)


@pytest.mark.parametrize("name", ["normal", "asymmetric", "heavy-tailed", "tiny", "huge", "fp16"])
def test_quantiles_of_continuous_data(name):
    x = draw(name)
    quantiles = histogram(x[:100].view(2, 5, 10), x[100:])  # any shape, in parts
    exact = torch.quantile(x.float().abs(), QUANTILE_LEVELS)
    torch.testing.assert_close(quantiles[1:], exact[1:], rtol=0.01, atol=0)
    assert 0 <= quantiles[0] <= exact[0]
    shares = (x.float().abs()[:, None] <= quantiles).float().mean(0)
    torch.testing.assert_close(shares, QUANTILE_LEVELS, rtol=0, atol=0.005)


def test_quantiles_of_bf16():
    x = draw("normal").bfloat16()
    quantiles = histogram(x)
    torch.testing.assert_close(quantiles[1:], torch.quantile(x.float().abs(), QUANTILE_LEVELS)[1:], rtol=0.01, atol=0)
    # Values lie in steps of up to 0.8 %, so that a threshold can only drop a whole step or none of it.
    shares = (x.abs()[:, None] <= quantiles).float().mean(0)
    torch.testing.assert_close(shares, QUANTILE_LEVELS, rtol=0, atol=0.01)


@pytest.mark.parametrize("value", [1.0, -0.3, 3e-38, 1e38])
def test_quantiles_of_a_constant(value):
    quantiles = histogram(torch.full((1000,), value))
    torch.testing.assert_close(quantiles[1:], torch.full((POINTS - 1,), abs(value)), rtol=0.01, atol=0)


def test_quantiles_of_zeros():
    assert histogram(torch.zeros(3, 4)).tolist() == [0] * POINTS
    assert histogram(torch.zeros(0)).tolist() == [0] * POINTS


def test_quantiles_of_many_zeros():
    x = draw("normal")
    x[: len(x) * 6 // 10] = 0
    quantiles = histogram(x)
    assert (quantiles[:121] == 0).all()  # up to 60 %
    torch.testing.assert_close(quantiles[121:], torch.quantile(x.abs(), QUANTILE_LEVELS)[121:], rtol=0.01, atol=0)


def test_measure_quantiles_of_the_inputs_that_layers_saw(tiny):
    model = load_model(tiny)
    sequences = torch.randint(3, 40_000, (6, 50), generator=torch.Generator().manual_seed(0)).tolist()
    seen = {name: [] for name in sparse_layers(model)}
    with torch.no_grad(), watch_inputs(model, lambda name, layer, x, phase: seen[name].append(x.abs())):
        for sequence in sequences:
            model.hidden(torch.tensor([sequence]))
    quantiles = measure_quantiles(model, sequences)
    assert list(quantiles) == list(seen)
    for name, parts in seen.items():
        later = torch.cat([x[:, 1:].flatten() for x in parts])
        torch.testing.assert_close(quantiles[name][1:], torch.quantile(later, QUANTILE_LEVELS)[1:], rtol=0.01, atol=0)
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(model).values())


def test_first_tokens_are_not_counted(tiny):
    model = load_model(tiny)
    with torch.no_grad():
        model.tok_embeddings.weight = torch.nn.Parameter(model.tok_embeddings.weight.clone())
        model.tok_embeddings.weight[7] = 0  # silences every layer at its position
    apart = measure_quantiles(model, [[7, 8]])
    first, last = measure_quantiles(model, [[7] + [8] * 9]), measure_quantiles(model, [[8] * 9 + [7]])
    name = "layers.0.attention.wqkv"
    assert first[name][1:].min() > 0
    torch.testing.assert_close(first[name], apart[name], rtol=0.01, atol=1e-3)
    assert (last[name][1:22] == 0).all() and last[name][30] > 0  # one of nine counted tokens is silent


def test_nan_in_the_model_is_an_error(tiny):
    model = load_model(tiny)
    rows = model.layers[1].feed_forward.w13.weight.packed.clone()
    rows[0, 0] = torch.nan
    model.layers[1].feed_forward.w13.weight.packed = torch.nn.Parameter(rows)
    with pytest.raises(ValueError, match="NaN or inf on this corpus: is the checkpoint sound"):
        measure_quantiles(model, [[5, 6, 7]])
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(model).values())


def test_calibrating_adds_little_memory(demo):
    """Peak memory of a process that measures, above one that runs the same model over the same tokens."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from teal_fast.calibration.probe import measure_quantiles
        from teal_fast.files.checkpoint import find_checkpoint
        from teal_fast.files.load import load_model
        model = load_model(find_checkpoint("demo"))
        sequences = torch.randint(3, 40_000, (2, 512), generator=torch.Generator().manual_seed(0)).tolist()
        if sys.argv[1] == "measure":
            measure_quantiles(model, sequences)
        else:
            with torch.no_grad():
                for sequence in sequences:
                    model.hidden(torch.tensor([sequence]))
        # Not getrusage: its ru_maxrss starts with that of the process which started this one.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) // 1024)
    """)
    peaks = {}
    for what in ("run", "measure"):
        words = [sys.executable, "-c", program, what]
        peaks[what] = int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert peaks["run"] > 300  # MB: the weights alone are 270
    assert 0 < peaks["measure"] - peaks["run"] < 200


def text(count=3, length=40, seed=4):
    return torch.randint(3, 40_000, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def test_gradients_of_the_text_are_those_of_autograd(tiny):
    """The dense model's, of the sum over tokens, at the input of a layer."""
    model = load_model(tiny)
    name, sequence = "layers.1.feed_forward.w13", text(1)[0]
    held = {}

    def keep(found, layer, x, phase):
        if found == name:
            held["x"] = x.detach().requires_grad_()
            return held["x"]

    with watch_inputs(model, keep):
        logits = model(torch.tensor([sequence]))[0, :-1]
    F.cross_entropy(logits, torch.tensor(sequence[1:]), reduction="sum").backward()
    expected = held["x"].grad[0, 1:].square().mean(0).double()
    seen = observe(model, [sequence], "gradients", "text")
    torch.testing.assert_close(seen[name]["fisher"], expected, rtol=1e-3, atol=1e-12)
    assert all(found["cost"] == 0 for found in seen.values())  # nothing is dropped
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(model).values())
    assert not model.tok_embeddings._forward_hooks


def test_cost_is_the_first_order_gain_of_keeping_what_is_at_the_border(tiny):
    """No mask follows the last layer, so that it is the derivative by a factor of these entries, here at 0."""
    model, sequences = load_model(tiny), text(2)
    name = "layers.1.feed_forward.w2"
    layer = sparse_layers(model)[name]
    layer.threshold.fill_(measure_quantiles(model, sequences)[name][120].item())
    seen = observe(model, sequences, "costs", "divergence")[name]
    dense = load_model(tiny)
    gain = square = 0.0
    for sequence in sequences:
        tokens, factor = torch.tensor([sequence]), torch.zeros((), requires_grad=True)

        def scale(found, _, x, phase, factor=factor):
            if found == name:
                nonlocal square
                dropped, share = layer.dropped(x), x.abs() / layer.threshold
                near = (share > 1 / BORDER) & (share <= BORDER)
                dropped[:, 0] = near[:, 0] = False
                square += x[near].square().sum().item()
                return x.masked_fill(dropped, 0) + factor * x.masked_fill(~near, 0)
            return None

        with torch.no_grad():
            reference = dense(tokens)[0, :-1].log_softmax(-1)
        with watch_inputs(model, scale):
            found = model(tokens)[0, :-1].log_softmax(-1)
        F.kl_div(found, reference, log_target=True, reduction="sum").backward()
        gain -= factor.grad.item()
    assert seen["cost"].item() == pytest.approx(gain / square, rel=1e-3)


def test_masks_pass_gradients_as_if_they_were_not_there(tiny):
    """With all inputs of a block's end dropped, what lies before it in the block still has a gradient."""
    model, sequences = load_model(tiny), text(1)
    sparse_layers(model)["layers.1.feed_forward.w2"].threshold.fill_(1e9)
    seen = observe(model, sequences, "costs", "divergence")
    assert seen["layers.1.feed_forward.w13"]["fisher"].sum() > 0


def test_observed_is_masked_and_scaled(tiny):
    model, sequences = load_model(tiny), text(2)
    name, later = "layers.0.attention.wo", "layers.1.attention.wqkv"
    plain = observe(model, sequences, "dense")
    factors = [torch.full((layer.weight.in_features,), 2.0) for layer in sparse_layers(model).values()]
    scaled = observe(model, sequences, "dense", factors=factors)
    torch.testing.assert_close(2 * scaled[name]["quantiles"][1:], plain[name]["quantiles"][1:], rtol=0.01, atol=0)
    sparse_layers(model)[name].threshold.fill_(1e9)
    dropped = observe(model, sequences, "sparse")
    assert torch.equal(dropped[name]["quantiles"], plain[name]["quantiles"])
    assert not torch.equal(dropped[later]["quantiles"], plain[later]["quantiles"])
