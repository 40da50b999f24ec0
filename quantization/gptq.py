"""Calibrated rounding of one weight: GPTQ, and before it a least-squares correction in the manner of GPTAQ.

Both see the layer's inputs only through their second moments, the Hessian of the squared output error: H = sum x xᵀ.
Which inputs go into H is decided in gptq_quantizer.py. One Cholesky factor of H serves both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from teal_fast.weights.grids import EPSILON, Grid

BLOCK_ROWS = 128  # rows whose common share of the errors before them is one product
PANEL = 1024  # columns of second moments that are computed at a time
LEAST_DAMPING = 1e-6  # of the mean second moment, for channels that are never there


class Factor(NamedTuple):
    """Second moments H [K, K], damped and factorized: H[order][:, order] = L Lᵀ.

    order: int64 [K], channels by ascending second moment; lower: L, fp32 [K, K].
    """

    order: Tensor
    lower: Tensor


def add_moments(hessian: Tensor, x: Tensor) -> None:
    """Adds the lower triangle of xᵀ x to `hessian` [K, K], whose upper triangle is left undefined. x: fp32 [T, K]."""
    for begin in range(0, len(hessian), PANEL):
        panel = slice(begin, begin + PANEL)
        hessian[begin:, panel].addmm_(x[:, begin:].t(), x[:, panel])


def factorize(hessian: Tensor, tokens: int) -> Factor:
    """Dampens and factorizes second moments over so many tokens. hessian: as `add_moments` leaves it; overwritten.

    Each channel's own moment is enlarged by the share K / tokens: moments of few tokens make channels look more alike
    than they are. Errors on other text, of a layer with 1,536 inputs after 2,048 tokens, are then half to two thirds
    of those with GPTQ's share of 0.01 of the mean; after 5,120 four fifths (docs/quality_log.md). Raises
    torch.linalg.LinAlgError when H is not positive definite.
    """
    K = len(hessian)
    for begin in range(0, K, PANEL):
        end = begin + PANEL
        corner = hessian[begin:end, begin:end]
        corner.copy_(corner.tril() + corner.tril(-1).t())
        hessian[begin:end, end:] = hessian[end:, begin:end].t()
    moments = hessian.diagonal()
    order = moments.argsort(stable=True)
    moments.mul_(1 + K / tokens).add_(LEAST_DAMPING * moments.mean() + EPSILON)
    lower = hessian[order[:, None], order]
    return Factor(order, torch.linalg.cholesky(lower, out=lower))


def compensate_inputs(weight: Tensor, factor: Factor, residual: Tensor) -> Tensor:
    """Moves a weight so that erroneous inputs give the outputs that the original inputs gave: ridge least squares.

    Returns W + H⁻¹ R, fp32 [K, N]: the minimizer D of tr(Dᵀ H D) - 2 tr(Dᵀ R) added to the weight, H being damped.
    weight: W [K, N]; factor: of H; residual: R = Xᵀ E, fp32 [K, N], for the inputs X [T, K] and what their outputs
    lack, E [T, N]. Source: GPTAQ's asymmetric calibration, arXiv:2504.02692, here done once before rounding.
    """
    moved = weight.float().clone()
    moved[factor.order] += torch.cholesky_solve(residual[factor.order], factor.lower)
    return moved


def gptq_round(weight: Tensor, grid: Grid, factor: Factor) -> tuple[Tensor, ...]:
    """Rounds a weight [K, N] to a grid with GPTQ and returns the grid's codes.

    Input channels are rounded one by one, in descending order of their second moment, each to where the output error
    that those before it have left is least. With H = L Lᵀ that error is |Lᵀ E|², whose row k is
    L[k, k] E[k] + sum_j L[j, k] E[j] over the channels j before k: nearest-plane rounding, which is GPTQ
    (arXiv:2210.17323; arXiv:2507.18553) without the inverse of H.
    """
    order, lower = factor
    weight = weight.float()[order]
    errors, codes = torch.empty_like(weight), []
    for end in range(len(weight), 0, -BLOCK_ROWS):
        begin = max(end - BLOCK_ROWS, 0)
        shares = lower[end:, begin:end].t() @ errors[end:]
        for k in range(end - 1, begin - 1, -1):
            share = shares[k - begin] + lower[k + 1 : end, k] @ errors[k + 1 : end]
            rows = order[k : k + 1]
            codes.append(grid.round((weight[k] + share / lower[k, k])[None], rows))
            errors[k] = weight[k] - grid.dequantize(*codes[-1], rows=rows)[0]
    back = order.flip(0).argsort()
    return tuple(torch.cat(part)[back] for part in zip(*codes, strict=True))
