"""Gradients against autograd's own over the whole model, by any output layer and in pieces; the memory they take."""

import pytest
import torch
import torch.nn.functional as F

from teal_fast.calibration import block_passes
from teal_fast.calibration.block_passes import backpropagate, hidden_states, loss_gradient, work
from teal_fast.files.load import load_model
from teal_fast.kernels.blocks import BLOCK_TYPES
from teal_fast.model import Linear, soft_cap
from teal_fast.tests.memory import peak_bytes
from teal_fast.weights import output as output_module
from teal_fast.weights.blocks import BlockOutput, BlockWeight
from teal_fast.weights.output import Int8Output, output_weight
from teal_fast.weights.product import BF16_PRODUCTS

VOCAB, DIM, T = 500, 64, 21


def make_output(kind):
    weight = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(1))
    if kind == "int8":
        return Int8Output.pack(weight)
    if kind in BLOCK_TYPES:
        made = BlockWeight.empty(DIM, [(kind, VOCAB)])
        for parameter in made.parameters():
            parameter.copy_(torch.randint(0, 3, parameter.shape, generator=torch.Generator().manual_seed(2)))
        return BlockOutput(made)
    linear = Linear(DIM, VOCAB, bias=False).to(kind)
    linear.weight.data.copy_(weight)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("loss", ["text", "divergence"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, "int8", "Q8_0"], ids=str)
@pytest.mark.parametrize("rows, cap", [(1, 0), (8, 0), (1000, 0), (8, 2.0)])  # tokens at once: 20 count, 8 leave a rest
def test_loss_gradient_is_that_of_autograd(kind, loss, rows, cap, monkeypatch):
    monkeypatch.setattr(block_passes, "LOGITS_AT_ONCE", rows * VOCAB)
    monkeypatch.setattr(output_module, "PIECE", 130 * DIM)  # of the vocabulary, with a rest
    output, generator = make_output(kind), torch.Generator().manual_seed(3)
    hidden, dense = (torch.randn(T, DIM, generator=generator) / 4 for _ in range(2))
    tokens, done = torch.randint(VOCAB, (T,), generator=generator), []
    found = loss_gradient(hidden, output, tokens, dense if loss == "divergence" else None, cap, done.append)
    leaf, weight = hidden.clone().requires_grad_(), output_weight(output).detach()
    logits, expected = (soft_cap(F.linear(x[:-1], weight), cap).log_softmax(-1) for x in (leaf, dense))
    value = F.kl_div(logits, expected, log_target=True, reduction="sum") if loss == "divergence" else None
    (F.nll_loss(logits, tokens[1:], reduction="sum") if value is None else value).backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-4 * leaf.grad.abs().max().item())
    assert (found[-1] == 0).all() and sum(done) == T - 1


def test_backpropagation_by_blocks_is_that_through_the_whole_model(tiny):
    model, done = load_model(tiny), []
    tokens = torch.randint(3, 40_000, (1, 30), generator=torch.Generator().manual_seed(4))
    given, found = [], []
    model.layers[0].register_full_backward_pre_hook(lambda module, gradient: given.append(gradient[0].clone()))
    with torch.no_grad():
        states = list(hidden_states(model, tokens, done.append))
        assert torch.equal(model.norm(states[-1]), model.hidden(tokens))
        gradient = torch.randn_like(states[0])
        backpropagate(model, states, gradient, done.append)
    assert states == [] and sum(done) == work(model, 30, "text") - 2 * 29 * block_passes.output_layers(model)
    hook = model.tok_embeddings.register_forward_hook(lambda module, inputs, x: x.requires_grad_())
    with hook:
        model.hidden(tokens).backward(gradient)
    found, expected = given
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


MADE = """
from teal_fast.calibration.probe import observe
from teal_fast.families.args import ModelArgs
from teal_fast.families.rotary import make_rope
from teal_fast.model import Transformer
from teal_fast.sparse_model import sparsify
from teal_fast.weights import product
product.BF16_PRODUCTS = {fast}

def measure(layers, dim, tokens):
    rope, each = make_rope({{"rope_type": "default", "rope_theta": 10000.0, "share": 1.0}}, dim // 8), (None,) * layers
    args = ModelArgs(
        "made", dim, layers, 8, 8, dim // 8, 4 * dim, 32000, 2048, 1e-5, (rope,), (0,) * layers, each, dim // 8
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer(args)
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.03)
    model = sparsify(model.requires_grad_(False))
    observe(model, [list(range(tokens))], "costs", "divergence")
"""


NEEDS_BF16 = pytest.mark.skipif(not BF16_PRODUCTS, reason="this processor would take ten minutes for bf16")


# Without products in bf16 weights are widened to fp32.
@pytest.mark.parametrize("fast", [pytest.param(True, marks=NEEDS_BF16), False])
def test_gradients_take_the_memory_of_one_block(fast):
    """Twice the stored weights at most, and what logits take. All blocks' activations were 0.6 GB more."""
    layers, dim = 16, 512
    stored = 2 * (layers * 16 * dim * dim + 2 * 32000 * dim)
    grown = peak_bytes("measure(16, 512, 512)", MADE.format(fast=fast) + "measure(1, 64, 8)")
    assert stored < grown < 2 * stored + 2e8
