"""The CUDA C++ of csrc/: compiled on first use for a GPU's generation and constants, and cached.

NVRTC, which comes with PyTorch, compiles it; neither nvcc nor CUDA's headers are needed. cuda_driver.py launches it.
"""

import ctypes
import functools
import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

import torch

from teal_fast.kernels.native import CSRC, cache_folder


class CudaError(RuntimeError):
    """What NVRTC or the driver refused: its first line."""


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """NVRTC: the one that PyTorch loads, else one of NVIDIA's packages. Raises CudaError where there is none."""
    for name in _nvrtc_names():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("NVRTC, which PyTorch's CUDA builds come with, was not found")


def _nvrtc_names() -> Iterator[str]:
    if torch.version.cuda:
        yield f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}"
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for builtins in sorted(Path(folder).glob("*/lib/libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by its name alone
        yield from map(str, sorted(Path(folder).glob("*/lib/libnvrtc.so.*")))


def compile_cuda(name: str, arch: str, defines: dict[str, int]) -> bytes:
    """csrc/`name` with csrc's .cuh files as machine code for `arch`, like sm_90, from the cache if it is there.

    Raises CudaError when it does not compile.
    """
    library, version = nvrtc(), (c_int(), c_int())
    _check(library.nvrtcVersion(*map(byref, version)), library)
    options = [
        f"--gpu-architecture={arch}",
        "-std=c++17",
        "-default-device",
        *(f"-D{key}={value}" for key, value in defines.items()),
    ]
    sources = {path.name: path.read_bytes() for path in (CSRC / name, *sorted(CSRC.glob("*.cuh")))}
    key = hashlib.sha256("\n".join([*options, *(str(part.value) for part in version)]).encode())
    for source in sources.values():
        key.update(source)
    folder, stem = cache_folder(), f"{Path(name).stem}-{arch}-{key.hexdigest()[:16]}"
    for found in folder.glob(f"{stem}-*.cubin"):
        if found.stem.endswith(_digest(code := found.read_bytes())):
            return code
        found.unlink(missing_ok=True)  # damaged
    print(f"compiling {name} for {arch}, once: some seconds", file=sys.stderr)
    code = _compile(library, sources, options)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = Path(scratch, "code")
        written.write_bytes(code)
        written.replace(folder / f"{stem}-{_digest(code)}.cubin")
    return code


def _compile(library: ctypes.CDLL, sources: dict[str, bytes], options: list[str]) -> bytes:
    (main, source), *headers = sources.items()
    texts = (c_char_p * len(headers))(*(text for _, text in headers))
    names = (c_char_p * len(headers))(*(name.encode() for name, _ in headers))
    program, size = c_void_p(), c_size_t()
    created = library.nvrtcCreateProgram(byref(program), source, main.encode(), len(headers), texts, names)
    _check(created, library)
    try:
        failed = library.nvrtcCompileProgram(
            program, len(options), (c_char_p * len(options))(*map(str.encode, options))
        )
        if failed:
            _check(library.nvrtcGetProgramLogSize(program, byref(size)), library)
            log = ctypes.create_string_buffer(size.value)
            _check(library.nvrtcGetProgramLog(program, log), library)
            lines = log.value.decode(errors="replace").strip().splitlines()
            raise CudaError(next((line for line in lines if "error" in line), lines[0] if lines else "no reason given"))
        _check(library.nvrtcGetCUBINSize(program, byref(size)), library)
        code = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, code), library)
        return code.raw
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _check(result: int, library: ctypes.CDLL) -> None:
    if result:
        library.nvrtcGetErrorString.restype = c_char_p
        raise CudaError(f"NVRTC says: {library.nvrtcGetErrorString(result).decode()}")


def _digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()[:16]
