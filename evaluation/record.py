"""The part of a benchmark record that says where it was measured: run, device, model, format, versions, date.

A record of this clone's benchmarks/results names a commit that holds the code it measured.
"""

import json
import os
import platform
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch

from teal_fast.files.paths import ROOT
from teal_fast.files.store import check_writable, new_file, read_json
from teal_fast.kernels.backend import triton
from teal_fast.kernels.native import instruction_set

RESULTS = "benchmarks/results"  # in a clone
SETTINGS = ("OMP_", "KMP_", "GOMP_", "TEAL_CPU")  # environment variables on which the CPU's speed depends


def describe(model: str, device: torch.device, format: str) -> dict:
    """Fields common to all records of a run of the model called `model`; call it once a run, which names the run.

    On the CPU they have the instruction set of our kernels and the environment's settings of threads.
    """
    on_cpu = {"instruction_set": instruction_set(), "settings": settings()} if device.type == "cpu" else {}
    return {
        "run": uuid.uuid4().hex[:12],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        **on_cpu,
        "model": model,
        "format": format,
        "peer": None,
        "versions": {
            "torch": torch.__version__,
            "triton": getattr(triton, "__version__", None),
            "python": platform.python_version(),
            "commit": commit(),
        },
        "date": date.today().isoformat(),
    }


def settings() -> dict[str, str]:
    """The environment variables that are set of those that OpenMP and our CPU kernels read."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)}


def write_records(path: Path, records: list[dict]) -> None:
    """Writes a list of records as a JSON file, whole or not at all. Raises ValueError as `check_records_path` does."""
    for record in records:
        _check_commit(path, record.get("versions", {}).get("commit"))
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def put_out(records: list[dict], path: Path | None) -> None:
    """Prints records as one JSON line, a program's last, and writes them to a file if there is one to write."""
    print(json.dumps(records))
    if path:
        write_records(path, records)


def check_records_path(path: Path | None) -> None:
    """Raises ValueError when no records can be written to `path`: a command calls it before its work. None passes.

    In this clone's benchmarks/results they must be of a commit: no file outside that folder may differ from it.
    """
    if path is not None:
        check_writable(path)
        _check_commit(path, commit())


def _check_commit(path: Path, commit: str | None) -> None:
    if (commit or "").endswith("+") and path.resolve().is_relative_to(ROOT.resolve() / RESULTS):
        raise ValueError(
            f"{path} takes records of a commit, but files differ from {commit[:-1]}: "
            "commit or stash them first, or write elsewhere"
        )


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The clone's commit, "+" when files that git tracks differ from it, records aside; None outside a clone."""
    if not (ROOT / ".git").exists():  # an installed package may lie in a clone of something else
        return None
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = [*git, "diff", "--quiet", "HEAD", "--", ".", f":(exclude){RESULTS}"]
        differs = subprocess.run(changes, capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if differs else "")


def read_records(path: Path) -> list[dict]:
    """The records of a JSON file that `write_records` wrote. Raises ValueError when it holds no list of them."""
    records = read_json(path, list, "make it again")
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} is no list of records: make it again")
    return records


@contextmanager
def reading_records(*places: Path) -> Iterator[None]:
    """In the block, what breaks on a record of another form than ours, found in one of `places`, is one ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        found = f"{' or '.join(map(str, places))} holds a record of another form ({type(error).__name__}: {error})"
        raise ValueError(f"{found}: remove it, or make it again") from error
