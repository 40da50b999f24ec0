"""Out of memory in one line: what was asked for, how much there is, and what to lower.

PyTorch says it in many ways, on CUDA by a type of its own, on the CPU by a RuntimeError. A CPU that grants memory which
it does not have ends the process later by a signal, so that what is large and known beforehand is compared first.
"""

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SAID = re.compile(
    r"out of memory|DefaultCPUAllocator|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc"
    r"|Storage size calculation overflowed",
    re.IGNORECASE,
)
ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
CGROUPS = (  # a container's limits, in the second and the first form: folder, limit, what is in use
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


class OutOfMemoryError(MemoryError):
    """What did not fit, and what to lower: one line."""


def explain_memory(error: BaseException) -> str | None:
    """What an error says of memory that was asked for in vain; None when it is about something else."""
    said = isinstance(error, RuntimeError) and SAID.search(str(error))
    if not said and not isinstance(error, MemoryError) and getattr(error, "errno", None) != errno.ENOMEM:
        return None
    asked = ASKED.search(str(error))
    return f"{size(float(asked[1]) * UNITS[asked[2].lower()])} more were refused" if asked else "more was refused"


@contextmanager
def memory_for(what: str, todo: str) -> Iterator[None]:
    """In the block, running out of memory raises OutOfMemoryError, which names `what` did not fit and what to do."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        if (said := explain_memory(error)) is None:
            raise
        raise OutOfMemoryError(f"out of memory for {what} ({said}): {todo}") from error


def check_memory(needed: int, device: torch.device, what: str, todo: str) -> None:
    """Raises OutOfMemoryError when `needed` bytes are more than the device has left."""
    there = free_bytes(device)
    if there is not None and needed > there:
        raise OutOfMemoryError(
            f"out of memory for {what} ({size(needed)} asked for, {device} has {size(there)} left): {todo}"
        )


def free_bytes(device: torch.device) -> int | None:
    """The memory that can still be had, PyTorch's own reserve included; None where the system does not say."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    found = [left for group in CGROUPS if (left := _left(*group)) is not None]
    if available := re.search(r"^MemAvailable: +(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE):
        found.append(int(available[1]) << 10)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _left(folder: Path, limit: str, used: str) -> int | None:
    """What a container may still take; pages of files, such as memory-mapped weights, are given up when it is short."""
    limit, used = (_read(folder / name).strip() for name in (limit, used))
    if not (limit.isdecimal() and used.isdecimal()):  # "max": there is none
        return None
    of_files = re.findall(r"^(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    return max(int(limit) - int(used) + sum(map(int, of_files)), 0)


def give_back_heap() -> None:
    """Gives free memory of the heap back to the system, where the C library can (glibc).

    Reading a vocabulary of 150,000 tokens leaves 120 MB of it between what is kept.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))


def peak_bytes() -> int | None:
    """The most resident memory that this process ever had, mapped files included; None where Linux does not say it."""
    # Not getrusage: its ru_maxrss starts with that of the process which started this one.
    found = re.search(r"^VmHWM:\s+(\d+) kB", _read(Path("/proc/self/status")), re.MULTILINE)
    return int(found[1]) << 10 if found else None


def size(count: float) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
