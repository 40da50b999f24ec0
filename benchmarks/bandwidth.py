"""The rate at which a device reads memory: what a decode step, which is bound by reading weights, could hope for."""

import time

import torch


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a sum over a buffer far larger than any cache, the best of several."""
    values = torch.ones(1 << 30 if device.type == "cuda" else 1 << 26, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        values.sum().item()
        best = min(best, time.perf_counter() - started)
    return values.nbytes / best
