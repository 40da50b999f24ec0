"""Blocks from GGUF tensors have gguf-py's own values, bit for bit."""

import gguf
import pytest
import torch

from teal_fast.files.gguf_blocks import PARSERS, to_blocks
from teal_fast.kernels.block_planes import NARROW, pack_plane, places, unpack_plane
from teal_fast.kernels.blocks import dequantize_blocks
from teal_fast.tests.gguf_models import random_tensor


@pytest.mark.parametrize("N", [64, 100, 320])
@pytest.mark.parametrize("name", PARSERS)
def test_values_are_gguf_pys_bit_for_bit(name, N):
    K = 512
    stored = random_tensor(name, N, K, N)
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    blocks = to_blocks(torch.from_numpy(stored), name, K)
    assert (blocks.K, blocks.N) == (K, N + -N % NARROW)
    found = dequantize_blocks(blocks)
    assert torch.equal(found[:, :N].view(torch.int32), torch.from_numpy(expected).t().contiguous().view(torch.int32))
    assert not found[:, N:].any()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("N", [64, 128, 192])
def test_planes_come_back(bits, N):
    codes = torch.randint(0, 2**bits, (64, N), dtype=torch.uint8)
    plane = pack_plane(codes, bits)
    assert plane.shape == (64, N * bits // 8) and torch.equal(unpack_plane(plane, bits), codes)


def test_four_interleaved_rows_give_whole_neighbours():
    """What registers of 16 bytes do: dword g of four interleaved rows' lane holds outputs 16 g + 4 lane on."""
    where = places(64)
    for output in range(64):
        g, lane, i = output // 16, output // 4 % 4, output % 4
        assert where[output] == 16 * lane + 4 * g + i
