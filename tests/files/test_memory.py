"""Out of memory: what PyTorch and the system say of it, and the one line that comes of that."""

import ctypes
import errno
import mmap
from pathlib import Path

import pytest
import torch

from teal_fast.files import memory
from teal_fast.files.load import load_model
from teal_fast.files.memory import (
    OutOfMemoryError,
    check_memory,
    explain_memory,
    free_bytes,
    memory_for,
    peak_bytes,
    size,
)

CUDA = (  # of PyTorch 2.13
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 139.81 GiB of which 3.00 GiB is "
    "free. Including non-PyTorch memory, this process has 136.81 GiB memory in use."
)


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError(CUDA), "22.0 GB more were refused"),
        (RuntimeError("CUDA error: out of memory"), "more was refused"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "more was refused",
        ),
        (MemoryError(), "more was refused"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "more was refused"),
        (RuntimeError("shapes do not fit"), None),
        (OSError(errno.ENOENT, "No such file"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_what_errors_say(error, said):
    assert explain_memory(error) == said


def test_a_refused_allocation_is_one_line():
    with pytest.raises(OutOfMemoryError) as refused, memory_for("a petabyte", "ask for less"):
        torch.empty(1 << 50, dtype=torch.uint8)
    assert str(refused.value) == "out of memory for a petabyte (1,125,899.9 GB more were refused): ask for less"


def test_a_size_beyond_64_bits_is_one_line():
    with pytest.raises(OutOfMemoryError, match="out of memory for more"), memory_for("more", "ask for less"):
        torch.empty(1 << 62, 1 << 3)


def test_the_inner_word_stays_and_other_errors_pass():
    with pytest.raises(OutOfMemoryError, match="for a cache"), memory_for("a model", ""), memory_for("a cache", ""):
        raise MemoryError
    for error in (RuntimeError("shapes do not fit"), ValueError("no"), OSError("no")):
        with pytest.raises(type(error), match=str(error)), memory_for("a model", ""):
            raise error


def test_what_is_left_is_what_the_system_and_the_container_leave(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    assert 1e8 < free_bytes(cpu) < 1e14
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path, limit.name, "memory.current"), (tmp_path, "none", "none")))
    limit.write_text("200000000\n")
    (tmp_path / "memory.current").write_text("100000000\n")
    (tmp_path / "memory.stat").write_text("anon 76543211\ninactive_file 23000000\nactive_file 456789\nshmem 5\n")
    assert free_bytes(cpu) == 123456789
    with pytest.raises(OutOfMemoryError, match=r"for it \(123\.5 MB asked for, cpu has 123\.5 MB left\): do"):
        check_memory(123456790, cpu, "it", "do")
    check_memory(123456789, cpu, "it", "do")
    limit.write_text("max\n")
    assert free_bytes(cpu) > 123456789


def test_sizes():
    assert [size(n) for n in (5e5, 1.5e8, 2.5e12)] == ["0.5 MB", "150.0 MB", "2,500.0 GB"]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_holes_in_the_heap_are_given_back_before_weights_are_loaded(tiny):
    load_model(tiny)
    held = [bytes(1000) for _ in range(100_000)]  # larger than what Python keeps arenas of its own for
    last = held[-1]
    held.clear()
    before = resident()
    load_model(tiny)
    assert before - resident() > 5e7 and last


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_the_peak_stays_when_memory_is_given_back():
    before = peak_bytes()
    block = torch.ones(2**25)
    peak = peak_bytes()
    del block
    # Linux counts pages for each thread in batches, and so to some hundred KB.
    assert peak > max(2**27, before - 2**22) and peak_bytes() > peak - 2**22 > resident()
