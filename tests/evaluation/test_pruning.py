"""Magnitude and Wanda pruning against their definitions, weight by weight; the baseline flag of eval.py."""

import json

import pytest
import torch

from teal_fast import eval, quantize
from teal_fast.evaluation.pruning import projection_sizes, prune, pruned, zeros_by_kind
from teal_fast.files.load import load_model
from teal_fast.sparse_model import sparse_layers, watch_inputs

TOKENS = torch.randint(3, 40_000, (4, 20), generator=torch.Generator().manual_seed(0))


def test_pruned_by_hand():
    rows = torch.tensor([[1.0, -8], [-2, 4], [3, 0.5], [-4, 16]])
    assert pruned(rows, rows.abs(), 0.5, by_output=False).tolist() == [[0, -8], [0, 4], [0, 0], [-4, 16]]
    assert pruned(rows, rows.abs(), 0.5, by_output=True).tolist() == [[0, -8], [0, 0], [3, 0], [-4, 16]]
    assert torch.equal(pruned(rows, rows.abs(), 0.0, True), rows)
    assert (pruned(torch.ones(10, 10), torch.ones(10, 10), 0.37, False) == 0).sum() == 37  # ties are no excuse


def test_magnitude_ranks_each_projection_for_itself(tiny):
    model, dense = load_model(tiny), load_model(tiny)
    before = sparse_layers(dense)["layers.0.attention.wqkv"].weight.packed
    with torch.no_grad():  # k larger than q and v a hundredfold: ranked together, k would lose nothing
        sparse_layers(model)["layers.0.attention.wqkv"].weight.packed[:, 64:96] *= 100
    prune(model, "magnitude", 0.4)
    for name, layer in sparse_layers(model).items():
        for part in layer.weight.packed.split(projection_sizes(name, model.args), dim=1):
            assert (part == 0).float().mean() == pytest.approx(0.4, abs=1 / part.numel())
            assert part[part != 0].abs().min() > 0
    after = sparse_layers(model)["layers.0.attention.wqkv"].weight.packed[:, :64]
    kept = after != 0
    assert torch.equal(after[kept], before[:, :64][kept])
    assert before[:, :64][kept].abs().min() >= before[:, :64][~kept].abs().max()


def test_wanda_scores_by_the_inputs_that_pruned_layers_pass_on(tiny):
    model, dense = load_model(tiny), load_model(tiny)
    prune(model, "wanda", 0.5, TOKENS)
    inputs = {}
    with watch_inputs(model, lambda name, layer, x, phase: inputs.__setitem__(name, x.clone())), torch.no_grad():
        model.hidden(TOKENS)  # each layer's input now comes from pruned layers only, as it did when it was pruned
    for name, layer in sparse_layers(model).items():
        original = sparse_layers(dense)[name].weight.packed
        score = original.abs() * inputs[name].flatten(0, 1).norm(dim=0)[:, None]
        K = len(original)
        expected = torch.zeros_like(original, dtype=torch.bool).scatter_(0, score.argsort(0)[: round(K / 2)], True)
        assert ((layer.weight.packed == 0) == expected).float().mean() > 0.999, name  # sums in another order
        assert torch.equal(layer.weight.packed[~expected & (layer.weight.packed != 0)], original[~expected])
    assert zeros_by_kind(model)["all"] == pytest.approx(0.5, abs=0.01)


def test_wanda_loses_less_than_magnitude_where_inputs_differ(tiny):
    """With one input channel blown up, |w| alone is a bad guide to the product."""
    errors = {}
    for method in ("magnitude", "wanda"):
        model = load_model(tiny)
        for layer in model.layers:
            layer.attention_norm.weight = torch.nn.Parameter(torch.linspace(0, 3, 64) ** 3, requires_grad=False)
            layer.ffn_norm.weight = layer.attention_norm.weight
        with torch.no_grad():
            expected = model.hidden(TOKENS)
            prune(model, method, 0.5, TOKENS)
            errors[method] = (model.hidden(TOKENS) - expected).norm().item()
    assert errors["wanda"] < 0.9 * errors["magnitude"]


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_command(command, tiny, tmp_path, method):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(" ".join(f"The {i}th sentence is about {i * i} whales." for i in range(40)))
    arguments = ["--text", text, "--wanda_text", text, "--context", 64, "--windows", 2, "--out", out]
    done = command("eval", "--checkpoint", tiny, *arguments, "--sparsity", 0, 0.5, "--baseline", method)
    assert done.returncode == 0, done.stderr
    dense, sparse = json.loads(out.read_text())
    assert (dense["baseline"], dense["achieved_sparsity"], dense["calibration"]) == (method, 0, None)
    assert sparse["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert set(sparse["achieved_by_kind"]) == {"qkv", "o", "gate+up", "down"}
    assert sparse["perplexity"] != dense["perplexity"]


def test_quantized_weights_are_refused(run_main, even, tmp_path):
    code, _, err = run_main(quantize.main, "--checkpoint", even, "--mode", "int8", "--out", tmp_path / "int8")
    assert code == 0, err
    code, _, err = run_main(
        eval.main, "--checkpoint", tmp_path / "int8", "--context", 64, "--sparsity", 0.5, "--baseline", "magnitude"
    )
    assert code == 1
    assert err.splitlines()[-1] == "error: --baseline prunes bf16, fp16 and fp32 weights, these are int8"
