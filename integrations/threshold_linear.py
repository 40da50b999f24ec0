"""teal::threshold_linear: a linear layer of another engine that skips input channels when a step has few tokens.

x [..., K] in fp32, bf16 or fp16, each row a token; weight [N, K] in x's dtype, laid out so that its transpose is
contiguous: an input channel is one run of memory; bias [N] or none; threshold [K] fp32, in units of |x|; y [..., N] in
x's dtype. Up to `max_m` tokens are sparse, more are dense: the number is looked at when the op runs, since a Python
`if` on it would be burnt into an engine's compiled graph. One sparse token reads only its kept rows
(teal::sparse_gemv), several are masked one by one and multiplied densely. With `max_m` none every token is masked and
the product dense.

teal::count_channels says what that skips: an op of its own, since it costs small kernels and is not always wanted.
"""

from torch import Tensor

from teal_fast.files.exported import is_sparse
from teal_fast.kernels.backend import register
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.sparse_gemv import sparse_gemv
from teal_fast.weights.product import product


def threshold_linear_reference(x, weight, bias, threshold, max_m) -> Tensor:
    """The same in fp32 by plain PyTorch, without counts."""
    sparse = is_sparse(x.shape[:-1].numel(), max_m)
    kept = x.masked_fill(x.float().abs() <= threshold, 0) if sparse else x
    y = kept.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _threshold_linear(x, weight, bias, threshold, max_m) -> Tensor:
    tokens = x.shape[:-1].numel()
    if not is_sparse(tokens, max_m):
        return product(x, weight.t(), bias)
    if tokens == 1 and max_m is not None:
        return sparse_gemv(x.flatten(), PackedWeight(weight.t()), threshold, bias).view(*x.shape[:-1], -1)
    return product(x.masked_fill(x.abs() <= threshold, 0), weight.t(), bias)


def _count_channels(x, threshold, max_m, counts) -> None:
    tokens = x.shape[:-1].numel()
    if is_sparse(tokens, max_m):
        counts[0] += tokens
        counts[1] += (x.abs() <= threshold).sum()
    else:
        counts[2] += tokens


threshold_linear = register(
    "threshold_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor threshold, int? max_m) -> Tensor",
    cuda=_threshold_linear,
    cpu=_threshold_linear,
    fake=lambda x, weight, bias, threshold, max_m: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
# counts int64 [3]: to it are added the tokens computed sparsely, the channels that they dropped, the tokens computed
# densely.
count_channels = register(
    "count_channels",
    "(Tensor x, Tensor threshold, int? max_m, Tensor(a!) counts) -> ()",
    cuda=_count_channels,
    cpu=_count_channels,
    fake=lambda x, threshold, max_m, counts: None,
)
