import pytest
import torch
import torch.nn.functional as F

from teal_fast.integrations.threshold_linear import count_channels, threshold_linear, threshold_linear_reference
from teal_fast.tests.kernels.compacted import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums of 70 terms of size 1: fp32 by the order of summation, the others by their last bit as well.
TOLERANCE = {torch.float32: (0, 2e-5), torch.bfloat16: (2**-7, 1e-2), torch.float16: (2**-10, 2e-3)}


def make(tokens: int, dtype: torch.dtype, K: int = 70, N: int = 33):
    """x [tokens, K], weight [N, K] whose transpose is contiguous, bias [N], threshold [K] of about half of |x|."""
    torch.manual_seed(tokens)
    x, weight, bias = torch.randn(tokens, K), torch.randn(K, N).t(), torch.randn(N)
    threshold = 0.67 * torch.rand(K).add(0.5)
    x, weight, bias = (tensor.to(DEVICE, dtype) for tensor in (x, weight, bias))
    return x, weight, bias, threshold.to(DEVICE)


def check(found, expected):
    relative, absolute = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_m", [1, 3, None])
@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_matches_the_reference(tokens, max_m, dtype, biased):
    x, weight, bias, threshold = make(tokens, dtype)
    bias = bias if biased else None
    expected = threshold_linear_reference(x, weight, bias, threshold, max_m)
    check(threshold_linear(x, weight, bias, threshold, max_m), expected)
    dense = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)
    assert torch.allclose(expected, dense, atol=0.1) == (max_m is not None and tokens > max_m)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("max_m", [2, None])
def test_thresholds_below_every_input_are_dense(tokens, max_m):
    x, weight, bias, threshold = make(tokens, torch.float32)
    x[:, ::2] = 0
    found = threshold_linear(x, weight, bias, threshold.fill_(-1), max_m)
    check(found, F.linear(x, weight, bias))


@pytest.mark.parametrize("tokens", [1, 2])
def test_inputs_at_the_threshold_are_skipped_and_nan_is_kept(tokens):
    x, weight, _, threshold = make(tokens, torch.float32)
    x[:, 1:] = threshold[1:]  # not one above
    check(threshold_linear(x, weight, None, threshold.fill_(9), 2), torch.zeros(tokens, 33, device=DEVICE))
    x[:, 0] = torch.nan
    assert threshold_linear(x, weight, None, threshold, 2).isnan().all()


def test_each_token_has_its_own_mask():
    x, weight, bias, threshold = make(3, torch.float32)
    together = threshold_linear(x, weight, bias, threshold, 3)
    alone = [threshold_linear(row, weight, bias, threshold, 3) for row in x]
    check(together, torch.stack(alone))


def test_leading_sizes_stay():
    x, weight, bias, threshold = make(6, torch.float32)
    assert threshold_linear(x.view(2, 3, -1), weight, bias, threshold, 6).shape == (2, 3, 33)
    part = torch.cat((x, x), 1)[:1, :70]  # of a fused output, as attention gets it
    check(threshold_linear(part, weight, bias, threshold, 1), threshold_linear(x[:1], weight, bias, threshold, 1))


def test_counts_tokens_and_dropped_channels():
    x, _, _, threshold = make(4, torch.bfloat16)
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    dropped = (x.float().abs() <= threshold).sum(1)
    for part in (x[:1], x[1:3], x):  # one token, two, and four, which are dense
        count_channels(part, threshold, 2, counts)
    assert counts.tolist() == [3, int(dropped[:3].sum()), 4]
    count_channels(x, threshold, None, counts)
    assert counts.tolist() == [7, int(dropped[:3].sum() + dropped.sum()), 4]


def test_a_row_part_of_the_weight_takes_its_part_of_the_threshold():
    """Two ranks with halves of the inputs add up to one with all of them."""
    x, weight, _, threshold = make(1, torch.float32)
    parts = [
        threshold_linear(x[:, part], weight.t()[part].contiguous().t(), None, threshold[part], 1)
        for part in (slice(35), slice(35, 70))
    ]
    check(sum(parts), threshold_linear(x, weight, None, threshold, 1))


def test_another_layout_is_refused():
    x, weight, _, threshold = make(1, torch.float32)
    with pytest.raises(ValueError, match="strided"):
        threshold_linear(x, weight.contiguous(), None, threshold, 1)


@pytest.mark.parametrize("tokens, max_m", [(1, 1), (3, 2), (2, None)])
def test_opcheck(tokens, max_m):
    x, weight, bias, threshold = make(tokens, torch.float32)
    torch.library.opcheck(torch.ops.teal.threshold_linear, (x, weight, bias, threshold, max_m))
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(torch.ops.teal.count_channels, (x, threshold, max_m, counts))


def test_a_compiled_graph_decides_by_the_number_of_tokens_when_it_runs():
    x, weight, _, threshold = make(5, torch.float32)
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def layer(x):
        count_channels(x, threshold, 2, counts)
        return threshold_linear(x, weight, None, threshold, 2)

    for tokens in (5, 4, 2):
        check(layer(x[:tokens]), threshold_linear_reference(x[:tokens], weight, None, threshold, 2))
    assert counts[[0, 2]].tolist() == [2, 9]
