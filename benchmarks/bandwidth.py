"""The rate at which a device reads memory: what a decode step, which is bound by reading weights, could hope for."""

import ctypes
import functools
import itertools
import mmap
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.kernels.native import find_compiler

SOURCE = Path(__file__).with_name("read_memory.cpp")
SLICE = 1 << 27  # bytes that all threads together read; one thread alone reads half of it
AHEAD = 2048  # bytes from a line to the one that is fetched meanwhile, as in kernels/csrc/rows.h
HUGE_PAGE = 1 << 21  # bytes

ReadMemory = Callable[[Tensor, int, int], object]  # values, threads, bytes that lines are fetched ahead


def bandwidth_meter(device: torch.device) -> Callable[[], float]:
    """What tells the read bandwidth, in bytes a second, of a sum over buffers far larger than any cache.

    On the CPU it is that of the moment of each call: neighbours on the same memory move it within seconds, by a factor
    of three on a shared machine. On CUDA it is measured once, here, the best of many.
    """
    if device.type == "cpu":
        return cpu_meter(compile_reader(), torch.get_num_threads())
    values = torch.ones(1 << 30, dtype=torch.float32, device=device)
    bandwidth = values.nbytes / min(_gpu_seconds(values))
    return lambda: bandwidth


def cpu_meter(read: ReadMemory, threads: int) -> Callable[[], float]:
    """What tells the best rate of eight readers: huge or small pages, plain or fetching ahead, all threads or one.

    No reader is the best everywhere: one thread reads more than two while a neighbour has the other's core. A reading
    does not depend on what ran before it: the readers keep one order, between two reads of the same bytes lie more
    others than a cache holds, and a first read, which does not count, wakes the threads and empties the caches.
    """
    huge, small = allocate(2 * SLICE, huge=True), allocate(3 * SLICE, huge=False)
    *slices, uncounted = *huge.chunk(2), *small.chunk(3)
    readers = [(values, threads, ahead) for values, ahead in zip(slices, (0, AHEAD, 0, AHEAD), strict=True)]
    readers += [(values[: len(values) // 2], 1, ahead) for values, _, ahead in readers]

    def reading() -> float:
        read(uncounted, threads, 0)
        return max(_rate(read, *reader) for reader in readers)

    return reading


def _rate(read: ReadMemory, values: Tensor, threads: int, ahead: int) -> float:
    started = time.perf_counter()
    read(values, threads, ahead)
    return values.nbytes / (time.perf_counter() - started)


def allocate(size: int, huge: bool) -> Tensor:
    """A buffer of `size` bytes, filled, on huge pages where that is asked for and the system has them to give."""
    if not (huge and hasattr(mmap, "MADV_HUGEPAGE")):
        return torch.ones(size // 4)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    values = torch.frombuffer(memory, dtype=torch.float32)  # which keeps the memory
    return values[-values.data_ptr() % HUGE_PAGE // 4 :][: size // 4].fill_(1)


@functools.cache
def compile_reader() -> ReadMemory:
    """What reads a tensor on the CPU: C++, since torch.sum leaves a tenth of the rate; torch.sum without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library, compiled = Path(folder, "read_memory.so"), Path(folder, "read_memory.o")
        compiler, flags = find_compiler() or "c++", ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC")
        try:
            _run(compiler, *flags, "-c", SOURCE, "-o", compiled)
            # Not linked with OpenMP: PyTorch's serves, so that no second pool's threads wait for work beside a row's.
            _run(compiler, "-shared", compiled, "-o", library)
            function = ctypes.CDLL(str(library)).read_memory
        except (OSError, subprocess.CalledProcessError):
            print("the C++ reader cannot be built: the read bandwidth is measured by torch.sum", file=sys.stderr)
            return lambda values, threads, ahead: values.sum()
    function.restype = ctypes.c_uint64
    function.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64
    return lambda values, threads, ahead: function(values.data_ptr(), values.nbytes, threads, ahead)


def _run(*command: str | Path) -> None:
    subprocess.run(command, capture_output=True, check=True)


def _gpu_seconds(values: Tensor, repeats: int = 500) -> list[float]:
    """Timed on the GPU, one sum after another for half a second: an idle GPU's clocks take a while to rise."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        values.sum()
        event.record()
    torch.cuda.synchronize(values.device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]
