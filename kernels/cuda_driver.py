"""CUDA's driver: loads machine code and launches its kernels on PyTorch's current stream; tensor maps.

Unlike PyTorch's own launcher it has programmatic dependent launch. A CUDA graph can record the launches.
"""

import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

import torch

from teal_fast.kernels.nvrtc import CudaError

CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
DEPENDENT = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SWIZZLE_128B = 3  # CU_TENSOR_MAP_SWIZZLE_128B
MAP_ALIGNMENT = 64  # bytes


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value is a union of 64 bytes."""

    _fields_ = [("id", c_int), ("padding", c_int), ("value", c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_memory")),
        ("stream", c_void_p),
        ("attributes", POINTER(Attribute)),
        ("count", c_uint),
    ]


class TensorMap(ctypes.Structure):
    """CUtensorMap, which is opaque: a matrix in memory as Hopper's copy engine reads boxes of it."""

    _fields_ = [("opaque", c_uint64 * 16)]


@functools.cache
def driver() -> ctypes.CDLL:
    """The driver's library, opened once."""
    return ctypes.CDLL("libcuda.so.1")


class CudaModule:
    """Machine code loaded on the current device; its kernels by name."""

    def __init__(self, code: bytes):
        self.driver, self.module = driver(), c_void_p()
        self._check(self.driver.cuModuleLoadData(byref(self.module), code))

    def kernel(self, name: str, shared_memory: int) -> c_void_p:
        """A kernel that may take so many bytes of dynamic shared memory."""
        kernel = c_void_p()
        self._check(self.driver.cuModuleGetFunction(byref(kernel), self.module, name.encode()))
        self._check(self.driver.cuFuncSetAttribute(kernel, SHARED_MEMORY, shared_memory))
        return kernel

    def size(self, name: str) -> int:
        """Bytes of one of the module's variables."""
        address, size = c_void_p(), c_size_t()
        self._check(self.driver.cuModuleGetGlobal_v2(byref(address), byref(size), self.module, name.encode()))
        return size.value

    def attributes(self, kernel: c_void_p) -> dict[str, int]:
        """What a kernel takes: registers a thread, bytes of local memory, of shared memory that is not dynamic."""
        found, value = {}, c_int()
        for name, number in (("shared", 1), ("local", 3), ("registers", 4)):
            self._check(self.driver.cuFuncGetAttribute(byref(value), number, kernel))
            found[name] = value.value
        return found

    def launch(self, kernel: c_void_p, config: LaunchConfig, *parameters) -> None:
        """Launches it with parameters that are ctypes values, on PyTorch's current stream."""
        config.stream = torch.cuda.current_stream().cuda_stream
        addresses = (c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
        self._check(self.driver.cuLaunchKernelEx(byref(config), kernel, addresses, None))

    def _check(self, result: int) -> None:
        if result:
            text = c_char_p()
            self.driver.cuGetErrorString(result, byref(text))
            raise CudaError(f"the CUDA driver says: {(text.value or b'error %d' % result).decode()}")


def launch_config(grid: int, threads: int, shared_memory: int, dependent: bool, cluster: int = 1) -> LaunchConfig:
    """A launch of one dimension. dependent: it may start before the launch ahead of it has ended.

    cluster: how many CTAs next to each other may read each other's shared memory.
    """
    attributes = (Attribute * 2)(Attribute(DEPENDENT), Attribute(CLUSTER))
    attributes[0].value[0] = int(dependent)
    attributes[1].value[:3] = (cluster, 1, 1)
    return LaunchConfig(grid, 1, 1, threads, 1, 1, shared_memory, None, attributes, 2)


def tensor_map(
    address: int, size: int, columns: int, rows: int, row_bytes: int, box: tuple[int, int], swizzled: bool = False
) -> TensorMap:
    """A map of rows of `columns` elements of one or two bytes; box: its columns and rows. Outside all is zero.

    swizzled: in shared memory the sixteens of a row of 128 bytes are exchanged by an exclusive or with its number.

    The address, rows and the box's columns take whole 16 bytes, and a box must begin at such; else CudaError is raised,
    or the kernel ends with an illegal instruction.
    """
    scratch = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + MAP_ALIGNMENT)
    at = -(-ctypes.addressof(scratch) // MAP_ALIGNMENT) * MAP_ALIGNMENT
    sizes, strides = (c_uint64 * 2)(columns, rows), (c_uint64 * 1)(row_bytes)
    result = driver().cuTensorMapEncodeTiled(
        c_void_p(at), size - 1, c_uint(2), c_void_p(address), sizes, strides, (c_uint * 2)(*box), (c_uint * 2)(1, 1), 0,
        SWIZZLE_128B if swizzled else 0, 0, 0,
    )  # fmt: skip
    if result:
        raise CudaError(f"the CUDA driver refuses a tensor map of {rows} rows of {columns}: error {result}")
    return TensorMap.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(TensorMap)))
