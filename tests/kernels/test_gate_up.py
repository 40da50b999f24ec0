import pytest
import torch
from torch.utils import _pytree as pytree

from teal_fast.kernels.backend import triton
from teal_fast.kernels.gate_up import _gate_up_cuda, gate_up, gate_up_reference
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.semaphore import new_semaphores
from teal_fast.tests.kernels.compacted import DEVICE, REPEATS, compact, dropped_rows, expand, normal
from teal_fast.tests.kernels.quantized import poison, quantized

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
# h is rounded once and reaches 8 here; the order of summation moves it by one last place. In fp32 it is all there is,
# 2e-6. Quantized rows take their entries in fixed point, off by half a level, 6e-5 here: 1e-4 to 4e-4 in h.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 0.063}
QUANTIZED_TOLERANCE = 6e-4


def make(K: int, F: int, dtype: torch.dtype, limit: float = 0.3, kept: float = 0.67, group: int | None = None):
    """Inputs of the op; `group` None: a weight of floats."""
    x = compact(normal(K, dtype=dtype, seed=1), torch.full((K,), kept, device=DEVICE))
    if group is None:
        weight = PackedWeight((normal(K, 2 * F) / K**0.5).to(dtype))
    else:
        weight = quantized(K, 2 * F, group).weight
        weight = weight._replace(scale=weight.scale / K**0.5)
    return x, weight, torch.full((F,), limit, device=DEVICE), new_semaphores(2 * F, DEVICE)


def run(*inputs):
    return expand(_gate_up_cuda(*inputs), len(inputs[2]))


def check(inputs, tolerance: float) -> None:
    F = len(inputs[2])
    found, expected = run(*inputs), expand(gate_up_reference(*inputs), F)
    near = (found != 0) != (expected != 0)  # on the threshold, rounding decides
    assert (torch.where(near, 0, found) - torch.where(near, 0, expected)).abs().max() <= tolerance
    assert ((found + expected)[near].abs() - 0.3).abs().le(tolerance).all()
    assert F == 1 or 0.1 < (expected != 0).float().mean() < 0.9


# exact slots; ragged both ways; one column
@pytest.mark.parametrize(
    "K, F, dtype",
    [(64, 64, torch.bfloat16), (90, 50, torch.float32), (90, 100, torch.bfloat16), (65, 1, torch.float32)],
)
def test_matches_reference(dtype, K, F):
    check(make(K, F, dtype), TOLERANCE[dtype])


# the same, and groups of each size
@pytest.mark.parametrize("K, F, group", [(70, 208, 0), (65, 16, 0), (70, 192, 64), (35, 128, 128), (35, 192, 192)])
def test_quantized_matches_reference(K, F, group):
    check(make(K, F, torch.float32, group=group), QUANTIZED_TOLERANCE)


@pytest.mark.parametrize("group", [0, 64])
def test_quantized_reference(group):
    x, weight = compact(normal(100, seed=1), torch.full((100,), 0.67, device=DEVICE)), quantized(100, 128, group)
    keep_all = torch.full((64,), -1.0, device=DEVICE)
    scaled = weight.weight._replace(scale=weight.scale / 10)
    h = gate_up_reference(x, scaled, keep_all, new_semaphores(128, DEVICE))
    gate, up = (expand(x, 100) @ weight.dense() / 10).chunk(2)
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(expand(h, 64), expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_all_and_nothing_kept():
    assert _gate_up_cuda(*make(50, 70, torch.float32, limit=-1.0)).count.tolist() == [32, 32, 6]
    assert _gate_up_cuda(*make(50, 70, torch.float32, limit=100.0)).count.tolist() == [0] * 3
    assert run(*make(50, 70, torch.float32, limit=-1.0, kept=100.0)).eq(0).all()  # an empty list


@pytest.mark.parametrize("group, counts", [(0, [128, 64]), (64, [192]), (192, [64, 64, 64])])
def test_quantized_all_kept(group, counts):
    every = make(20, 192, torch.float32, limit=-1.0, kept=-1.0, group=group)
    found, expected = _gate_up_cuda(*every), gate_up_reference(*every)
    assert found.count.tolist() == counts
    torch.testing.assert_close(expand(found, 192), expand(expected, 192), rtol=0, atol=QUANTIZED_TOLERANCE)


@pytest.mark.parametrize("group", [0, 64])
def test_quantized_nothing_kept(group):
    assert _gate_up_cuda(*make(20, 64, torch.float32, limit=100.0, group=group)).count.sum() == 0
    assert run(*make(20, 64, torch.float32, limit=-1.0, kept=100.0, group=group)).eq(0).all()  # an empty list


def test_nan_travels_and_dropped_rows_are_not_read():
    x, weight, *rest = make(50, 70, torch.float32)
    weight.packed[dropped_rows(x, 50)] = torch.nan
    assert run(x, weight, *rest).isfinite().all()
    x.value[0, 0] = torch.nan
    assert _gate_up_cuda(x, weight, *rest).count.sum() == 70


@pytest.mark.parametrize("group, bad", [(0, torch.nan), (64, torch.inf)])
def test_nan_travels_and_dropped_quantized_rows_are_not_read(group, bad):
    x, weight, *rest = make(30, 64, torch.float32, group=group)
    poisoned = weight._replace(packed=poison(weight.packed, dropped_rows(x, 30)))
    assert torch.equal(run(x, poisoned, *rest), run(x, weight, *rest))
    x.value[0, 0] = bad
    assert not run(x, weight, *rest).isfinite().any()


@pytest.mark.parametrize("group", [None, 64])
def test_same_bits_every_time(group):
    inputs = make(40, 64, torch.bfloat16, group=group)
    first = run(*inputs)
    assert inputs[3].eq(0).all()
    assert all(torch.equal(run(*inputs), first) for _ in range(REPEATS))


@pytest.mark.parametrize("group", [None, 64])
def test_fake_and_op_agree(group):
    x, weight, *rest = make(50, 64, torch.bfloat16, group=group)
    inputs = *x, *weight, *rest
    real = torch.ops.teal.gate_up(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.gate_up(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


@pytest.mark.parametrize(
    "F, group, change, said",
    [
        (32, None, lambda x, w, t: (x, w, t[:-1]), "takes 62 columns for 31 thresholds"),
        (32, None, lambda x, w, t: (x._replace(value=x.value.bfloat16()), w, t), "takes a weight"),
        (
            32,
            None,
            lambda x, w, t: (x._replace(value=x.value[:, :-1]), w, t),
            r"gate_up takes contiguous index \[S, W\]",
        ),
        (32, None, lambda x, w, t: (x, PackedWeight(w.packed.t().contiguous().t()), t), "packed .* strided"),
        (32, None, lambda x, w, t: (x, w, t.bfloat16()), r"threshold \[32\] bfloat16"),
        (96, 0, lambda x, w, t: (x, w._replace(scale=None), t), "no scale"),
        (96, 0, lambda x, w, t: (x, w, t[:-8]), "88 thresholds"),
        (8, 0, lambda x, w, t: (x, w, t), "whole groups"),  # gate and up share 16 bytes
        (96, 64, lambda x, w, t: (x, w, t), "whole groups"),  # and a group
    ],
)
def test_rejects_bad_input(F, group, change, said):
    *inputs, semaphores = make(64, F, torch.float32, group=group)
    with pytest.raises(ValueError, match=said):
        gate_up(*change(*inputs), semaphores)
