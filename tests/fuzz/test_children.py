"""The fuzzer sees what it looks for: every way in which a child may fail, and files that should not be there."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from teal_fast.cli import run
from teal_fast.tests.fuzz.case import contents
from teal_fast.tests.fuzz.children import MEMORY, run_child


def shout(said: str) -> None:
    print(f"error: {said}", file=sys.stderr)  # not through run(), which cuts what is long
    sys.exit(1)


def refuse(said: str) -> None:
    def main() -> None:
        raise ValueError(said)

    run(main)


@pytest.mark.parametrize(
    "work, fault",
    [
        (lambda: None, ""),
        (lambda: sys.exit(2), ""),
        (lambda: refuse("the file\nis no file"), ""),
        (lambda: shout("x" * 2000), "1 lines of error of 2007 characters"),
        (lambda: sys.exit(1), "0 lines of error"),
        (lambda: sys.exit(3), "exit code 3"),
        (lambda: run(lambda: [][0]), "traceback: IndexError"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "signal SIGSEGV"),
        (lambda: bytes(2 * MEMORY), "traceback: MemoryError"),
        (lambda: run(lambda: bytes(2 * MEMORY)), "memory: error: out of memory"),
        (lambda: time.sleep(5), "hangs"),
    ],
)
def test_faults_are_seen(tmp_path, work, fault):
    (folder := tmp_path / "folder").mkdir()
    found = run_child(work, folder, seconds=1).fault
    assert found.startswith(fault) and bool(found) == bool(fault), found


def test_files_are_seen(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_text("1")
    (tmp_path / "loop").symlink_to("loop")
    found = contents(tmp_path)
    assert found["loop"] == "link to loop" and found.keys() == {"folder", "folder/.hidden", "loop"}
    assert contents(tmp_path / "folder" / ".hidden") == {".": found["folder/.hidden"]}
    assert contents(Path("absent")) == {}
