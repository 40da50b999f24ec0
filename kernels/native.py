"""The C++ kernels of csrc/: compiled on first use for this machine's instruction set, cached, and loaded.

They are plain functions on pointers, without PyTorch's headers: they build in seconds, once for all its versions.
TEAL_CPU forces an instruction set that the processor has: amx, avx512_vnni, avx512, avx2, neon or portable;
`torch` does without C++.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parent / "csrc"
SOURCES = ("sparse_gemv", "decode_step", "blocks")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
INSTRUCTIONS = {
    "amx": (*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
    "avx512_vnni": (*AVX512, "-mavx512vnni"),
    "avx512": AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": (),
    "portable": (),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/ numbers them


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's data; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def instruction_set() -> str:
    """What to compile for: what TEAL_CPU says, else the best of this machine.

    Raises ValueError on what this processor does not have: its first kernel would end the process.
    """
    forced, can = os.environ.get("TEAL_CPU"), (*supported(), "torch")
    if forced is not None and forced not in can:
        trouble = "which this processor does not have" if forced in INSTRUCTIONS else "which is not known"
        raise ValueError(f"TEAL_CPU is {forced!r}, {trouble}: expected one of {', '.join(can)}")
    return forced or can[0]


def supported() -> tuple[str, ...]:
    """The instruction sets that this processor has, the best one first."""
    if platform.machine() in ("arm64", "aarch64"):
        return "neon", "portable"
    wide = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(torch.backends.cpu.get_cpu_capability(), ())
    # Some processors have the instructions on 256 bits alone, which count too: they have no AVX-512.
    vnni = ("avx512_vnni",) if "avx512" in wide and torch.cpu._is_vnni_supported() else ()
    return *(("amx",) if vnni and _has_tiles() else ()), *vnni, *wide, "portable"


def _has_tiles() -> bool:
    """Whether this process may use AMX's tiles. Linux grants them to one that asks for them, which _init_amx does."""
    supported, ask = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_init_amx"))
    return bool(supported and ask and supported() and ask())


def find_compiler() -> str | None:
    """The C++ compiler to use: what CXX names, else c++, g++ or clang++; None where there is none of them."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they can't be had, which it says, or where TEAL_CPU is `torch`."""
    instructions = instruction_set()
    if instructions == "torch":
        return None
    compiler = find_compiler()
    trouble = "no C++ compiler was found (c++, g++, clang++ or what CXX names)"
    if compiler:
        try:
            return ctypes.CDLL(str(build(compiler, instructions)))
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            trouble = f"{compiler} could not build the CPU kernels ({said[0] if said else 'it says nothing'})"
    print(f"{trouble}: decoding in plain PyTorch, several times slower", file=sys.stderr)
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teal-fast"


def build(compiler: str, instructions: str) -> Path:
    """The shared library, compiled unless the cache has it: of these sources, this compiler, these instructions.

    One that is damaged or no longer loads, as after an update of what it is linked with, is compiled again.
    """
    command = [compiler, *FLAGS, *INSTRUCTIONS[instructions]]
    version = _run(compiler, "--version")
    key = hashlib.sha256("\n".join([*command, version, platform.machine()]).encode())
    for source in sorted(CSRC.iterdir()):
        if source.suffix in (".h", ".cpp"):  # CUDA's are no part of it
            key.update(source.read_bytes())
    folder, name = cache_folder(), f"{instructions}-{key.hexdigest()[:16]}"
    for found in folder.glob(f"{name}-*.so"):
        if _loads(found):
            return found
        print(f"{found} no longer loads", file=sys.stderr)
        found.unlink(missing_ok=True)
    print(f"compiling the CPU kernels for {instructions}, once: about a minute", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        linked, objects = Path(scratch, f"{name}.so"), [str(Path(scratch, f"{source}.o")) for source in SOURCES]
        with ThreadPoolExecutor() as pool:
            sources = (str(CSRC / f"{source}.cpp") for source in SOURCES)
            list(pool.map(lambda source, out: _run(*command, "-c", source, "-o", out), sources, objects))
        # Not linked with OpenMP: the library that PyTorch has loaded serves, so that there is one pool of threads.
        undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
        _run(compiler, "-shared", *undefined, *objects, "-o", str(linked))
        try:
            ctypes.CDLL(str(linked))
        except OSError:  # this PyTorch has none to offer
            _run(compiler, "-shared", "-fopenmp", *objects, "-o", str(linked))
            ctypes.CDLL(str(linked))  # the cache gets nothing that can't be loaded
        return linked.replace(folder / f"{name}-{_digest(linked)}.so")


def _loads(path: Path) -> bool:
    """Whether a cached library can be used; half a file would end the process, so that its bytes are checked first."""
    try:
        return path.stem.endswith(_digest(path)) and bool(ctypes.CDLL(str(path)))
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
