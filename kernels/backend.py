"""What this machine can run: the one place that knows whether Triton is there, and what the GPU's generation offers.

Every op is registered here, too.
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
try:
    if not (torch.backends.cuda.is_built() or INTERPRETED):
        raise ImportError("this PyTorch runs on CPUs alone, where Triton would only take 80 MB of memory")
    import triton
    import triton.language as tl
except ImportError:  # also where Triton has no build for this platform: CUDA kernels are not to be had, the CPU path is
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)  # for the kernels' signatures


def jit(function):
    """`triton.jit` where there is Triton; elsewhere the function as it is, which no launcher then reaches."""
    return function if triton is None else triton.jit(function)


def register(
    name: str,
    schema: str,
    *,
    cuda: Callable,
    fake: Callable,
    cpu: Callable | None = None,
    bundle: Callable | None = None,
) -> torch._ops.OpOverload:
    """Makes the op `teal::name` of the launchers for CUDA and the CPU and of `fake`, and returns it.

    An op takes tensors and numbers one by one. `bundle` makes such functions of `cuda` and `fake`, of NamedTuples;
    `cpu`, which runs for every product of a token, takes what the op takes. Triton's interpreter runs the CUDA launcher
    on the CPU where there is no other.
    """

    bundle = bundle or (lambda function: function)
    torch.library.define(f"teal::{name}", schema)
    torch.library.impl(f"teal::{name}", "CUDA", bundle(cuda))
    if cpu or (INTERPRETED and triton is not None):
        torch.library.impl(f"teal::{name}", "CPU", cpu or bundle(cuda))
    torch.library.register_fake(f"teal::{name}", bundle(fake))
    return getattr(torch.ops.teal, name).default


@functools.cache
def has_pdl(device: int | None) -> bool:
    """Whether the GPU has programmatic dependent launch (Hopper and later).

    A kernel's programs then start while the kernel before drains, and wait before they read what it wrote. Every kernel
    of a chain must wait, or the order is lost for those behind it.
    """
    return device is not None and not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def has_large_shared_memory(device: int | None) -> bool:
    """Whether a program can have 227 KB of shared memory (compute capability 9 and 10), where most GPUs allow 99 KB."""
    return device is not None and not INTERPRETED and torch.cuda.get_device_capability(device)[0] in (9, 10)


def launch_options(x: Tensor) -> dict[str, bool]:
    """Keywords of a launch on x's device: the kernel's PDL argument and, where it is true, the launch attribute."""
    pdl = has_pdl(x.device.index)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def offset_type(weight: Tensor):
    """The integer type that reaches every element of `weight`: 64-bit offsets cost 1 to 4 % (docs/gpu_log.md)."""
    return tl.int32 if weight.numel() < 2**31 else tl.int64


@jit
def gdc_wait(PDL: tl.constexpr):
    """Waits until what the kernel before wrote can be read; what is read earlier must not come from it."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def gdc_launch_dependents(PDL: tl.constexpr):
    """Lets the next kernel's programs start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
