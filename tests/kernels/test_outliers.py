"""Entries 1,000 times the rest and more: quantized products on CUDA keep what all others add."""

import pytest
import torch

from teal_fast.kernels.backend import triton
from teal_fast.kernels.compact_gemv import _compact_gemv_cuda
from teal_fast.kernels.compact_vector import CompactVector
from teal_fast.kernels.fixed_point import MOST_ROWS
from teal_fast.kernels.gate_up import _gate_up_cuda, gate_up_reference
from teal_fast.kernels.launch_config import launch_config
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.semaphore import new_semaphores
from teal_fast.tests.kernels.compacted import DEVICE, compact, expand, normal
from teal_fast.tests.kernels.quantized import quantized

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
KEEP_ALL, HALF = -1.0, 0.67


def lost(outliers: dict[int, float], N: int, group: int, slots: int = 1, limit: float = HALF) -> float:
    """What is wrong in a product of 90 entries with these among them, as a share of what all others add."""
    others = normal(90, seed=1).masked_fill_(normal(90, seed=1).abs() <= limit, 0)
    others[list(outliers)] = 0
    x = others.clone()
    for place, size in outliers.items():
        x[place] = size
    weight = quantized(90, N, group)
    y = _compact_gemv_cuda(
        compact(x, torch.full((90,), limit, device=DEVICE), slots), weight.weight, new_semaphores(N, DEVICE)
    )
    exact = weight.dense().double()
    return ((y.double() - x.double() @ exact).norm() / (others.double() @ exact).norm()).item()


# The first, the last, on both sides of where one split or slot ends and the next begins, seven in one split; columns
# that are no whole tile, one group of four bits a tile and two.
@pytest.mark.parametrize(
    "outliers, N, group, slots",
    [
        ({0: 1000.0}, 48, 0, 1),
        ({89: -5000.0}, 64, 0, 1),
        ({31: 5000.0, 32: -1000.0, 63: 5000.0, 64: 1000.0}, 64, 0, 1),
        ({29: 1000.0, 30: 5000.0, 59: -1000.0, 60: -5000.0}, 64, 0, 3),
        ({k: 1000.0 * (k + 1) for k in range(7)}, 64, 0, 1),
        ({40: 3e4}, 64, 0, 9),
        ({17: 1000.0}, 64, 64, 1),
        ({3: -5000.0, 70: 1000.0}, 128, 64, 1),
        ({29: 1000.0, 30: 5000.0}, 128, 128, 3),
    ],
)
def test_what_others_add_is_kept(outliers, N, group, slots):
    assert lost(outliers, N, group, slots) < 5e-4


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("size", [20.0, 100.0, 300.0])
def test_sizes_between(size, group):
    """What is just not an outlier costs most."""
    assert lost({11: size}, 64, group, limit=KEEP_ALL) < (2e-3 if group else 1e-3)


@pytest.mark.parametrize("group, size", [(0, 3e4), (64, 1e-3), (0, 1e35)])
def test_all_zero_besides_one(group, size):
    x = torch.zeros(50, device=DEVICE)
    x[20] = size
    weight = quantized(50, 64, group, seed=1)
    weight = weight._replace(scale=weight.scale / size)  # fp32 holds the product
    y = _compact_gemv_cuda(
        compact(x, torch.full((50,), KEEP_ALL, device=DEVICE)), weight.weight, new_semaphores(64, DEVICE)
    )
    torch.testing.assert_close(y, weight.dense()[20] * size, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_beside_outliers(bad):
    x = normal(50, seed=1)
    x[3], x[20] = 5000, bad
    vector = compact(x, torch.full((50,), HALF, device=DEVICE))
    y = _compact_gemv_cuda(vector, quantized(50, 64, 0).weight, new_semaphores(64, DEVICE))
    assert y.isnan().all()


@pytest.mark.parametrize("group, zero", [(0, 0), (64, 0x88)])
def test_gate_up_keeps_what_others_add(group, zero):
    """The outlier's own row is zero: what is left is the others alone."""
    x, weight = normal(60, seed=1), quantized(60, 128, group).weight
    x[7] = 5000
    weight = weight._replace(scale=weight.scale / 60**0.5)
    weight.packed[7, : 64 if group else 128] = zero
    inputs = (
        compact(x, torch.full((60,), HALF, device=DEVICE)),
        weight,
        torch.full((64,), KEEP_ALL, device=DEVICE),
        new_semaphores(128, DEVICE),
    )
    found, expected = expand(_gate_up_cuda(*inputs), 64), expand(gate_up_reference(*inputs), 64)
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("K", [576, 4096, 16384, 53248])
@pytest.mark.parametrize("columns, warps", [(64, 1), (256, 1), (32, 4)])
def test_sums_of_any_entries_fit_32_bits(K, columns, warps):
    assert MOST_ROWS * 128 * 2**15 < 2**31
    weight = PackedWeight(torch.empty(K, 256, dtype=torch.int8, device="meta"), torch.empty(256, device="meta"))
    for slots in (1, -(-K // 256)):
        index = torch.empty(slots, -(-K // slots), dtype=torch.int32, device="meta")
        launch = launch_config(CompactVector(index, index, index[:, 0]), weight, 1, (2, columns, warps, 1))
        share = launch["LANES"] if slots == 1 else launch["LANES"] // triton.next_power_of_2(launch["SHARE"])
        step = 4 * share * (launch["SPLITS"] if slots == 1 else 1)
        assert 4 * -(-index.shape[1] // step) <= MOST_ROWS
        assert slots == 1 or launch["SPLITS"] * launch["SHARE"] >= slots


def test_slots_too_wide_for_sums_are_refused():
    weight = PackedWeight(torch.empty(4096, 256, dtype=torch.int8, device="meta"), torch.empty(256, device="meta"))
    index = torch.empty(2, 2048, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="slots of 2048 channels are too wide"):
        launch_config(CompactVector(index, index, index[:, 0]), weight, 1, (2, 256, 1, 1))
