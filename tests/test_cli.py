import argparse
import shutil
import subprocess
import sys

import pytest

from teal_fast import cli
from teal_fast.calibration.make import Settings
from teal_fast.calibration.probe import POINTS
from teal_fast.files.calibration import CALIBRATION, SHIPPED
from teal_fast.files.checkpoint import CONFIG, WEIGHTS
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


def test_what_is_missing_is_made_with_a_word_or_refused(tiny, tmp_path, capfd, monkeypatch):
    usual = cli.make_calibration
    monkeypatch.setattr(cli, "make_calibration", lambda *arguments: usual(*arguments, None, Settings(tokens=2048)))
    folder = shutil.copytree(tiny, tmp_path / "fresh")
    with pytest.raises(FileNotFoundError, match="has no calibration: run"):
        cli.open_calibration(folder, prepare=False)
    made = cli.open_calibration(folder)
    output = capfd.readouterr()
    assert output.out == ""
    assert f"calibrating, once: python calibrate.py --checkpoint {folder} --device cpu\n" in output.err
    assert all(len(points) == POINTS for points in made.curves.values()) and made.origin["corpus"] == "calibration"
    assert cli.open_calibration(folder, prepare=False).curves.keys() == made.curves.keys()
    assert capfd.readouterr().err == ""  # found, not made again


def test_a_missing_demo_is_made_with_a_word_or_refused(tmp_path, monkeypatch, capfd):
    """Only that it is made: what comes of it is tested through the `demo` fixture, which may have come this way."""
    folder, calls = tmp_path / "demo", []
    monkeypatch.setattr("teal_fast.files.checkpoint.demo_folder", lambda: folder)
    monkeypatch.setattr(cli, "demo_folder", lambda: folder)

    def convert(source, out, dtype):
        calls.append((source.suffix, out))
        out.mkdir()
        for name in (CONFIG, WEIGHTS):
            (out / name).write_text("")

    monkeypatch.setattr(cli, "convert_gguf", convert)
    with pytest.raises(FileNotFoundError, match=r"run `python -m teal_fast\.scripts\.prepare_demo`"):
        cli.open_checkpoint("demo", prepare=False)
    assert cli.open_checkpoint("demo") == folder and calls == [(".gguf", folder)]
    assert capfd.readouterr().err.startswith("preparing the demo model, once")


def test_the_demo_comes_with_a_calibration(demo, tmp_path):
    """It is the one that ships with the project, and what calibrate.py finds on the same text now."""
    bare = tmp_path / "demo"
    shutil.copytree(demo, bare, ignore=shutil.ignore_patterns(CALIBRATION))
    shipped = cli.open_calibration(bare, prepare=False)
    assert (shipped.origin["method"], shipped.origin["tokens"]) == ("measured", "16384")
    assert cli.open_calibration(bare, SHIPPED, prepare=False).curves.keys() == shipped.curves.keys()
