"""The part of a benchmark record that says where it was measured: run, device, model, format, versions, date."""

import json
import platform
import subprocess
import uuid
from datetime import date
from pathlib import Path

import torch

from teal_fast.files.paths import ROOT
from teal_fast.files.store import new_file
from teal_fast.kernels.backend import triton


def describe(model: str, device: torch.device, format: str) -> dict:
    """Fields common to all records of a run of the model called `model`; call it once a run, which names the run."""
    return {
        "run": uuid.uuid4().hex[:12],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
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


def write_records(path: Path, records: list[dict]) -> None:
    """Writes a list of records as a JSON file, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checked-out commit, "+" when files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
