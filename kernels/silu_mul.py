"""teal::silu_mul: y [T, N] = SiLU(gate) ⊙ up of x [T, 2 N], each token's gate and then its up; in x's dtype."""

import torch.nn.functional as F
from torch import Tensor

from teal_fast.kernels.backend import gdc_launch_dependents, gdc_wait, jit, launch_options, register, tl, triton
from teal_fast.kernels.checks import takes

BLOCK = 1024  # values a program


def silu_mul_reference(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


@jit
def _silu_mul_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gdc_launch_dependents(PDL)  # whose first weights then come meanwhile
    gdc_wait(PDL)
    gate = tl.load(x_ptr + token * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def _silu_mul_cuda(x: Tensor) -> Tensor:
    y = _silu_mul_fake(x)
    T, N = y.shape
    _silu_mul_kernel[(T, triton.cdiv(N, BLOCK))](x, y, N, BLOCK, num_warps=4, **launch_options(x))
    return y


def _silu_mul_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


_check = takes("silu_mul", "x [T, W] dtype")
_silu_mul = register("silu_mul", "(Tensor x) -> Tensor", cuda=_silu_mul_cuda, fake=_silu_mul_fake)


def silu_mul(x: Tensor) -> Tensor:
    """y [T, N], as above. Raises ValueError on what does not fit."""
    _check(x)
    if x.shape[1] % 2:
        raise ValueError(f"silu_mul takes gate and up of one length, got {x.shape[1]} values")
    return _silu_mul(x)
