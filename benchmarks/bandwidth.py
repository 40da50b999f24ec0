"""The rate at which a device reads memory: what a decode step, which is bound by reading weights, could hope for."""

import ctypes
import functools
import itertools
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


def bandwidth_meter(device: torch.device) -> Callable[[], float]:
    """What tells the read bandwidth, in bytes a second, of a sum over a buffer far larger than any cache.

    On the CPU it is that of the moment of each call, the better of two reads: neighbours on the same memory move it
    within seconds, by a factor of three on a shared machine. On CUDA it is measured once, here, the best of many.
    """
    values = torch.ones(1 << 30 if device.type == "cuda" else 1 << 26, dtype=torch.float32, device=device)
    if device.type == "cpu":
        return lambda: values.nbytes / min(_cpu_seconds(values), _cpu_seconds(values))
    bandwidth = values.nbytes / min(_gpu_seconds(values))
    return lambda: bandwidth


def _cpu_seconds(values: Tensor) -> float:
    read, started = reader(), time.perf_counter()
    read(values)
    return time.perf_counter() - started


@functools.cache
def reader() -> Callable[[Tensor], object]:
    """What reads a tensor on the CPU: C++, since torch.sum leaves a tenth of the rate; torch.sum without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "read_memory.so")
        flags = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-shared")
        try:
            subprocess.run([find_compiler() or "c++", *flags, SOURCE, "-o", path], capture_output=True, check=True)
            function = ctypes.CDLL(str(path)).read_memory
        except (OSError, subprocess.CalledProcessError):
            print("the read bandwidth is measured by torch.sum, for want of a C++ compiler", file=sys.stderr)
            return torch.sum
    function.restype, function.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    return lambda values: function(values.data_ptr(), values.nbytes // 8, torch.get_num_threads())


def _gpu_seconds(values: Tensor, repeats: int = 500) -> list[float]:
    """Timed on the GPU, one sum after another for half a second: an idle GPU's clocks take a while to rise."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        values.sum()
        event.record()
    torch.cuda.synchronize(values.device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]
