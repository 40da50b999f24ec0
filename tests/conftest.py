"""Shared fixtures: the demo model as the product prepares it, and a tiny random model that transformers wrote."""

import fcntl
import os

from teal_fast.files.paths import ROOT

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin make tests 20x slower on a busy machine

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on the CPU, slowly

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from teal_fast import cli
from teal_fast.calibration.make import Settings, make_calibration
from teal_fast.files.calibration import CALIBRATION
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.tests.models import write_llama


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo checkpoint's folder, prepared as a user's first `--checkpoint demo` prepares it."""
    with open(ROOT / "pyproject.toml") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one prepares it
        return cli.open_checkpoint("demo")


@pytest.fixture(scope="session")
def tiny_hf(demo, tmp_path_factory) -> Path:
    """A tiny model of sizes that divide badly, as Hugging Face has it."""
    return write_llama(tmp_path_factory.mktemp("tiny_hf"), demo, 64, 172)


@pytest.fixture(scope="session")
def tiny(tiny_hf, tmp_path_factory) -> Path:
    """The same model as a checkpoint folder of ours. Shared by tests: copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    convert_huggingface(tiny_hf, folder, None)
    return folder


@pytest.fixture(scope="session")
def calibrated(tiny, tmp_path_factory) -> Path:
    """The same with a calibration on little text. Shared by tests: copy it before changing it."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("calibrated") / "tiny")
    settings = Settings(tokens=2000, pass_tokens=1000, context=128)
    make_calibration(folder, folder / CALIBRATION, torch.device("cpu"), None, settings)
    return folder


@pytest.fixture(scope="session")
def even(demo, tmp_path_factory) -> Path:
    """A tiny checkpoint whose layers have outputs in groups of 64, as int4 wants them. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("even") / "even"
    convert_huggingface(write_llama(folder.with_name("hf"), demo, 128, 256), folder, None)
    return folder


@pytest.fixture(scope="session")
def command():
    """Runs `python -m teal_fast.module arguments…` from the repository's root; its output is text."""

    def run(module: str, *arguments, **options) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", f"teal_fast.{module}", *map(str, arguments)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, **options)

    return run


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a command in this process, which saves the seconds that importing takes: exit code, stdout, stderr."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [Path(main.__code__.co_filename).name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def little_calibration(monkeypatch):
    """A calibration that a command makes for itself, because there is none, takes little text."""
    settings, usual = Settings(tokens=1024, pass_tokens=1024, context=256), cli.make_calibration
    monkeypatch.setattr(cli, "make_calibration", lambda *arguments: usual(*arguments[:3], None, settings))
