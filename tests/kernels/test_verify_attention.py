"""Attention of a few tokens: both halves against the reference, and that a token's bits are its own."""

import pytest
import torch

from teal_fast.kernels.backend import triton
from teal_fast.kernels.merge_spans import attention_reference, merge_spans
from teal_fast.kernels.verify_attention import verify_attention
from teal_fast.tests.kernels.compacted import DEVICE, normal

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of averages of values of size 1
T, EPS = 8, 1e-5


def make(heads, kv_heads, D, start, dtype, normed=False, length=320):
    positions = torch.arange(start, start + T, device=DEVICE)
    angles = positions[:, None] / 10000 ** (torch.arange(0, D, 2, device=DEVICE) / D)
    caches = [normal(kv_heads, length, D, dtype=dtype, seed=seed) for seed in (1, 2)]
    for cache in caches:
        cache[:, start:] = torch.nan  # the future is not read, and the tokens' own rows are written
    norms = [normal(D, dtype=dtype, seed=seed) if normed else None for seed in (3, 4)]
    qkv = normal(T, (heads + 2 * kv_heads) * D, dtype=dtype)
    return qkv, torch.stack((angles.cos(), angles.sin())), positions, *caches, *norms


def attend(inputs, heads, window):
    inputs = [x if x is None else x.clone() for x in inputs]
    y = merge_spans(*verify_attention(*inputs, heads, window, EPS), inputs[2], window, inputs[0].dtype)
    return y, inputs[3], inputs[4]


# grouped heads over two spans; 3 to a group; a window, spans before it; the first tokens; norms; one key/value head
@pytest.mark.parametrize(
    "heads, kv_heads, D, start, window, dtype, normed",
    [
        (4, 2, 64, 124, 0, torch.float32, False),
        (6, 2, 32, 77, 0, torch.float16, False),
        (2, 2, 32, 300, 50, torch.bfloat16, False),
        (4, 2, 32, 0, 3, torch.bfloat16, False),
        (4, 2, 64, 20, 0, torch.float32, True),
        (8, 1, 128, 130, 0, torch.bfloat16, False),
    ],
)
def test_matches_reference(heads, kv_heads, D, start, window, dtype, normed):
    inputs = make(heads, kv_heads, D, start, dtype, normed)
    found = attend(inputs, heads, window)
    expected = attention_reference(*inputs, heads, window, EPS)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found[0].float(), expected, rtol=TOLERANCE[dtype] / 2, atol=TOLERANCE[dtype])
    for mine, theirs in zip(found[1:], inputs[3:5], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=4 * TOLERANCE[dtype], equal_nan=True)


@pytest.mark.gpu  # the interpreter's products are NumPy's
def test_a_token_has_the_same_bits_in_any_row_and_beside_any_others():
    qkv, turn, positions, *rest = make(4, 2, 32, 124, torch.float32)
    whole = attend((qkv, turn, positions, *rest), 4, 30)
    order = torch.tensor([5, 0, 3, 3, 3, 7, 1, 2], device=DEVICE)  # what is left out lies behind, or is there already
    part = attend((qkv[order], turn[:, order].contiguous(), positions[order], *whole[1:], None, None), 4, 30)
    assert torch.equal(part[0], whole[0][order])
    alone = [x[:1].expand(T, -1).contiguous() for x in (qkv, turn[0], turn[1])]
    one = attend((alone[0], torch.stack(alone[1:]), positions[:1].expand(T).contiguous(), *rest), 4, 30)
    assert torch.equal(one[0], whole[0][:1].expand(T, -1))


def test_fakes_agree():
    inputs = make(4, 2, 32, 20, torch.bfloat16)
    sums = verify_attention(*inputs, 4, 0, EPS)
    y = merge_spans(*sums, inputs[2], 0, torch.bfloat16)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.teal.verify_attention(*map(mode.from_tensor, inputs[:5]), None, None, 4, 0, EPS)
        fake_y = torch.ops.teal.merge_spans(*fake, mode.from_tensor(inputs[2]), 0, torch.bfloat16)
    assert [(f.shape, f.dtype) for f in (*fake, fake_y)] == [(r.shape, r.dtype) for r in (*sums, y)]


def test_rejects_bad_input():
    qkv, turn, positions, k, v, *norms = make(4, 2, 32, 20, torch.float32)
    with pytest.raises(ValueError, match=r"verify_attention takes contiguous .* got .* qkv \[8, 255\] float32"):
        verify_attention(qkv[:, :-1].contiguous(), turn, positions, k, v, *norms, 4, 0, EPS)
    few = (qkv[:3], turn[:, :3].contiguous(), positions[:3])
    with pytest.raises(ValueError, match=r"8 or 16 tokens, got 32, 4 / 2 and 3"):
        verify_attention(*few, k, v, *norms, 4, 0, EPS)
    with pytest.raises(ValueError, match=r"merge_spans takes contiguous .* positions \[7\] int64"):
        merge_spans(torch.zeros(3, 8, 4, 32), torch.zeros(3, 8, 4), torch.zeros(3, 8, 4), positions[:7], 0, qkv.dtype)
