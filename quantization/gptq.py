"""TODO."""

import torch
from torch import Tensor

from teal_fast.weights.grids import TINY, Grid

SLAB = 64  # rows between two updates of all the rows behind them
DAMPING = 0.01  # added to the Hessian's diagonal, as a share of its mean
RIDGE = 0.01  # the same, where weights are moved


def make_up(weight: Tensor, hessian: Tensor, missing: Tensor) -> Tensor:
    """weight [K, N] moved to give what its outputs lack: fp32, least squares held back by a ridge.

    hessian [K, K] holds the second moments of inputs x, missing [K, N] the sums of x_k times what output n lacks.
    """
    hessian = hessian.clone()
    hessian.diagonal().add_(RIDGE * hessian.diagonal().mean() + TINY)
    return weight.float() + torch.cholesky_solve(missing, torch.linalg.cholesky(hessian))


def feed_back(weight: Tensor, grid: Grid, hessian: Tensor) -> tuple[Tensor, ...]:
    """Codes of weight [K, N] that keep the layer's output on the inputs whose second moments are hessian [K, K].

    Input channels are rounded one by one, the strongest first, and what a row's rounding does to the outputs is taken
    back by the rows still to come, as far as their inputs go along with its own. Source: GPTQ, arXiv:2210.17323, here
    with rows of outputs in place of columns, so that scales lie along the outputs.
    """
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight.float()[order], hessian[order][:, order]
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean() + TINY)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes = []
    for start in range(0, len(weight), SLAB):
        slab, end = weight[start : start + SLAB], min(start + SLAB, len(weight))
        errors = torch.empty_like(slab)
        for k in range(len(slab)):
            row = slab[k : k + 1]
            codes.append(grid.round(row))
            errors[k] = (row - grid.restore(*codes[-1]))[0] / factor[start + k, start + k]
            slab[k + 1 :] -= factor[start + k, start + k + 1 : end, None] * errors[k]
        weight[end:] -= factor[start:end, end:].t() @ errors
    back = order.argsort()
    return tuple(torch.cat(part)[back] for part in zip(*codes, strict=True))
