"""Converts a Hugging Face model folder (safetensors or .bin, sharded or not) into a checkpoint folder.

    python -m teal_fast.scripts.convert_hf_checkpoint checkpoints/hf/HuggingFaceTB--SmolLM2-135M

Shards are memory-mapped and each tensor of the result is written as soon as it is built: memory holds the pages that
are being read and one tensor. `.bin` files are pickles and are read with weights_only=True, which runs no code.
"""

import argparse
from pathlib import Path

from teal_fast.cli import run
from teal_fast.files.calibration import CALIBRATION
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.paths import checkpoints_folder, command
from teal_fast.weights.formats import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with config.json, weights and tokenizer files")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/<name of the source folder>)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the stored weights (default: the source's)")
    options = parser.parse_args()
    out = options.out or checkpoints_folder() / options.source.resolve().name
    convert_huggingface(options.source, out, DTYPES.get(options.dtype))
    print(f"wrote {out}")
    if not (out / CALIBRATION).is_file():
        print(f"next: {command('calibrate')} --checkpoint {out}")


if __name__ == "__main__":
    run(main)
