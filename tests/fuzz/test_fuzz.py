"""The fuzz of the door and the interrupted commands, each in a process of its own (see run.py and interrupt.py).

`make test-fuzz` runs this; `make test` does not. TEAL_FUZZ_CASES is the number of cases, TEAL_FUZZ_SEED draws them.
"""

import os
import subprocess
import sys

from teal_fast.files.paths import ROOT


def run(module: str, *arguments: str) -> None:
    words = [sys.executable, "-m", f"teal_fast.tests.fuzz.{module}", *arguments]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_mutated_files_are_refused_in_a_line_or_serve_as_they_should():
    cases, seed = os.environ.get("TEAL_FUZZ_CASES", "500"), os.environ.get("TEAL_FUZZ_SEED", "1")
    run("run", "--cases", cases, "--seed", seed)


def test_interrupted_commands_leave_nothing_half_written():
    run("interrupt", "--every", "5")
