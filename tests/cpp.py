"""The C++ kernels for each instruction set that this machine can run."""

import ctypes
import functools
import platform

import pytest
import torch

from teal_fast.kernels.native import build, find_compiler

ARM = platform.machine() in ("arm64", "aarch64")
WIDER = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}
RUNNABLE = ["portable", *(["neon"] if ARM else WIDER.get(torch.backends.cpu.get_cpu_capability(), []))]


@functools.cache
def compiled(instructions: str) -> ctypes.CDLL:
    """The kernels for an instruction set, from the cache of every day; skips the test where there is no compiler."""
    compiler = find_compiler()
    return ctypes.CDLL(str(build(compiler, instructions))) if compiler else pytest.skip("no C++ compiler here")
