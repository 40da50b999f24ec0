"""Calibrated rounding of one weight: GPTQ, and before it a least-squares correction in the manner of GPTAQ.

Both see the layer's inputs only through their second moments, the Hessian of the squared output error: H = sum x xᵀ.
Which inputs go into H is decided in gptq_quantizer.py.
"""

import torch
from torch import Tensor

from teal_fast.weights.grids import EPSILON, Grid

BLOCK_ROWS = 64  # GPTQ's lazy batch: rows whose errors reach the rows behind the block in one product
DAMPING = 0.01  # GPTQ adds this share of the Hessian's mean diagonal to its diagonal
RIDGE = 0.01  # the same for the least-squares correction


def compensate_inputs(weight: Tensor, hessian: Tensor, residual: Tensor) -> Tensor:
    """Moves a weight so that erroneous inputs give the outputs that the original inputs gave: ridge least squares.

    Returns W + (H + λI)⁻¹ R, fp32 [K, N]: the minimizer D of tr(Dᵀ H D) - 2 tr(Dᵀ R) + λ |D|² added to the weight.
    weight: W [K, N]; hessian: H, fp32 [K, K]; residual: R = Xᵀ E, fp32 [K, N], for the inputs X [T, K] and what their
    outputs lack, E [T, N]. λ is RIDGE times the mean of H's diagonal. Raises torch.linalg.LinAlgError when H is not
    positive definite. Source: GPTAQ's asymmetric calibration, arXiv:2504.02692, here done once before rounding.
    """
    hessian = hessian.clone()
    hessian.diagonal().add_(RIDGE * hessian.diagonal().mean() + EPSILON)
    return weight.float() + torch.cholesky_solve(residual, torch.linalg.cholesky(hessian))


def gptq_round(weight: Tensor, grid: Grid, hessian: Tensor) -> tuple[Tensor, ...]:
    """Rounds a weight to a grid with GPTQ and returns the grid's codes.

    Input channels are rounded one by one, in descending order of their second moment. The output error of each is
    compensated by the channels that are still to come, as far as their inputs correlate with its own. weight: [K, N];
    hessian: fp32 [K, K]. Raises torch.linalg.LinAlgError when the Hessian is not positive definite. Source: GPTQ,
    arXiv:2210.17323; the weight is transposed here, and scales lie along the outputs, so that each row has its own.
    """
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight.float()[order], hessian[order][:, order]
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean() + EPSILON)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes = []
    for start in range(0, len(weight), BLOCK_ROWS):
        block, end = weight[start : start + BLOCK_ROWS], min(start + BLOCK_ROWS, len(weight))
        errors = torch.empty_like(block)
        for k in range(len(block)):
            row = block[k : k + 1]
            codes.append(grid.round(row))
            errors[k] = (row - grid.dequantize(*codes[-1]))[0] / factor[start + k, start + k]
            block[k + 1 :] -= factor[start + k, start + k + 1 : end, None] * errors[k]
        weight[end:] -= factor[start:end, end:].t() @ errors
    back = order.argsort()
    return tuple(torch.cat(part)[back] for part in zip(*codes, strict=True))
