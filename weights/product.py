"""Products of several tokens with a weight [K, N], as PyTorch computes them: for prompts and for passes over texts.

On CUDA they are in x's dtype, on the CPU in bf16 where the processor is fast at it, else in fp32. A weight
that is stored in another form is converted some columns at a time: a copy of a whole layer costs as much as the product
of a prompt, because the system hands out its memory anew each time.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# 16 MB of fp32: 1536 x 17920 with 12 tokens takes 51 ms, whole 205, by 4 MB 60 (8960 x 1536: 24, 90, 27); with 500
# tokens it takes 532, whole 637, by 4 MB 1008. AMD EPYC (Zen 5), 2 threads, a machine with other work.
VALUES_AT_ONCE = 2**22
COLUMNS = 64  # pieces are whole multiples of it, as groups of int4 are

Columns = Callable[[int, int, torch.dtype], Tensor]  # begin, end, dtype -> these columns [K, end - begin] of a weight


def has_bf16_products() -> bool:
    """Whether the processor multiplies bf16, adding in fp32, faster than it multiplies fp32.

    Intel's do by AMX alone: where a hypervisor hides it, a Xeon computes 168 GFLOP/s in bf16 and 304 in fp32
    (500x1536x8960, oneDNN 3.12). Without any such instruction bf16 is 9x slower than fp32 (512x576x1536 on Zen 3). fp16
    is slower on Zen 5, too, with 1536x8960 by 2x at 4 tokens and 33x at 128.
    """
    found = getattr(torch.cpu, "get_capabilities", dict)()
    fast = found.get("amx_bf16") or not found.get("cpu_name", "").startswith("Intel")
    return bool(found.get("avx512_bf16") and fast and torch.backends.mkldnn.is_available())


BF16_PRODUCTS = has_bf16_products()  # once: torch.compile can't trace the question


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products with x are computed in."""
    fast = x.device.type != "cpu" or (x.dtype == torch.bfloat16 and BF16_PRODUCTS)
    return x.dtype if fast else torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [K, N], plus bias [N], all of one dtype."""
    if x.device.type != "cpu":
        return F.linear(x, weight.t(), bias)
    rows = x.reshape(-1, x.shape[-1])
    # Not F.linear: bf16 through a transposed view costs it 10 to 40 % more.
    y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return y.view(*x.shape[:-1], -1)


def product_by_columns(x: Tensor, columns: Columns, N: int, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times a weight [K, N] that `columns` gives piece by piece, plus bias [N], in x's dtype."""
    dtype = product_dtype(x)
    wide, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    step = N if x.is_cuda else max(VALUES_AT_ONCE // x.shape[-1] // COLUMNS, 1) * COLUMNS
    pieces = [
        product(wide, columns(begin, end, dtype), None if bias is None else bias[begin:end]).to(x.dtype)
        for begin, end in pairwise([*range(0, N, step), N])
    ]
    # Not written into one tensor, as weights/blocks.py does: each write costs autograd a copy of y's gradient.
    # int8, 1536 x 17920, 500 tokens in bf16: 122 MB at once instead of 88, and without gradients 33 instead of 34.
    return torch.cat(pieces, -1)
