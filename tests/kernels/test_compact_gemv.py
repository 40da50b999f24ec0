import pytest
import torch
from torch.utils import _pytree as pytree

from teal_fast.kernels.backend import triton
from teal_fast.kernels.compact_gemv import _compact_gemv_cuda, compact_gemv, compact_gemv_reference
from teal_fast.kernels.semaphore import arrivals
from teal_fast.tests.kernels.compacted import DEVICE, REPEATS, compact, expand, normal
from teal_fast.tests.kernels.quantized import fixed, order, poison, quantized

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")


def make(K: int, N: int, dtype: torch.dtype, slots: int, limit: float = 0.67):
    weight = normal(K, N, dtype=dtype)
    return (
        *compact(normal(K, dtype=dtype, seed=1), torch.full((K,), limit, device=DEVICE), slots),
        weight,
        None,
        0,
        arrivals(N, DEVICE),
    )


def make_quantized(K: int, N: int, group: int, slots: int, dtype: torch.dtype = torch.float32, limit: float = 0.67):
    x = compact(normal(K, dtype=dtype, seed=1), torch.full((K,), limit, device=DEVICE), slots)
    weight = quantized(K, N, group)
    return x, weight, (*weight[:3], arrivals(N, DEVICE))


def dropped_rows(index, count, K: int):
    dropped = torch.ones(K, dtype=torch.bool, device=DEVICE)
    for k, n in zip(index, count.tolist(), strict=True):
        dropped[k[:n].long()] = False
    return dropped


# a list; slots that fill splits evenly, that do not, fewer slots than splits; ragged columns, one column
@pytest.mark.parametrize(
    "K, N, slots", [(256, 128, 1), (300, 200, 1), (512, 64, 16), (600, 70, 20), (192, 65, 3), (35, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_reference(dtype, K, N, slots):
    inputs = make(K, N, dtype, slots)
    y = _compact_gemv_cuda(*inputs)
    expected = compact_gemv_reference(*inputs)
    assert expected.abs().max() > 1
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)  # products and sums are fp32 whatever the weights are


@pytest.mark.parametrize("slots", [1, 10])
def test_all_and_nothing_kept(slots):
    assert _compact_gemv_cuda(*make(300, 70, torch.float32, slots, limit=100.0)).eq(0).all()
    inputs = make(300, 70, torch.float32, slots, limit=-1.0)
    dense = normal(300, seed=1) @ inputs[3]
    torch.testing.assert_close(_compact_gemv_cuda(*inputs), dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 10])
def test_dropped_rows_are_not_read_and_nan_travels(slots):
    index, value, count, weight, *rest = make(300, 70, torch.float32, slots)
    weight[dropped_rows(index, count, 300)] = torch.nan
    assert _compact_gemv_cuda(index, value, count, weight, *rest).isfinite().all()
    value[0, 0] = torch.nan
    assert _compact_gemv_cuda(index, value, count, weight, *rest).isnan().all()


# a list and slots; ragged columns, fewer slots than splits; groups of each size
@pytest.mark.parametrize(
    "K, N, group, slots",
    [
        *[(256, 64, 0, 1), (100, 208, 0, 1), (300, 80, 0, 20), (35, 16, 0, 1)],
        *[(256, 128, 64, 1), (200, 64, 64, 20), (150, 384, 128, 3), (35, 192, 192, 1)],
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_quantized_matches_reference(dtype, K, N, group, slots):
    x, weight, inputs = make_quantized(K, N, group, slots, dtype)
    y, vector = _compact_gemv_cuda(*x, *inputs), expand(*x, K)
    assert y.dtype == torch.float32
    for expected in (compact_gemv_reference(*x, *inputs), vector @ weight.dense()):
        assert expected.abs().max() > 1
        assert ((y - expected).abs() <= order(vector, weight) + fixed(vector, weight)).all()


@pytest.mark.parametrize("group, slots", [(0, 1), (0, 5), (64, 5), (192, 1)])
def test_quantized_all_and_nothing_kept(group, slots):
    x, weight, inputs = make_quantized(90, 192, group, slots, limit=100.0)
    assert _compact_gemv_cuda(*x, *inputs).eq(0).all()
    x, weight, inputs = make_quantized(90, 192, group, slots, limit=-1.0)
    vector = normal(90, seed=1)
    y = _compact_gemv_cuda(*x, *inputs)
    assert ((y - vector @ weight.dense()).abs() <= order(vector, weight) + fixed(vector, weight)).all()


@pytest.mark.parametrize(
    "group, slots, bad", [(0, 1, torch.nan), (0, 5, torch.inf), (64, 1, torch.inf), (64, 5, torch.nan)]
)
def test_dropped_quantized_rows_are_not_read_and_nan_travels(group, slots, bad):
    (index, value, count), _, (rows, *rest) = make_quantized(90, 64, group, slots)
    expected = _compact_gemv_cuda(index, value, count, rows, *rest)
    poisoned = poison(rows, dropped_rows(index, count, 90))
    assert torch.equal(_compact_gemv_cuda(index, value, count, poisoned, *rest), expected)
    value[0, 0] = bad
    assert not _compact_gemv_cuda(index, value, count, rows, *rest).isfinite().any()


def test_same_bits_every_time():
    inputs = make(300, 100, torch.bfloat16, 10)
    first = _compact_gemv_cuda(*inputs)
    assert all(torch.equal(_compact_gemv_cuda(*inputs), first) for _ in range(REPEATS))


@pytest.mark.parametrize("group", [0, 64])
def test_same_bits_every_time_quantized(group):
    x, _, inputs = make_quantized(90, 64, group, 5, torch.bfloat16)
    first = _compact_gemv_cuda(*x, *inputs)
    assert all(torch.equal(_compact_gemv_cuda(*x, *inputs), first) for _ in range(REPEATS))


@pytest.mark.parametrize("group, slots", [(None, 10), (None, 1), (0, 10), (64, 1)])
def test_fake_agrees(group, slots):
    if group is None:
        inputs = make(90, 70, torch.bfloat16, slots)
    else:
        x, _, inputs = make_quantized(90, 64, group, slots, torch.bfloat16)
        inputs = *x, *inputs
    real = _compact_gemv_cuda(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.compact_gemv(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_rejects_bad_input():
    index, value, count, weight, *rest = make(64, 32, torch.float32, 1)
    with pytest.raises(ValueError, match="takes index and value"):
        compact_gemv(index, value[:, :-1], count, weight, *rest)
    with pytest.raises(ValueError, match="takes rows"):
        compact_gemv(index, value.bfloat16(), count, weight, *rest)
    with pytest.raises(ValueError, match="takes index and value"):
        compact_gemv(index, value, count, torch.cat((weight, weight)), *rest)
    with pytest.raises(ValueError, match="contiguous"):
        compact_gemv(index, value, count, weight.t().contiguous().t(), *rest)
    with pytest.raises(ValueError, match="counts of programs"):
        compact_gemv(index, value, count, weight, None, 0, arrivals(32, DEVICE)[:0])
    with pytest.raises(ValueError, match="int32"):
        compact_gemv(index.long(), value, count, weight, *rest)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w, s: (w, None, 0), "no scale"),
        (lambda w, s: (w, s[:-1], 0), "takes rows"),
        (lambda w, s: (w, s.double(), 0), "takes rows"),
        (lambda w, s: (w.float(), s, 0), "takes rows"),
        (lambda w, s: (w[:, :40].contiguous(), s[:40], 0), "whole sixteens"),
        (lambda w, s: (w, s.repeat_interleave(2)[::2], 0), "contiguous"),
        (lambda w, s: (w.view(torch.uint8), s, 64), "takes rows"),  # wider than rows of four bits are
        (lambda w, s: (w.view(torch.uint8)[:, :96].contiguous(), s, 0), "groups of 0"),
        (lambda w, s: (w.view(torch.uint8)[:, :96].contiguous(), s, 32), "groups of 32"),
    ],
)
def test_rejects_bad_quantized_input(change, said):
    x, (rows, scale, *_), _ = make_quantized(64, 128, 0, 1)
    with pytest.raises(ValueError, match=said):
        compact_gemv(*x, *change(rows, scale), arrivals(128, DEVICE))
