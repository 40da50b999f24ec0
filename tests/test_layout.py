"""Imports point one way: each file may import only files of a lower rank."""

import ast
from pathlib import Path

import pytest

from teal_fast.files.paths import ROOT

OPS = (
    "compact_gemv",
    "decode_attention",
    "gate_up",
    "merge_attention",
    "norm_compact",
    "output_gemv",
    "quantized_gemm",
    "sparse_gemv",
    "widen",
)
RANKS = [
    {"kernels.backend", "kernels.native", "kernels.int4"},
    {"kernels.rows", "kernels.fixed_point", "kernels.arrivals"},
    {"kernels.walk"},
    {f"kernels.{op}" for op in OPS} | {"rounding", "model", "chat", "cli", "corpus", "sampling"},
    {"tokenizer", "weights"},
    {"checkpoint"},
    {"sparse_model", "record"},
    {"cpu_step", "tasks", "pruning", "sharing", "allocation", "probe", "blockwise"},
    {"decode"},
    {"generate", "calibrate", "eval", "tuning"},
    {"quantize"},
    {"scripts"},
    {"benchmarks"},
    {"tests"},
]
FILES = sorted(
    path.relative_to(ROOT)
    for folder in (".", "kernels", "scripts", "benchmarks", "tests")
    for path in ROOT.glob(f"{folder}/*.py")
)


def rank(module: str) -> int | None:
    """Position in RANKS of the module or of the folder it lies in; None when it is not ours."""
    for position, names in enumerate(RANKS):
        if module in names or module.split(".")[0] in names:
            return position
    return None


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules that a file imports, each with whether the import stands inside a function."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, id(node) in inside))
    return found


def name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    if path.name == "__init__.py":
        assert imports(path) == []
        return
    own = rank(name(path))
    assert own is not None, f"{path} has no rank: add it to RANKS"
    for module, inside in imports(path):
        theirs = rank(module)
        if theirs is None:
            continue
        assert not inside, f"{path} imports {module} inside a function"
        same_folder = own == theirs and module.split(".")[0] == name(path).split(".")[0] and len(path.parts) > 1
        assert theirs < own or same_folder, f"{path} imports {module}, which does not lie below it"


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "tests"], ids=str)
def test_size(path):
    limit = 150 if path.parts[0] == "kernels" else 300
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= 1.2 * limit, f"{path} has {lines} lines: a file holds one idea in about {limit}"
