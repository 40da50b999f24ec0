import pytest
import torch

from kernels.backend import triton
from kernels.compact_gemv import _compact_gemv_cuda, compact_gemv, compact_gemv_reference
from tests.kernels.compacted import DEVICE, compact, normal

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")


def make(K: int, N: int, dtype: torch.dtype, slots: int, limit: float = 0.67):
    weight = normal(K, N, dtype=dtype)
    return *compact(normal(K, dtype=dtype, seed=1), torch.full((K,), limit, device=DEVICE), slots), weight


# a list; slots that fill splits evenly, that do not, fewer slots than splits; ragged columns, one column
@pytest.mark.parametrize(
    "K, N, slots", [(256, 128, 1), (300, 200, 1), (512, 64, 16), (600, 70, 20), (192, 65, 3), (35, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_reference(dtype, K, N, slots):
    inputs = make(K, N, dtype, slots)
    y = _compact_gemv_cuda(*inputs).sum(0)
    expected = compact_gemv_reference(*inputs)
    assert expected.abs().max() > 1
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)  # products and sums are fp32 whatever the weights are


@pytest.mark.parametrize("slots", [1, 10])
def test_all_and_nothing_kept(slots):
    assert _compact_gemv_cuda(*make(300, 70, torch.float32, slots, limit=100.0)).eq(0).all()
    inputs = make(300, 70, torch.float32, slots, limit=-1.0)
    dense = normal(300, seed=1) @ inputs[3]
    torch.testing.assert_close(_compact_gemv_cuda(*inputs).sum(0), dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 10])
def test_dropped_rows_are_not_read_and_nan_travels(slots):
    index, value, count, weight = make(300, 70, torch.float32, slots)
    dropped = torch.ones(300, dtype=torch.bool, device=DEVICE)
    for k, n in zip(index, count.tolist(), strict=True):
        dropped[k[:n].long()] = False
    weight[dropped] = torch.nan
    assert _compact_gemv_cuda(index, value, count, weight).isfinite().all()
    value[0, 0] = torch.nan
    assert _compact_gemv_cuda(index, value, count, weight).sum(0).isnan().all()


def test_same_bits_every_time():
    inputs = make(600, 200, torch.bfloat16, 20)
    first = _compact_gemv_cuda(*inputs)
    assert all(torch.equal(_compact_gemv_cuda(*inputs), first) for _ in range(3))


def test_fake_agrees():
    inputs = make(300, 70, torch.bfloat16, 10)
    real = _compact_gemv_cuda(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.compact_gemv(*map(mode.from_tensor, inputs))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_rejects_bad_input():
    index, value, count, weight = make(64, 32, torch.float32, 1)
    with pytest.raises(ValueError, match="takes index and value"):
        compact_gemv(index, value[:, :-1], count, weight)
    with pytest.raises(ValueError, match="one dtype"):
        compact_gemv(index, value.bfloat16(), count, weight)
    with pytest.raises(ValueError, match="takes index and value"):
        compact_gemv(index, value, count, torch.cat((weight, weight)))
    with pytest.raises(ValueError, match="contiguous"):
        compact_gemv(index, value, count, weight.t().contiguous().t())
    with pytest.raises(ValueError, match="int32"):
        compact_gemv(index.long(), value, count, weight)
