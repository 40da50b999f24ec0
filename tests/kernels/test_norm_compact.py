import pytest
import torch

from teal_fast.kernels.backend import triton
from teal_fast.kernels.compact_vector import CompactVector
from teal_fast.kernels.norm_compact import _norm_compact_cuda, norm_compact, norm_compact_reference
from teal_fast.tests.kernels.compacted import DEVICE, expand, normal

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
# Values up to 4, rounded once; in half precision the order of summation moves a few of them by one last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 0.032}


def make(K: int, dtype: torch.dtype, limit: float = 0.5):
    weight = normal(K, seed=2).abs().to(dtype)
    return normal(K), normal(K, seed=1) / 4, weight, torch.full((K,), limit, device=DEVICE), 1e-5


# one slice, exact slices, ragged, more than one power of two
@pytest.mark.parametrize("K, add", [(64, False), (256, True), (300, True), (576, True)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_reference(dtype, K, add):
    residual, update, *rest = make(K, dtype)
    inputs = (residual, update if add else None, *rest)
    residual, *kept = _norm_compact_cuda(*inputs)
    expected, expected_kept = norm_compact_reference(*inputs)
    torch.testing.assert_close(residual, expected, rtol=0, atol=1e-5)
    found, expected_x = expand(CompactVector(*kept), K), expand(expected_kept, K)
    assert 0.2 < (expected_x != 0).float().mean() < 0.8
    near = (found != 0) != (expected_x != 0)  # on the threshold, rounding decides
    assert (torch.where(near, 0, found) - torch.where(near, 0, expected_x)).abs().max() <= TOLERANCE[dtype]
    assert ((found + expected_x)[near].abs() - 0.5).abs().le(TOLERANCE[dtype]).all()


@pytest.mark.parametrize("limit, kept", [(-1.0, 300), (100.0, 0)])
def test_all_and_nothing_kept(limit, kept):
    inputs = make(300, torch.float32, limit)
    _, index, value, count = _norm_compact_cuda(*inputs)
    assert count.tolist() == [kept]
    assert index[0, :kept].tolist() == list(range(kept)) and value[0, :kept].isfinite().all()


def test_value_on_the_threshold_is_dropped():
    residual = torch.ones(4, device=DEVICE)
    threshold = torch.tensor([1.0, 0.5, 1.0, 0.5], device=DEVICE)
    _, index, _, count = _norm_compact_cuda(residual, None, torch.ones_like(residual), threshold, 0.0)
    assert index[0, : int(count)].tolist() == [1, 3]


def test_nan_is_kept():
    inputs = make(300, torch.float32, 100.0)
    inputs[0][7] = torch.nan
    assert _norm_compact_cuda(*inputs)[3].tolist() == [300]  # the norm spreads it to every channel


def test_fake_agrees():
    inputs = make(300, torch.bfloat16)
    real = _norm_compact_cuda(*inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.norm_compact(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in inputs))
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


def test_rejects_bad_input():
    residual, update, weight, threshold, eps = make(64, torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"norm_compact takes contiguous residual \[K\] fp32, .* update \[63\] float32"
    ):
        norm_compact(residual, update[:-1], weight, threshold, eps)
    with pytest.raises(ValueError, match=r"update .* strided"):
        norm_compact(residual, update.repeat_interleave(2)[::2], weight, threshold, eps)
    with pytest.raises(ValueError, match=r"got residual \[64\] bfloat16"):
        norm_compact(residual.bfloat16(), update, weight, threshold, eps)
