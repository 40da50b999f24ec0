"""What this machine can run: the one place that knows whether Triton is there."""

import os

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no build for this platform: CUDA kernels are not to be had, the CPU path is
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function):
    """`triton.jit` where there is Triton; elsewhere the function as it is, which no launcher then reaches."""
    return function if triton is None else triton.jit(function)
