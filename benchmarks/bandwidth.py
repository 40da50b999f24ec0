"""The rate at which a device reads memory: what a decode step, which is bound by reading weights, could hope for."""

import itertools
import time

import torch
from torch import Tensor


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a sum over a buffer far larger than any cache, the best of several."""
    values = torch.ones(1 << 30 if device.type == "cuda" else 1 << 26, dtype=torch.float32, device=device)
    seconds = _gpu_seconds(values) if values.is_cuda else _cpu_seconds(values)
    return values.nbytes / min(seconds)


def _cpu_seconds(values: Tensor, repeats: int = 10) -> list[float]:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        values.sum().item()
        seconds.append(time.perf_counter() - started)
    return seconds


def _gpu_seconds(values: Tensor, repeats: int = 500) -> list[float]:
    """Timed on the GPU, one sum after another for half a second: an idle GPU's clocks take a while to rise."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        values.sum()
        event.record()
    torch.cuda.synchronize(values.device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]
