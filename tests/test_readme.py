"""Runs what README.md and docs/usage.md tell to run, in a copy of the repository, against a local hub.

Blocks marked sh are commands, run in order, README.md's first; blocks marked python are programs. Blocks marked bash
are not run: they take hours, a network, or accounts.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.paths import ROOT
from teal_fast.tests.gguf_models import make_model, write_gguf
from teal_fast.tests.hub import serve
from teal_fast.tests.models import write_llama

README, USAGE, ARCHITECTURE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/usage.md", "docs/architecture.md")
)
MODEL = re.search(r"scripts\.download (\S+)", README)[1]


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page that are marked with a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


COMMANDS = [
    line for text in (README, USAGE) for block in blocks(text, "sh") for line in block.splitlines() if line.strip()
]


@pytest.fixture(scope="module")
def copy(demo, tmp_path_factory) -> Path:
    """The repository's files in a folder of their own; tiny models in the places of the demo and of a GGUF file."""
    folder = tmp_path_factory.mktemp("readme") / "teal-fast"
    ignored = shutil.ignore_patterns("checkpoints", ".venv", ".git", "__pycache__", ".*_cache", "*.egg-info", "build")
    shutil.copytree(ROOT, folder, ignore=ignored)
    hf = write_llama(folder.with_name("hf"), demo, 128, 256, layers=1, positions=2048)
    convert_huggingface(hf, folder / "checkpoints" / "demo", None)
    write_gguf(folder / "model.gguf", make_model(), GGMLQuantizationType.Q8_0)
    return folder


@pytest.fixture(scope="module")
def environment(copy) -> dict[str, str]:
    """The variables of a shell in which the copy is `teal_fast`, and in whose environment all packages are there."""
    links, venv = copy.with_name("links"), copy.with_name("venv")
    links.mkdir()
    (links / "teal_fast").symlink_to(copy, target_is_directory=True)
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"  # for make; a script, since a link would be an interpreter without our packages
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (venv / ".teal-fast-ready").touch()  # newer than requirements.txt: make installs nothing
    return os.environ | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": str(links),
        "VIRTUAL_ENV": str(venv),
        "HF_HOME": str(copy.with_name("hf_home")),
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(copy.with_name("cache")),  # where the GGUF file's checkpoint is made
        "TORCHINDUCTOR_VEC_ISA_OK": "0",  # C++ without vectors builds sooner; tests/engine has it with them
    }


@pytest.fixture(scope="module")
def hub(tiny_hf, tmp_path_factory):
    """The model and the text that the pages download: a tiny model and a text of ours under their names."""
    dataset = tmp_path_factory.mktemp("dataset")
    with zipfile.ZipFile(dataset / "wikitext-2-raw-v1.zip", "w") as archive:
        for split, folder in (("valid", "calibration"), ("test", "evaluation")):
            archive.write(ROOT / "data" / folder / "austen-emma.txt", f"wikitext-2-raw/wiki.{split}.raw")
    with serve({MODEL: tiny_hf, "datasets/ggml-org/ci": dataset}) as url:
        yield url


def run(command: str | list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a shell command, or a list of words, prints to stdout; it must end well."""
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_runs(copy, environment, hub):
    assert len(COMMANDS) > 20
    for command in COMMANDS:
        if "eval.py" in command:
            command += " --windows 2"  # in place of the page's number
        if "serve.py" in command:  # which would go on for ever; tests/test_serve.py has more
            command = f"timeout --signal=TERM --preserve-status 45 {command} --port 0"
        run(command, copy, environment | {"HF_ENDPOINT": hub})


def test_the_library_example_runs(copy, environment):
    # The demo's own calibration ships with the project; the tiny model in its place needs one.
    run("python calibrate.py --checkpoint demo --method uniform --tokens 512", copy, environment)
    (program,) = blocks(README, "python")
    printed = run([sys.executable, "-c", program], copy.parent, environment)
    tokens = [line.split() for line in printed.splitlines()]
    assert len(tokens) in range(1, 41) and all(len(token) == 2 and token[0].isdigit() for token in tokens)
    assert [reason for _, reason in tokens[:-1]] == ["None"] * (len(tokens) - 1)
    assert tokens[-1][1] in ("stop", "length")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160


def test_every_link_leads_somewhere():
    broken = []
    for page in (ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_the_tree_of_rooms_is_the_one_there_is():
    listed = {line.split()[0].rstrip("/") for line in blocks(ARCHITECTURE, "text")[0].splitlines() if line.strip()}
    assert sorted(name for name in listed if not (ROOT / name).exists()) == []
    rooms = {
        path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py") if path.parts[len(ROOT.parts)][0] != "."
    }
    top = {path.name for path in ROOT.glob("*.py")} | rooms - {"build", "checkpoints"}
    assert sorted(top - listed) == [], "docs/architecture.md's tree lacks these"
