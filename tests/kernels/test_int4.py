import pytest
import torch

from teal_fast.kernels.int4 import ROW_ALIGNMENT, pack_int4, row_bytes, unpack_int4


def make(K: int, N: int, group: int):
    generator = torch.Generator().manual_seed(N + group)
    values = torch.randint(16, (K, N), generator=generator).to(torch.uint8)
    return values, torch.randn(K, N // group, generator=generator).bfloat16()


# one group; groups that fill whole lines of scales, and that do not; one row
@pytest.mark.parametrize("K, N, group", [(5, 64, 64), (3, 1024, 64), (4, 384, 128), (7, 576, 192), (1, 256, 256)])
def test_round_trip_is_exact(K, N, group):
    values, scale = make(K, N, group)
    packed = pack_int4(values, scale)
    assert packed.shape == (K, row_bytes(N, group)) and packed.dtype == torch.uint8
    expected = (values.float() - 8) * scale.float().repeat_interleave(group, dim=1)
    assert torch.equal(unpack_int4(packed, N, group), expected)


def test_layout():
    values, scale = make(2, 128, 64)
    packed = pack_int4(values, scale)
    assert packed.shape == (2, 96)
    for block in range(4):
        mine, bytes16 = values[:, 32 * block : 32 * block + 32], packed[:, 16 * block : 16 * block + 16]
        assert torch.equal(bytes16 & 15, mine[:, :16]) and torch.equal(bytes16 >> 4, mine[:, 16:])
    assert torch.equal(packed[:, 64:68], scale.view(torch.uint8))
    assert packed[:, 68:].eq(0).all()


@pytest.mark.parametrize(
    "N, group, expected", [(64, 64, 64), (1024, 64, 544), (1088, 64, 608), (384, 128, 224), (576, 192, 320)]
)
def test_row_bytes(N, group, expected):
    assert row_bytes(N, group) == expected and expected % ROW_ALIGNMENT == 0


# no whole number of groups; not multiples of 64; nothing; negative; fewer outputs than a group
@pytest.mark.parametrize("N, group", [(320, 128), (192, 96), (96, 32), (128, 0), (128, -64), (64, 128)])
def test_rejects_groups_that_do_not_fit(N, group):
    with pytest.raises(ValueError, match=f"{N} outputs do not fall into groups of {group}"):
        row_bytes(N, group)


def test_pack_rejects_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="groups of 32"):
        pack_int4(torch.zeros(2, 128, dtype=torch.uint8), torch.ones(2, 4, dtype=torch.bfloat16))
