"""How programs that split a sum find the last of them, which adds up: counts that are zero before and after a launch.

arrived int32 has a count for each tile of columns; launches that may overlap must not share one.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import jit, tl

FEWEST = 32  # columns a program


def arrivals(N: int, device: torch.device) -> Tensor:
    """The counts that programs of weights of up to N columns need, for one weight after another: int32, zero."""
    return torch.zeros(-(-N // FEWEST), dtype=torch.int32, device=device)


def check_arrived(op: str, arrived: Tensor, N: int) -> None:
    """Raises ValueError naming `op` when these are no counts for N columns."""
    if arrived.dtype != torch.int32 or arrived.ndim != 1 or len(arrived) * FEWEST < N:
        found = f"{list(arrived.shape)} {arrived.dtype}"
        raise ValueError(f"{op} takes counts of programs int32 [{-(-N // FEWEST)}] or more, got {found}")


@jit
def is_last(arrived_ptr, programs):
    """Whether this is the last of the programs to arrive: what the others stored before can then be read from L2.

    The count is left at zero.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1) == programs - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last
