"""Converts a GGUF file (llama.cpp) into a checkpoint folder, dequantizing whatever type its tensors have.

    python -m teal_fast.scripts.convert_gguf model.Q4_K_M.gguf --out checkpoints/model

The dequantized values are the model from here on: they are not the ones its authors published.
"""

import argparse
from pathlib import Path

from teal_fast.cli import run
from teal_fast.files.gguf import ROPE_SCALINGS, convert_gguf
from teal_fast.files.paths import checkpoints_folder, command
from teal_fast.files.pre_tokenizers import SPLITTINGS
from teal_fast.weights.formats import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a .gguf file")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/<name of the file>)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="stored type (default: %(default)s)")
    missing = parser.add_argument_group("what older converters left out; needed only where the command asks for it")
    missing.add_argument("--pre", choices=SPLITTINGS, metavar="NAME", help="how the tokenizer splits text into words")
    missing.add_argument("--rope_scaling", choices=ROPE_SCALINGS, help="llama3: the scaling of Llama 3.1 and later")
    missing.add_argument("--rope_theta", type=float, help="base of the rotary frequencies")
    options = parser.parse_args()
    out = options.out or checkpoints_folder() / options.source.stem
    convert_gguf(
        options.source,
        out,
        DTYPES[options.dtype],
        pre=options.pre,
        rope_scaling=options.rope_scaling,
        rope_theta=options.rope_theta,
    )
    print(f"wrote {out}\nnext: {command('calibrate')} --checkpoint {out}")


if __name__ == "__main__":
    run(main)
