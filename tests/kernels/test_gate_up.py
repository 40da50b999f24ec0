import pytest
import torch
from torch.utils import _pytree as pytree

from teal_fast.kernels.backend import triton
from teal_fast.kernels.gate_up import _gate_up_cuda, gate_up, gate_up_reference
from teal_fast.kernels.semaphore import arrivals
from teal_fast.tests.kernels.compacted import DEVICE, REPEATS, compact, expand, normal
from teal_fast.tests.kernels.quantized import poison, quantized

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
# h is rounded once and reaches 8 here; the order of summation moves it by one last place. In fp32 it is all there is,
# 2e-6. Quantized rows take their entries in fixed point, off by half a level, 6e-5 here: 1e-4 to 4e-4 in h.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 0.063}
QUANTIZED_TOLERANCE = {torch.float32: 6e-4}


def make(K: int, F: int, dtype: torch.dtype, limit: float = 0.3, kept: float = 0.67):
    x = compact(normal(K, dtype=dtype, seed=1), torch.full((K,), kept, device=DEVICE))
    return (
        *x,
        (normal(K, 2 * F) / K**0.5).to(dtype),
        torch.full((F,), limit, device=DEVICE),
        None,
        0,
        arrivals(2 * F, DEVICE),
    )


def make_quantized(K: int, F: int, group: int, dtype: torch.dtype, limit: float = 0.3, kept: float = 0.67):
    x = compact(normal(K, dtype=dtype, seed=1), torch.full((K,), kept, device=DEVICE))
    weight = quantized(K, 2 * F, group)
    scale = weight.scale / K**0.5
    return *x, weight.packed, torch.full((F,), limit, device=DEVICE), scale, group, arrivals(2 * F, DEVICE)


def dropped_rows(index, count, K: int):
    dropped = torch.ones(K, dtype=torch.bool, device=DEVICE)
    dropped[index[0, : int(count)].long()] = False
    return dropped


def check(inputs, tolerance: float) -> None:
    F = len(inputs[4])
    found, wanted = (expand(*function(*inputs), F) for function in (_gate_up_cuda, gate_up_reference))
    near = (found != 0) != (wanted != 0)  # on the threshold, rounding decides
    assert (torch.where(near, 0, found) - torch.where(near, 0, wanted)).abs().max() <= tolerance
    assert ((found + wanted)[near].abs() - 0.3).abs().le(tolerance).all()
    assert F == 1 or 0.1 < (wanted != 0).float().mean() < 0.9


# exact slots; ragged both ways; one column
@pytest.mark.parametrize("K, F", [(256, 128), (300, 100), (65, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_reference(dtype, K, F):
    check(make(K, F, dtype), TOLERANCE[dtype])


# the same, and groups of each size
@pytest.mark.parametrize(
    "K, F, group",
    [
        *[(256, 128, 0), (300, 208, 0), (65, 16, 0)],
        *[(128, 128, 64), (300, 192, 64), (100, 384, 128), (150, 192, 192)],
    ],
)
@pytest.mark.parametrize("dtype", QUANTIZED_TOLERANCE, ids=str)
def test_quantized_matches_reference(dtype, K, F, group):
    check(make_quantized(K, F, group, dtype), QUANTIZED_TOLERANCE[dtype])


@pytest.mark.parametrize("group", [0, 64])
def test_quantized_reference(group):
    x, weight = compact(normal(100, seed=1), torch.full((100,), 0.67, device=DEVICE)), quantized(100, 128, group)
    keep_all = torch.full((64,), -1.0, device=DEVICE)
    h = gate_up_reference(*x, weight.packed, keep_all, weight.scale / 10, group, arrivals(128, DEVICE))
    gate, up = (expand(*x, 100) @ weight.dense() / 10).chunk(2)
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(expand(*h, 64), expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_all_and_nothing_kept():
    assert _gate_up_cuda(*make(150, 70, torch.float32, limit=-1.0))[2].tolist() == [32, 32, 6]
    assert _gate_up_cuda(*make(150, 70, torch.float32, limit=100.0))[2].tolist() == [0] * 3
    h = expand(*_gate_up_cuda(*make(150, 70, torch.float32, limit=-1.0, kept=100.0)), 70)
    assert h.eq(0).all()  # an empty list


@pytest.mark.parametrize("group, counts", [(0, [128, 64]), (64, [192]), (192, [64, 64, 64])])
def test_quantized_all_and_nothing_kept(group, counts):
    assert _gate_up_cuda(*make_quantized(70, 192, group, torch.float32, limit=100.0))[2].sum() == 0
    h = expand(*_gate_up_cuda(*make_quantized(70, 192, group, torch.float32, limit=-1.0, kept=100.0)), 192)
    assert h.eq(0).all()
    every = make_quantized(70, 192, group, torch.float32, limit=-1.0, kept=-1.0)
    found, wanted = _gate_up_cuda(*every), gate_up_reference(*every)
    assert found[2].tolist() == counts
    torch.testing.assert_close(
        expand(*found, 192), expand(*wanted, 192), rtol=0, atol=QUANTIZED_TOLERANCE[torch.float32]
    )


def test_nan_travels_and_dropped_rows_are_not_read():
    index, value, count, weight, *rest = make(150, 70, torch.float32)
    weight[dropped_rows(index, count, 150)] = torch.nan
    assert expand(*_gate_up_cuda(index, value, count, weight, *rest), 70).isfinite().all()
    value[0, 0] = torch.nan
    assert _gate_up_cuda(index, value, count, weight, *rest)[2].sum() == 70


@pytest.mark.parametrize("group, bad", [(0, torch.nan), (0, torch.inf), (64, torch.nan), (192, -torch.inf)])
def test_nan_travels_and_dropped_quantized_rows_are_not_read(group, bad):
    index, value, count, rows, *rest = make_quantized(70, 192, group, torch.float32)
    h = expand(*_gate_up_cuda(index, value, count, rows, *rest), 192)
    poisoned = poison(rows, dropped_rows(index, count, 70))
    assert torch.equal(expand(*_gate_up_cuda(index, value, count, poisoned, *rest), 192), h)
    value[0, 0] = bad
    found = expand(*_gate_up_cuda(index, value, count, rows, *rest), 192)
    assert not found.isfinite().any()


@pytest.mark.parametrize("group", [0, 64])
def test_same_bits_every_time(group):
    inputs = make_quantized(150, 128, group, torch.bfloat16)
    first = expand(*_gate_up_cuda(*inputs), 128)
    assert all(torch.equal(expand(*_gate_up_cuda(*inputs), 128), first) for _ in range(REPEATS))


@pytest.mark.parametrize("group", [None, 0, 64])
def test_fake_agrees(group):
    inputs = make(150, 200, torch.bfloat16) if group is None else make_quantized(150, 192, group, torch.bfloat16)
    real = _gate_up_cuda(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.gate_up(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


def test_rejects_bad_input():
    index, value, count, weight, threshold, *rest = make(64, 32, torch.float32)
    with pytest.raises(ValueError, match="thresholds"):
        gate_up(index, value, count, weight, threshold[:-1], *rest)
    with pytest.raises(ValueError, match="takes rows"):
        gate_up(index, value.bfloat16(), count, weight, threshold, *rest)
    with pytest.raises(ValueError, match="takes index, value"):
        gate_up(index, value[:, :-1], count, weight, threshold, *rest)
    with pytest.raises(ValueError, match="takes contiguous"):
        gate_up(index, value, count, weight.t().contiguous().t(), threshold, *rest)
    with pytest.raises(ValueError, match="fp32 threshold"):
        gate_up(index, value, count, weight, threshold.bfloat16(), *rest)


@pytest.mark.parametrize(
    "F, group, change, said",
    [
        (96, 0, lambda w, t, s: (w, t, None), "no scale"),
        (96, 0, lambda w, t, s: (w, t, s[:-1]), "takes rows"),
        (96, 0, lambda w, t, s: (w, t, s.double()), "takes rows"),
        (96, 0, lambda w, t, s: (w, t[:-8], s), "88 thresholds"),
        (96, 0, lambda w, t, s: (w.view(torch.uint8), t, s), "groups of 0"),
        (8, 0, lambda w, t, s: (w, t, s), "whole groups"),  # gate and up share 16 bytes
        (96, 64, lambda w, t, s: (w, t, s), "whole groups"),  # and a group
        (128, 64, lambda w, t, s: (w[:, :-32].contiguous(), t, s), "takes rows"),
        (128, 64, lambda w, t, s: (w, t, s, 32), "groups of 32"),
    ],
)
def test_rejects_bad_quantized_input(F, group, change, said):
    index, value, count, rows, threshold, scale, _, arrived = make_quantized(64, F, group, torch.float32)
    rows, threshold, scale, *other = change(rows, threshold, scale)
    with pytest.raises(ValueError, match=said):
        gate_up(index, value, count, rows, threshold, scale, *(other or [group]), arrived)
