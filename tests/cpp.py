"""The C++ kernels for each instruction set that this machine can run."""

import ctypes
import functools

import pytest

from teal_fast.kernels.native import build, find_compiler, supported

RUNNABLE = list(reversed(supported()))


@functools.cache
def compiled(instructions: str) -> ctypes.CDLL:
    """The kernels for an instruction set, from the cache of every day; skips the test where there is no compiler."""
    compiler = find_compiler()
    return ctypes.CDLL(str(build(compiler, instructions))) if compiler else pytest.skip("no C++ compiler here")
