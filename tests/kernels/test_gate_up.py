import pytest
import torch

from kernels.backend import triton
from kernels.gate_up import _gate_up_cuda, gate_up, gate_up_reference
from tests.kernels.compacted import DEVICE, compact, expand, normal

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
# h is rounded once and reaches 8 here; the order of summation moves it by one last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 0.063}


def make(K: int, F: int, dtype: torch.dtype, limit: float = 0.3, kept: float = 0.67):
    x = compact(normal(K, dtype=dtype, seed=1), torch.full((K,), kept, device=DEVICE))
    return *x, (normal(K, 2 * F) / K**0.5).to(dtype), torch.full((F,), limit, device=DEVICE)


# exact slots; ragged both ways; one column
@pytest.mark.parametrize("K, F", [(256, 128), (300, 200), (65, 1)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_reference(dtype, K, F):
    inputs = make(K, F, dtype)
    found, wanted = (expand(*function(*inputs), F) for function in (_gate_up_cuda, gate_up_reference))
    near = (found != 0) != (wanted != 0)  # on the threshold, rounding decides
    assert (torch.where(near, 0, found) - torch.where(near, 0, wanted)).abs().max() <= TOLERANCE[dtype]
    assert ((found + wanted)[near].abs() - 0.3).abs().le(TOLERANCE[dtype]).all()
    assert F == 1 or 0.1 < (wanted != 0).float().mean() < 0.9


def test_all_and_nothing_kept():
    assert _gate_up_cuda(*make(300, 200, torch.float32, limit=-1.0))[2].tolist() == [64, 64, 64, 8]
    assert _gate_up_cuda(*make(300, 200, torch.float32, limit=100.0))[2].tolist() == [0, 0, 0, 0]
    h = expand(*_gate_up_cuda(*make(300, 200, torch.float32, limit=-1.0, kept=100.0)), 200)
    assert h.eq(0).all()  # an empty list


def test_nan_travels_and_dropped_rows_are_not_read():
    index, value, count, weight, threshold = make(300, 200, torch.float32)
    dropped = torch.ones(300, dtype=torch.bool, device=DEVICE)
    dropped[index[0, : int(count)].long()] = False
    weight[dropped] = torch.nan
    assert expand(*_gate_up_cuda(index, value, count, weight, threshold), 200).isfinite().all()
    value[0, 0] = torch.nan
    assert _gate_up_cuda(index, value, count, weight, threshold)[2].sum() == 200


def test_fake_agrees():
    inputs = make(300, 200, torch.bfloat16)
    real = _gate_up_cuda(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.gate_up(*map(mode.from_tensor, inputs))
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


def test_rejects_bad_input():
    index, value, count, weight, threshold = make(64, 32, torch.float32)
    with pytest.raises(ValueError, match="takes index, value"):
        gate_up(index, value, count, weight, threshold[:-1])
    with pytest.raises(ValueError, match="one dtype"):
        gate_up(index, value.bfloat16(), count, weight, threshold)
