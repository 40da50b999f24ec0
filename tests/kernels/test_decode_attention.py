import pytest
import torch

from teal_fast.kernels.backend import triton
from teal_fast.kernels.decode_attention import _decode_attention_cuda, decode_attention, decode_attention_reference
from teal_fast.kernels.merge_attention import _merge_attention_cuda, merge_attention, merge_attention_reference
from teal_fast.tests.kernels.compacted import DEVICE, REPEATS, expand, normal

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
# Outputs are averages of values of size 1; half precision rounds scores' inputs, weights and the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make(heads, kv_heads, D, position, dtype, length=320):
    qkv = normal((heads + 2 * kv_heads) * D)
    frequencies = 1 / 10000 ** (torch.arange(0, D, 2, device=DEVICE) / D)
    caches = [normal(kv_heads, length, D, dtype=dtype, seed=seed) for seed in (1, 2)]
    for cache in caches:
        cache[:, position:] = torch.nan  # the future is not read, and the position's own row is written
    return qkv, frequencies, *caches, torch.tensor([position], device=DEVICE), heads


def attend(function, merge, inputs, window, threshold, dtype):
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    y = merge(*function(*inputs, window), threshold, dtype)
    return expand(y, len(threshold)), inputs[2], inputs[3]


# grouped heads; 3 to a group; no groups, with a window; the first token; a short window; a long context
@pytest.mark.parametrize(
    "heads, kv_heads, D, position, window, dtype",
    [
        (8, 2, 64, 100, 0, torch.float32),
        (8, 2, 64, 60, 0, torch.bfloat16),
        (9, 3, 32, 77, 0, torch.float16),
        (4, 4, 32, 100, 50, torch.bfloat16),
        (4, 2, 32, 0, 0, torch.float32),
        (4, 2, 32, 3, 8, torch.float16),
        (4, 1, 128, 300, 0, torch.bfloat16),
    ],
)
def test_matches_reference(heads, kv_heads, D, position, window, dtype):
    inputs = make(heads, kv_heads, D, position, dtype)
    threshold = torch.full((heads * D,), -1.0, device=DEVICE)
    found = attend(_decode_attention_cuda, _merge_attention_cuda, inputs, window, threshold, dtype)
    expected = attend(decode_attention_reference, merge_attention_reference, inputs, window, threshold, dtype)
    assert expected[0].abs().max() > 0.1
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=TOLERANCE[dtype])
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE[dtype], equal_nan=True)


def test_thresholds_drop_channels():
    inputs = make(4, 2, 64, 100, torch.float32)
    threshold = normal(256, seed=3).abs() / 8
    found = attend(_decode_attention_cuda, _merge_attention_cuda, inputs, 0, threshold, torch.float32)[0]
    everything = attend(_decode_attention_cuda, _merge_attention_cuda, inputs, 0, threshold * 0 - 1, torch.float32)[0]
    torch.testing.assert_close(found, everything.masked_fill(everything.abs() <= threshold, 0), rtol=0, atol=0)
    assert 0.2 < (found == 0).float().mean() < 0.8


def test_same_bits_every_time():
    inputs = make(4, 2, 64, 100, torch.float32)
    threshold = torch.full((256,), -1.0, device=DEVICE)
    first, *others = (
        attend(_decode_attention_cuda, _merge_attention_cuda, inputs, 0, threshold, torch.float32)[0]
        for _ in range(1 + REPEATS)
    )
    assert all(torch.equal(other, first) for other in others)


def test_fakes_agree():
    inputs = make(4, 2, 64, 40, torch.bfloat16)
    threshold = torch.zeros(256, device=DEVICE)
    real = _decode_attention_cuda(*inputs, 0)
    merged = _merge_attention_cuda(*real, threshold, torch.bfloat16)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.decode_attention(*map(mode.from_tensor, inputs[:5]), 4, 0)
        fake_merged = torch.ops.teal.merge_attention(*fake, mode.from_tensor(threshold), torch.bfloat16)
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]
    assert [(f.shape, f.dtype) for f in fake_merged] == [(r.shape, r.dtype) for r in merged]


def test_rejects_bad_input():
    qkv, frequencies, k, v, position, heads = make(8, 2, 64, 100, torch.float32)
    with pytest.raises(ValueError, match=r"decode_attention takes contiguous .* got .* qkv \[767\] float32"):
        decode_attention(qkv[:-1], frequencies, k, v, position, heads, 0)
    k48, v48 = k[..., :48].contiguous(), v[..., :48].contiguous()
    with pytest.raises(ValueError, match=r"D of 32, 64 … .* got 48"):
        decode_attention(qkv[: 12 * 48], frequencies[:24], k48, v48, position, heads, 0)
    with pytest.raises(ValueError, match=r"v_cache \[2, 320, 64\] bfloat16"):
        decode_attention(qkv, frequencies, k, v.bfloat16(), position, heads, 0)
    with pytest.raises(ValueError, match=r"k_cache .* strided"):
        decode_attention(qkv[: 12 * 48], frequencies[:24], k[..., :48], v48, position, heads, 0)
    with pytest.raises(ValueError, match=r"input_pos \[1\] int32"):
        decode_attention(qkv, frequencies, k, v, position.int(), heads, 0)
    with pytest.raises(ValueError, match="powers of two"):
        merge_attention(torch.zeros(8, 3, 64), torch.zeros(8, 3), torch.zeros(8, 3), torch.zeros(512), torch.float32)
    acc, peak = torch.zeros(8, 4, 64), torch.zeros(8, 4)
    with pytest.raises(ValueError, match=r"merge_attention takes contiguous .* threshold \[511\] float32"):
        merge_attention(acc, peak, peak, torch.zeros(511), torch.float32)
