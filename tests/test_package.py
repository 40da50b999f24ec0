"""The wheel, what it installs, and the names that an installation or a clone's root takes from others: none."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from teal_fast.files.paths import ROOT

SHIPPED = {".py", ".cpp", ".h", ".cu", ".cuh", ".html", ".safetensors", ".md"}
LLAMA = """
from transformers import LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
import kernels
assert is_kernels_available() and kernels.STAND_IN
"""

FIND = """
import importlib.util, json, sys
found = filter(None, map(importlib.util.find_spec, sys.argv[1:]))
print(json.dumps({spec.name: [spec.origin or "", *(spec.submodule_search_locations or ())] for spec in found}))
"""


def python(*arguments, cwd: Path, path: list[Path], **variables: str) -> subprocess.CompletedProcess:
    """Runs Python in a folder with a search path of its own; its output is text, errors among it."""
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.fixture(scope="module")
def project() -> list[Path]:
    """The project's files, relative to its root."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("only a clone tells which files are the project's")
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(project, tmp_path_factory) -> Path:
    """A wheel of the working tree, built in a copy, where setuptools may leave build/ and *.egg-info."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in project:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, source / file)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = python("-m", "pip", "wheel", *options, "--wheel-dir", out, source, cwd=out, path=[])
    assert done.returncode == 0, done.stdout
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder of packages with nothing but the wheel's content."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_has_all_code_and_data_and_no_tests(project, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    rooms = [file for file in project if file.parts[0] not in ("tests", "docs", "findings")]
    expected = {f"teal_fast/{file.as_posix()}" for file in rooms if file.suffix in SHIPPED or file.parts[0] == "data"}
    assert expected - names == set(), "name their folders in pyproject.toml's packages"
    assert {name for name in names if Path(name).suffix in SHIPPED} == {
        name for name in expected if Path(name).suffix in SHIPPED
    }
    for name in (
        "kernels/csrc/vec.h",
        "report/report.html",
        "data/demo-calibration.safetensors",
        "scripts/download.py",
    ):
        assert f"teal_fast/{name}" in expected  # what is compared above is not empty
    tops = {name.split("/")[0] for name in names}
    assert {top.partition("-")[0] for top in tops} == {"teal_fast"} and len(tops) == 2  # the package, its dist-info


def test_the_wheel_installs_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert archive.read(name).decode().split("\n")[:2] == ["[console_scripts]", "teal-fast = teal_fast.__main__:main"]


def test_it_runs_where_it_is_installed(site, tmp_path):
    done = python("-m", "teal_fast", "--help", cwd=tmp_path, path=[site])
    assert done.returncode == 0, done.stdout
    assert {"generate", "calibrate", "quantize", "eval"} <= {line.split()[0] for line in done.stdout.split("\n")[2:-1]}
    done = python("-m", "teal_fast.scripts.download", "--help", cwd=tmp_path, path=[site])
    assert done.returncode == 0 and "usage: download.py" in done.stdout and "REPO_ID" in done.stdout


def test_outside_a_clone_the_demo_lies_in_the_cache(site, tmp_path):
    program = "import teal_fast.files.paths as p; print(p.ROOT, p.demo_folder(), (p.DATA / 'calibration').is_dir())"
    done = python("-c", program, cwd=tmp_path, path=[site], XDG_CACHE_HOME=str(tmp_path / "cache"))
    demo = tmp_path / "cache" / "teal-fast" / "checkpoints" / "demo"
    assert done.stdout.split() == [str(site / "teal_fast"), str(demo), "True"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("installed", ["from the wheel", "in this environment"])
def test_an_installation_takes_no_general_name(installed, project, site, tmp_path):
    names = sorted({file.parts[0].removesuffix(".py") for file in project} | {"tests"})
    names = [name for name in names if name.isidentifier() and name not in ("__init__", "__main__")]
    assert {"kernels", "model", "eval", "cli", "generate", "weights", "files", "report", "scripts"} <= set(names)
    done = python("-c", FIND, "teal_fast", *names, cwd=tmp_path, path=[site] if installed == "from the wheel" else [])
    assert done.returncode == 0, done.stdout
    places = json.loads(done.stdout)
    if "teal_fast" not in places:
        pytest.skip("this environment finds the project by PYTHONPATH alone")
    package = Path(places.pop("teal_fast")[0]).parent
    assert (package == site / "teal_fast") == (installed == "from the wheel")
    ours = {folder / file for folder in (site, package) for name in names for file in (name, f"{name}.py")}
    assert {name: found for name, found in places.items() if ours & set(map(Path, found))} == {}


def named_imports(file: Path, package: str) -> list[str]:
    """What a file imports by name from a package."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    found = [node.names for node in nodes if isinstance(node, ast.ImportFrom) and node.module == package]
    return sorted({alias.name for names in found for alias in names})


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A folder of packages with one called `kernels`, of a version and with the names that transformers asks for.

    Each name is a class that gives back what it decorates, whatever it is called with.
    """
    folder = tmp_path_factory.mktemp("packages")
    names = named_imports(Path(hub_kernels.__file__), "kernels")
    assert "use_kernel_forward_from_hub" in names
    classes = [f"class {name}:\n    __new__ = lambda *_, **options: lambda decorated: decorated\n" for name in names]
    about = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    for path in (folder / "kernels", about):
        path.mkdir()
    (folder / "kernels" / "__init__.py").write_text("STAND_IN = True\n" + "".join(classes))
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    """The folder teal_fast with links to what lies in the clone's root; it has kernels/ and tests/ of its own."""
    folder = tmp_path / "links" / "teal_fast"
    for room in ("kernels", "tests"):
        (folder / room).mkdir(parents=True)
    for path in (*ROOT.iterdir(), *ROOT.glob("kernels/*"), *ROOT.glob("tests/*.py")):
        place = folder / path.relative_to(ROOT)
        if not place.exists() and path.name not in (".git", "__pycache__") and "test_" not in path.name:
            place.symlink_to(path)
    return folder


def import_llama(way: str, root: Path, stand_in: Path) -> subprocess.CompletedProcess:
    """Imports transformers' Llama model in the root: by a file that lies there, by -c, or in a test."""
    (root / "llama.py").write_text(LLAMA)
    (root / "tests" / "test_llama.py").write_text("def test_llama():" + LLAMA.replace("\n", "\n    "))
    words = {"file": ["llama.py"], "-c": ["-c", LLAMA], "pytest": ["-m", "pytest"]}[way]
    return python(*words, cwd=root, path=[stand_in, root.parent])


@pytest.mark.parametrize("way", ["file", "-c", "pytest"])
def test_a_package_called_kernels_wins_over_our_folder(way, root, stand_in):
    done = import_llama(way, root, stand_in)
    assert done.returncode == 0, done.stdout
    assert way != "pytest" or "1 passed" in done.stdout


def test_our_folder_would_win_if_it_had_an_init_file(root, stand_in):
    (root / "kernels" / "__init__.py").touch()
    done = import_llama("file", root, stand_in)
    assert done.returncode != 0 and f"from 'kernels' ({root / 'kernels'}" in done.stdout, done.stdout
