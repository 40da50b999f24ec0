"""Split-K with a semaphore: the last program of a tile of columns to finish adds up what all of them found.

A semaphore is one int32 count a tile, zero before and after a launch. Launches that may overlap must not share any.
"""

import torch
from torch import Tensor

from teal_fast.kernels.backend import jit, tl

FEWEST = 32  # columns a program


def new_semaphores(N: int, device: torch.device) -> Tensor:
    """Semaphores for weights of up to N columns, one weight after another: int32, zero."""
    return torch.zeros(-(-N // FEWEST), dtype=torch.int32, device=device)


def check_semaphores(op: str, semaphores: Tensor, N: int) -> None:
    """Raises ValueError naming `op` when there are too few semaphores for N columns."""
    if semaphores.dtype != torch.int32 or semaphores.ndim != 1 or len(semaphores) * FEWEST < N:
        found = f"{list(semaphores.shape)} {semaphores.dtype}"
        raise ValueError(f"{op} takes semaphores [{-(-N // FEWEST)}] int32 or more of them, got {found}")


@jit
def last_block(semaphore_ptr, programs):
    """Whether this is the last of so many programs: what the others stored before can then be read from L2.

    The semaphore is left at zero.
    """
    tl.debug_barrier()
    last = tl.atomic_add(semaphore_ptr, 1) == programs - 1
    if last:
        tl.store(semaphore_ptr, 0)
    return last
