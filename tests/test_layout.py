"""The house's structure, measured from the code: rooms, arrows between them, sizes (docs/architecture.md)."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from teal_fast.files.paths import ROOT

FLOORS = [  # each room may import only rooms of the floors before its own
    {"kernels", "families"},
    {"weights", "model"},
    {"sparse_model"},
    {"files"},
    {"engine"},
    {"calibration"},
    {"evaluation", "quantization", "server"},
    {"cli"},
    {"scripts"},
    {"generate", "calibrate", "quantize", "eval", "serve", "benchmarks", "report", "integrations"},
    {"__main__", "__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = {"generate", "calibrate", "quantize", "eval", "serve"}
LEFT_OUT = {"tests", "data", "checkpoints", "build", "findings", "docs", "figures"}
MODULE = re.compile(r"teal_fast(\.[A-Za-z_]\w*)+")


def ours(pattern: str) -> list[Path]:
    """Our source files of a pattern, relative to the root; hidden folders, tests and data are left out."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob(pattern))
    return sorted(path for path in found if path.parts[0] not in LEFT_OUT and not path.parts[0].startswith("."))


SOURCES = ours("*.py")


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path, at_top: bool = False) -> set[str]:
    """Modules of ours that a file imports, without `teal_fast.`; a string that is a module's name counts as well."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    known, found = {module_of(source) for source in SOURCES}, set()
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bodies = [node for node in tree.body if not isinstance(node, inner)] if at_top else [tree]
    for node in (node for body in bodies for node in ast.walk(body)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            found.add(node.value)
    return {name.removeprefix("teal_fast.") for name in found if name.startswith("teal_fast.")} & known


def test_the_counting_sees_modules_in_strings_and_at_depth(tmp_path, monkeypatch):
    (tmp_path / "engine" / "deep").mkdir(parents=True)
    (tmp_path / "cli.py").write_text("")
    (tmp_path / "engine" / "deep" / "a.py").write_text('run(["python", "-m", "teal_fast.cli"])\n')
    monkeypatch.setattr("teal_fast.tests.test_layout.ROOT", tmp_path, raising=False)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "SOURCES", ours("*.py"))
    assert imports(Path("engine/deep/a.py")) == {"cli"}


def test_there_are_at_most_23_rooms_and_each_has_its_floor():
    rooms = {room_of(module_of(path)) for path in SOURCES}
    assert len(rooms) <= 23, sorted(rooms)
    assert rooms == set(FLOOR), f"without a floor, or gone: {sorted(rooms ^ set(FLOOR))}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_arrows_point_down(path):
    room = room_of(module_of(path))
    for module in imports(path):
        other = room_of(module)
        assert other == room or FLOOR[other] < FLOOR[room], f"{path} imports {module}, which does not lie below it"
        assert other not in COMMANDS or room == "__main__", f"{path} imports the command {module}"
    inside = imports(path) - imports(path, at_top=True)
    assert path.name == "__init__.py" or not inside, f"{path} imports {sorted(inside)} inside a function or a string"


def test_there_are_no_circles():
    graph = {module_of(path): imports(path) - {module_of(path)} for path in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", [*SOURCES, *ours("*.h"), *ours("*.cpp"), *ours("*.cu")], ids=str)
def test_size(path):
    limit = 150 if path.parts[0] == "kernels" and path.suffix == ".py" else 300
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{path} has {lines} lines: a file holds one idea, in at most {limit}"


def test_rooms_are_no_regular_packages():
    """A folder without __init__.py loses against an installed package of its name, such as Hugging Face's kernels."""
    assert [path for path in SOURCES if path.name == "__init__.py"] == [Path("__init__.py")]
