"""Weights in a GGUF file's blocks: products, rows of embeddings, gradients, and what a skipped channel saves."""

import pytest
import torch

from teal_fast.files.gguf_blocks import PARSERS, to_blocks
from teal_fast.kernels.blocks import BLOCK_TYPES, dequantize_blocks
from teal_fast.tests.gguf_models import random_tensor
from teal_fast.weights.blocks import BlockEmbedding, BlockOutput, BlockPart, BlockWeight

K = 512
each_type = pytest.mark.parametrize("name", PARSERS)


def make_part(name: str, N: int) -> BlockPart:
    return BlockPart(to_blocks(torch.from_numpy(random_tensor(name, N, K, N)), name, K), N)


def make_weight(*parts: tuple[str, int]) -> tuple[BlockWeight, torch.Tensor]:
    """A weight of parts of such types and outputs, and its values [K, N]."""
    made = [make_part(*part) for part in parts]
    return BlockWeight(made), torch.cat([dequantize_blocks(part.blocks)[:, : part.N] for part in made], 1)


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch):
    monkeypatch.setattr("teal_fast.weights.blocks.VALUES_AT_ONCE", K * 128)


@each_type
def test_values_in_pieces_and_by_column_are_the_same(name):
    weight, expected = make_weight((name, 320), (name, 100))
    assert torch.equal(weight.dequantize(), expected)
    table, values = make_weight((name, 420))
    tokens = torch.tensor([[0, 63, 64], [127, 419, 384]])
    assert torch.equal(BlockEmbedding(table, torch.float32)(tokens), values.t()[tokens])
    assert BlockEmbedding(table, torch.bfloat16)(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(dtype):
    weight, values = make_weight(("Q4_K", 192), ("Q6_K", 64), ("Q8_0", 300))
    x, bias = torch.randn(3, K).to(dtype), torch.randn(556).to(dtype)
    expected = x.double() @ values.double()
    atol = {torch.float32: 1e-5, torch.bfloat16: 1 / 128}[dtype] * expected.abs().max().item()
    near = {"rtol": 0, "atol": atol, "check_dtype": False}
    torch.testing.assert_close(weight.matmul(x, bias), expected + bias, **near)
    torch.testing.assert_close(BlockOutput(weight)(x[None]), expected[None], **near)
    threshold = x[0].float().abs().median().repeat(K)
    kept = x[0].double().masked_fill(x[0].abs() <= threshold, 0)
    assert 0.4 < (kept == 0).float().mean() < 0.6
    near["atol"] += expected.abs().max().item() / 100  # x is rounded to 8 bits
    torch.testing.assert_close(weight.sparse_matvec(x[0], threshold), kept @ values.double(), **near)
    torch.testing.assert_close(BlockOutput(weight)(x[:1]), expected[:1], **near)


def test_gradients_of_inputs():
    weight, values = make_weight(("Q4_K", 192), ("Q6_K", 300))
    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(492)
    weight.matmul(x, bias).square().sum().backward()
    expected = 2 * (x.detach() @ values + bias) @ values.t()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert all(parameter.grad is None for parameter in weight.parameters())


def test_a_skipped_channel_saves_its_codes():
    weight = BlockWeight.empty(K, [("Q4_K", 128), ("Q6_K", 100)])  # of which 28 are padding
    assert weight.row_bytes == 128 * 4 // 8 + 128 * 6 // 8


def test_inputs_that_a_type_does_not_divide():
    with pytest.raises(ValueError, match="320 inputs are no multiple of 256, as Q4_K needs"):
        BlockPart.empty(BLOCK_TYPES["Q4_K"], 320, 64)
