import argparse
import subprocess
import sys

import pytest

from teal_fast import cli
from teal_fast.files.paths import ROOT


def finish(body: str) -> subprocess.CompletedProcess:
    """Runs `cli.run` on a main made of `body`."""
    code = f"from teal_fast import cli\ndef main():\n    {body}\ncli.run(main)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "body, code, said",
    [
        ("pass", 0, ""),
        ("raise ValueError('got 3,\\n  expected 4')", 1, "error: got 3, expected 4\n"),
        ("open('/nowhere/file')", 1, "error: [Errno 2] No such file or directory: '/nowhere/file'\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise BrokenPipeError", 1, ""),
    ],
)
def test_run_ends_in_one_line(body, code, said):
    done = finish(body)
    assert (done.returncode, done.stderr) == (code, said)


def test_run_does_not_hide_our_own_mistakes():
    assert "Traceback" in finish("raise AssertionError").stderr


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (cli.sparsity, {"0": 0, "0.5": 0.5, "0.95": 0.95}, ["-0.01", "0.96", "nan", "half", ""]),
        (cli.probability, {"0": 0, "1": 1}, ["1.1", "-1", "nan"]),
        (cli.temperature, {"0": 0, "2.5": 2.5}, ["-1", "inf", "nan"]),
        (cli.positive_int, {"1": 1, "20": 20}, ["0", "-3", "1.5", "x"]),
    ],
)
def test_argument_types(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            parse(text)
