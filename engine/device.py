"""The device that a name means, and computing there."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


def find_device(name: str | None) -> torch.device:
    """The device called `name`, by default CUDA where there is one. Raises ValueError when it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not known here, expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and not 0 <= (device.index or 0) < count:
        raise ValueError(f"--device {name}: this PyTorch sees {count} CUDA devices, use another or --device cpu")
    return device


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, which becomes PyTorch's current one: events and launches go by that."""
    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """In the block, work goes to this GPU, whatever the thread's current one is, and keeps no gradients.

    Never across a yield: the thread's own settings would be lost there. Nor is `torch.no_grad` a decorator of a stream:
    it puts a generator around it, and Ctrl-C in that one leaves the stream itself open.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.no_grad():
        yield
