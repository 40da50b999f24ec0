"""Runs every command of README.md, in order, in a copy of the repository, against a local hub that speaks its API."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.paths import ROOT
from teal_fast.tests.gguf_models import make_model, write_gguf
from teal_fast.tests.hub import serve
from teal_fast.tests.models import write_llama

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S) for line in block.splitlines() if line.strip()
]
MODEL = re.search(r"scripts\.download (\S+)", README)[1]


@pytest.fixture(scope="module")
def copy(demo, tmp_path_factory) -> Path:
    """The repository's files in a folder of their own; tiny models in the places of the demo and of a GGUF file."""
    folder = tmp_path_factory.mktemp("readme") / "teal-fast"
    ignored = shutil.ignore_patterns("checkpoints", ".venv", ".git", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    hf = write_llama(folder.with_name("hf"), demo, 128, 256, layers=1, positions=2048)
    convert_huggingface(hf, folder / "checkpoints" / "demo", None)
    write_gguf(folder / "model.gguf", make_model())
    return folder


@pytest.fixture(scope="module")
def hub(tiny_hf, tmp_path_factory):
    """The model and the text that the README downloads: a tiny model and a text of ours under their names."""
    dataset = tmp_path_factory.mktemp("dataset")
    with zipfile.ZipFile(dataset / "wikitext-2-raw-v1.zip", "w") as archive:
        for split, folder in (("valid", "calibration"), ("test", "evaluation")):
            archive.write(ROOT / "data" / folder / "austen-emma.txt", f"wikitext-2-raw/wiki.{split}.raw")
    with serve({MODEL: tiny_hf, "datasets/ggml-org/ci": dataset}) as url:
        yield url


def test_every_command_runs(copy, hub, tmp_path):
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {
        "PATH": path,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
        "VIRTUAL_ENV": sys.prefix,
        "TORCHINDUCTOR_VEC_ISA_OK": "0",  # C++ without vectors builds sooner; tests/test_decode.py has it with them
    }
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        if "eval.py" in command:
            command += " --windows 2"  # in place of the README's number
        done = subprocess.run(
            command, shell=True, cwd=copy, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_file_of_the_tree_is_there():
    tree = re.search(r"```text\n(generate\.py.*?)```", README, flags=re.S)[1]
    names = [line.split()[0] for line in tree.splitlines() if line.strip()]
    missing = [name for name in names if not (ROOT / name).exists()]
    assert missing == []
    listed = {name.rstrip("/") for name in names}
    top = {path.name for path in ROOT.glob("*.py")} | {"kernels", "scripts", "benchmarks", "tests", "data"}
    assert top <= listed, f"the README's tree lacks {sorted(top - listed)}"
