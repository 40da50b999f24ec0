"""Tensor maps: a matrix in memory as Hopper's copy engine reads boxes of it into shared memory."""

import ctypes
from ctypes import c_int, c_uint32, c_uint64, c_void_p

from teal_fast.kernels.nvrtc import CudaError

UINT8, UINT16 = 0, 1  # CU_TENSOR_MAP_DATA_TYPE_…
UNSWIZZLED, SWIZZLED = 0, 3  # CU_TENSOR_MAP_SWIZZLE_NONE and _128B
L2_PROMOTION = 0  # CU_TENSOR_MAP_L2_PROMOTION_NONE: whole lines are read anyway
ALIGNMENT = 64  # bytes


class TensorMap(ctypes.Structure):
    """CUtensorMap, which is opaque."""

    _fields_ = [("opaque", c_uint64 * 16)]


def tensor_map(
    address: int, kind: int, columns: int, rows: int, row_bytes: int, box: tuple[int, int], swizzle: int = UNSWIZZLED
) -> TensorMap:
    """A map of rows of `columns` elements of `kind`; box: its columns and rows. What is outside is read as zero."""
    scratch = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + ALIGNMENT)
    at = -(-ctypes.addressof(scratch) // ALIGNMENT) * ALIGNMENT
    result = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        c_void_p(at), c_int(kind), c_uint32(2), c_void_p(address), (c_uint64 * 2)(columns, rows),
        (c_uint64 * 1)(row_bytes), (c_uint32 * 2)(*box), (c_uint32 * 2)(1, 1), c_int(0), c_int(swizzle),
        c_int(L2_PROMOTION), c_int(0),
    )  # fmt: skip
    if result:
        raise CudaError(f"the CUDA driver refuses a tensor map of {rows} rows of {columns}: error {result}")
    return TensorMap.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(TensorMap)))
