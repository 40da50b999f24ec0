import pytest
import torch
from torch.utils import _pytree as pytree

from teal_fast.kernels.backend import triton
from teal_fast.kernels.compact_gemv import _compact_gemv_cuda, compact_gemv, compact_gemv_reference
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.semaphore import new_semaphores
from teal_fast.tests.kernels.compacted import DEVICE, REPEATS, compact, dropped_rows, expand, normal
from teal_fast.tests.kernels.quantized import fixed, order, poison, quantized

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")


def make_vector(K: int, dtype: torch.dtype, slots: int, limit: float = 0.67):
    return compact(normal(K, dtype=dtype, seed=1), torch.full((K,), limit, device=DEVICE), slots)


def make(K: int, N: int, dtype: torch.dtype, slots: int, limit: float = 0.67):
    weight = PackedWeight(normal(K, N, dtype=dtype))
    return make_vector(K, dtype, slots, limit), weight, new_semaphores(N, DEVICE)


def check_quantized(x, weight) -> None:
    """The product is the reference's, and that of the floats which the weight stands for."""
    inputs = x, weight.weight, new_semaphores(len(weight.scale), DEVICE)
    y, vector = _compact_gemv_cuda(*inputs), expand(x, len(weight.packed))
    assert y.dtype == torch.float32
    for expected in (compact_gemv_reference(*inputs), vector @ weight.dense()):
        assert ((y - expected).abs() <= order(vector, weight) + fixed(vector, weight)).all()


# a list; slots that fill splits evenly, that do not, fewer slots than splits; ragged columns, one column; each dtype
@pytest.mark.parametrize(
    "K, N, slots, dtype",
    [
        (150, 70, 1, torch.bfloat16),
        (64, 64, 16, torch.bfloat16),
        (120, 70, 20, torch.float32),
        (96, 65, 3, torch.bfloat16),
        (35, 1, 1, torch.float32),
    ],
)
def test_matches_reference(dtype, K, N, slots):
    inputs = make(K, N, dtype, slots)
    expected = compact_gemv_reference(*inputs)
    assert expected.abs().max() > 1
    # products and sums are fp32 whatever the weights are
    torch.testing.assert_close(_compact_gemv_cuda(*inputs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 10])
def test_all_and_nothing_kept(slots):
    assert _compact_gemv_cuda(*make(90, 40, torch.float32, slots, limit=100.0)).eq(0).all()
    inputs = make(90, 40, torch.float32, slots, limit=-1.0)
    dense = normal(90, seed=1) @ inputs[1].packed
    torch.testing.assert_close(_compact_gemv_cuda(*inputs), dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 10])
def test_dropped_rows_are_not_read_and_nan_travels(slots):
    x, weight, semaphores = make(90, 40, torch.float32, slots)
    weight.packed[dropped_rows(x, 90)] = torch.nan
    assert _compact_gemv_cuda(x, weight, semaphores).isfinite().all()
    x.value[0, 0] = torch.nan
    assert _compact_gemv_cuda(x, weight, semaphores).isnan().all()


# a list and slots; ragged columns, fewer slots than splits; groups of each size
@pytest.mark.parametrize(
    "K, N, group, slots",
    [(100, 208, 0, 1), (90, 80, 0, 20), (100, 64, 64, 20), (90, 384, 128, 3), (35, 192, 192, 1)],
)
def test_quantized_matches_reference(K, N, group, slots):
    check_quantized(make_vector(K, torch.bfloat16, slots), quantized(K, N, group))


@pytest.mark.parametrize("group, slots", [(0, 5), (64, 1)])
def test_quantized_all_and_nothing_kept(group, slots):
    weight = quantized(50, 64, group)
    nothing = make_vector(50, torch.float32, slots, limit=100.0)
    assert _compact_gemv_cuda(nothing, weight.weight, new_semaphores(64, DEVICE)).eq(0).all()
    check_quantized(make_vector(50, torch.float32, slots, limit=-1.0), weight)


@pytest.mark.parametrize("group, slots, bad", [(0, 1, torch.nan), (0, 5, torch.inf), (64, 1, torch.inf)])
def test_dropped_quantized_rows_are_not_read_and_nan_travels(group, slots, bad):
    x, weight, semaphores = make_vector(50, torch.float32, slots), quantized(50, 64, group), new_semaphores(64, DEVICE)
    expected = _compact_gemv_cuda(x, weight.weight, semaphores)
    poisoned = weight._replace(packed=poison(weight.packed, dropped_rows(x, 50))).weight
    assert torch.equal(_compact_gemv_cuda(x, poisoned, semaphores), expected)
    x.value[0, 0] = bad
    assert not _compact_gemv_cuda(x, weight.weight, semaphores).isfinite().any()


@pytest.mark.parametrize("group", [None, 0, 64])
def test_same_bits_every_time(group):
    x, weight, semaphores = make(90, 64, torch.bfloat16, 5)
    weight = weight if group is None else quantized(90, 64, group).weight
    first = _compact_gemv_cuda(x, weight, semaphores)
    assert semaphores.eq(0).all()
    assert all(torch.equal(_compact_gemv_cuda(x, weight, semaphores), first) for _ in range(REPEATS))


@pytest.mark.parametrize("group, slots", [(None, 10), (64, 1)])
def test_fake_and_op_agree(group, slots):
    x, weight, semaphores = make(50, 64, torch.bfloat16, slots)
    inputs = *x, *(weight if group is None else quantized(50, 64, group).weight), semaphores
    real = torch.ops.teal.compact_gemv(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.compact_gemv(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, w, s: (x._replace(value=x.value[:, :-1]), w, s), r"compact_gemv takes contiguous index \[S, W\]"),
        (lambda x, w, s: (x._replace(value=x.value.bfloat16()), w, s), "takes a weight"),
        (
            lambda x, w, s: (x, PackedWeight(torch.cat((w.packed, w.packed))), s),
            r"slots for 128 channels, got \[1, 64\]",
        ),
        (lambda x, w, s: (x, PackedWeight(w.packed.t().contiguous().t()), s), "packed .* strided"),
        (lambda x, w, s: (x, w, s[:0]), r"semaphores \[1\] int32 or more of them, got \[0\]"),
        (lambda x, w, s: (x._replace(index=x.index.long()), w, s), r"index \[1, 64\] int64"),
        (lambda x, w, s: (x._replace(count=x.count.repeat(2)), w, s), r"count \[2\] int32"),
    ],
)
def test_rejects_bad_input(change, said):
    with pytest.raises(ValueError, match=said):
        compact_gemv(*change(*make(64, 32, torch.float32, 1)))


def test_rejects_quantized_rows_without_scales():
    weight = quantized(64, 128, 0).weight._replace(scale=None)
    with pytest.raises(ValueError, match="no scale"):  # the rest of it is in test_sparse_gemv.py
        compact_gemv(make_vector(64, torch.float32, 1), weight, new_semaphores(128, DEVICE))
