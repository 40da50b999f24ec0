import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teal_fast.calibration.passes import cut_sequences
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.files.calibration import Calibration
from teal_fast.files.checkpoint import fingerprint
from teal_fast.files.load import load_model
from teal_fast.kernels import native
from teal_fast.kernels.native import INSTRUCTIONS, build, cache_folder, instruction_set, library

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
load = library.__wrapped__  # anew, whatever the session has loaded


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own; nothing forced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TEAL_CPU", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "teal-fast"


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def pretended(monkeypatch) -> list[tuple[str, ...]]:
    """No compiler runs: its calls land in this list, and what it should write is an empty file."""
    calls = []

    def run(*command: str) -> str:
        calls.append(command)
        if "-o" in command:
            Path(command[command.index("-o") + 1]).touch()
        return "a compiler, version 1"

    monkeypatch.setattr(native, "_run", run)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: path)
    return calls


@pytest.mark.parametrize(
    "machine, capability, vnni, can",
    [
        ("x86_64", "AVX512", "tiles", ["amx", "avx512_vnni", "avx512", "avx2", "portable"]),
        ("x86_64", "AVX512", True, ["avx512_vnni", "avx512", "avx2", "portable"]),
        ("x86_64", "AVX512", "tiles, refused", ["avx512_vnni", "avx512", "avx2", "portable"]),
        ("x86_64", "AVX512", False, ["avx512", "avx2", "portable"]),
        ("x86_64", "AVX2", True, ["avx2", "portable"]),
        ("x86_64", "DEFAULT", False, ["portable"]),
        ("aarch64", "DEFAULT", False, ["neon", "portable"]),
        ("arm64", "SVE256", False, ["neon", "portable"]),
        ("riscv64", "DEFAULT", False, ["portable"]),
    ],
)
def test_instruction_set_of_a_machine(monkeypatch, machine, capability, vnni, can):
    """The best one by default, another that the processor has by the variable; one that it lacks is refused."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: str(vnni).startswith("tiles"), raising=False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: vnni == "tiles", raising=False)
    assert instruction_set() == can[0]
    for name in [*INSTRUCTIONS, "torch"]:
        monkeypatch.setenv("TEAL_CPU", name)
        if name in (*can, "torch"):
            assert instruction_set() == name
            continue
        said = f"TEAL_CPU is '{name}', which this processor does not have: expected one of {', '.join(can)}, torch"
        for refused in (instruction_set, load):
            with pytest.raises(ValueError, match=said):
                refused()


@pytest.mark.parametrize("name", ["sse9", ""])
def test_unknown_instruction_set(monkeypatch, name):
    monkeypatch.setenv("TEAL_CPU", name)
    with pytest.raises(ValueError, match=f"TEAL_CPU is '{name}', which is not known: expected .*portable, torch"):
        load()


def test_torch_builds_nothing(monkeypatch, capfd, empty_cache):
    monkeypatch.setenv("TEAL_CPU", "torch")
    assert load() is None and not empty_cache.exists() and capfd.readouterr().err == ""


def test_what_a_library_is_made_of_is_in_its_name(monkeypatch, tmp_path, pretended):
    sources = tmp_path / "csrc"
    shutil.copytree(native.CSRC, sources)
    monkeypatch.setattr(native, "CSRC", sources)
    names = [build("c++", "portable")]
    assert build("c++", "portable") == names[0] and names[0].name.startswith("portable-")

    def change(*patch) -> None:
        with monkeypatch.context() as changed:
            changed.setattr(*patch)
            names.append(build("c++", "portable"))

    change(native, "FLAGS", (*native.FLAGS, "-g"))
    change(native, "INSTRUCTIONS", INSTRUCTIONS | {"portable": ("-mavx",)})
    change(native, "_run", lambda *command, run=native._run: run(*command).replace("1", "2"))
    change(platform, "machine", lambda: "riscv64")
    names += [build("g++", "portable"), build("c++", "avx2")]
    ours = [source for source in sorted(sources.iterdir()) if source.suffix in (".cpp", ".h")]
    for source in ours:
        source.write_text(source.read_text() + "\n")
        names.append(build("c++", "portable"))
    assert len(set(names)) == len(names) == 7 + len(ours)
    for source in set(sources.iterdir()) - set(ours):  # CUDA's
        source.write_text(source.read_text() + "\n")
    assert build("c++", "portable") == names[-1]


def test_cached_library_is_not_compiled_again(pretended, capfd):
    build("c++", "portable")
    compiled = len(pretended)
    assert compiled > 3 and "compiling the CPU kernels for portable, once" in capfd.readouterr().err
    build("c++", "portable")
    assert pretended[compiled:] == [("c++", "--version")] and capfd.readouterr().err == ""


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "half", "symbols"])
def test_a_cached_library_that_no_longer_loads_is_compiled_again(monkeypatch, tmp_path, empty_cache, capfd, damage):
    """Such as one of another PyTorch, whose OpenMP it was to find; and what a full disk left of one."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "small.cpp").write_text('extern "C" int small() { return 5; }')
    (tmp_path / "other.cpp").write_text('extern "C" void of_no_library(); void call() { of_no_library(); }')
    monkeypatch.setattr(native, "CSRC", sources)
    monkeypatch.setattr(native, "SOURCES", ("small",))
    monkeypatch.setenv("TEAL_CPU", "portable")
    path = build(native.find_compiler(), "portable")
    damaged, contents = path, path.read_bytes()
    path.unlink()  # a new file: this process has the old one mapped
    if damage == "symbols":
        subprocess.run(["c++", "-shared", "-fPIC", tmp_path / "other.cpp", "-o", path], check=True)
        stem = path.stem.rpartition("-")[0]
        damaged = path.rename(path.with_name(f"{stem}-{native._digest(path)}.so"))  # whole, as far as its name says
    else:
        path.write_bytes(contents[: len(contents) // 2] if damage == "half" else b"")
    capfd.readouterr()
    assert load().small() == 5
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"{damaged} no longer loads", "compiling the CPU kernels for portable, once: about a minute"]
    assert list(empty_cache.iterdir()) == [path] and path.read_bytes() == contents


def test_cache_lies_in_the_home_by_default(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert cache_folder() == Path("/home/someone/.cache/teal-fast")


BROKEN = {  # what the compiler does, and what is said of it
    "nothing works": ("echo it is broken >&2; exit 1", "it is broken"),
    "no object": ('[ "$*" = --version ] || { echo it is broken >&2; echo and more >&2; exit 1; }', "it is broken"),
    "half a library": ('[ "$1" != -shared ] || { for o; do :; done; echo half > "$o"; echo bad >&2; exit 1; }', "bad"),
    "another file": ('while [ $# -gt 1 ]; do shift; done; [ "$1" = --version ] || echo text > "$1"', ".so: "),
    "nothing is said": ("exit 1", "Command '"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_compiler_is_one_line_and_leaves_nothing(monkeypatch, tmp_path, empty_cache, capfd, how):
    body, said = BROKEN[how]
    compiler = script(tmp_path / "c++", body)
    monkeypatch.setenv("CXX", compiler)
    assert load() is None
    *before, line = capfd.readouterr().err.splitlines()
    assert all("compiling the CPU kernels" in text for text in before) and len(before) < 2
    assert line.startswith(f"{compiler} could not build the CPU kernels (") and said in line
    assert line.endswith("): decoding in plain PyTorch, several times slower")
    assert not empty_cache.exists() or list(empty_cache.iterdir()) == []


def test_interrupted_build_leaves_nothing(monkeypatch, empty_cache, pretended):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(native.ctypes, "CDLL", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build("c++", "portable")
    assert list(empty_cache.iterdir()) == []


def test_no_compiler_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load() is None
    expected = "no C++ compiler was found (c++, g++, clang++ or what CXX names): decoding in plain PyTorch"
    assert capfd.readouterr().err == f"{expected}, several times slower\n"


def test_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, pretended, capfd):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("CXX", script(tmp_path / "c++", ""))
    assert load() is None
    assert "could not build the CPU kernels ([Errno" in capfd.readouterr().err.splitlines()[-1]


USE = """
import sys, torch
from pathlib import Path
from teal_fast.kernels.native import library
from teal_fast.kernels.packed import PackedWeight
from teal_fast.kernels.sparse_gemv import sparse_gemv
library()
x, weight = torch.randn(300), torch.randn(300, 500)
results = []
for threads in (1, 4):
    torch.set_num_threads(threads)
    results.append(sparse_gemv(x, PackedWeight(weight), torch.zeros(300)))
assert torch.equal(*results) and (results[0] - x @ weight).abs().max() < 1e-4
if sys.platform == "linux":
    mapped = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines()}
    print([name for name in mapped if name.startswith(("libgomp", "libomp", "libiomp"))])
"""
# Notes its calls, and does not link before two have come that far, or a minute has passed.
TWO = """echo "$*" >> {0}/calls
if [ "$1" = -shared ]; then
    touch {0}/at.$$
    for i in $(seq 1200); do [ $(ls {0} | grep -c "^at") -lt 2 ] || break; sleep 0.05; done
fi
exec {1} "$@" -O0"""


@needs_compiler
def test_two_processes_build_at_once(monkeypatch, tmp_path, empty_cache):
    """Both get the library and use it, on the threads of PyTorch's OpenMP; who comes later finds it in the cache."""
    compiler, calls = script(tmp_path / "c++", TWO.format(tmp_path, shutil.which("c++"))), tmp_path / "calls"
    environment = os.environ | {"CXX": compiler}
    both = [
        subprocess.Popen([sys.executable, "-c", USE], env=environment, stdout=-1, stderr=-1, text=True) for _ in "12"
    ]
    for process in both:
        said, trouble = process.communicate(timeout=600)
        assert process.returncode == 0, trouble
        assert trouble == f"compiling the CPU kernels for {instruction_set()}, once: about a minute\n"
        assert said.count("omp") <= 1, f"more than one OpenMP is loaded: {said}"
    assert [path.suffix for path in empty_cache.iterdir()] == [".so"]
    assert sum(line.startswith("-shared") for line in calls.read_text().splitlines()) == 2
    calls.unlink()
    monkeypatch.setenv("CXX", compiler)
    assert load().teal_decode_step and calls.read_text() == "--version\n"


@needs_compiler
def test_text_is_the_same_without_cpp(tiny, command, tmp_path, monkeypatch):
    model = load_model(tiny)
    ids = torch.randint(model.args.vocab_size, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    calibration = tmp_path / "calibration.safetensors"
    quantiles = measure_quantiles(model, cut_sequences([ids], 256, 256, 0, ()))
    Calibration(quantiles, fingerprint(tiny), {}).save(calibration)
    monkeypatch.delenv("XDG_CACHE_HOME")
    found, said = [], []
    for changes in ({}, {"TEAL_CPU": "torch"}, {"PATH": str(tmp_path)}):
        arguments = ("--checkpoint", tiny, "--sparsity", 0.5, "--calibration", calibration)
        done = command("generate", *arguments, "--temperature", 0, "--max_new_tokens", 20, env=os.environ | changes)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
        said.append([line for line in done.stderr.splitlines() if "plain PyTorch" in line])
    assert found[0] == found[1] == found[2] and len(found[0]) > 60
    assert said[:2] == [[], []] and len(said[2]) == 1 and "no C++ compiler was found" in said[2][0]


def test_unknown_instruction_set_is_one_line(tiny, command):
    arguments = ("--checkpoint", tiny, "--max_new_tokens", 2)
    done = command("generate", *arguments, env=os.environ | {"TEAL_CPU": "sse9"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: TEAL_CPU is 'sse9', which is not known: expected one of ")
    assert done.stderr.endswith("portable, torch\n") and done.stderr.count("\n") == 1
