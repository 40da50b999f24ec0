"""Converts a GGUF file (llama.cpp) into a checkpoint folder that keeps the file's own quantized values.

    python -m teal_fast.scripts.convert_gguf model.Q4_K_M.gguf --out checkpoints/model

Types that can be kept: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS. With --dequantize whatever type
its tensors have becomes an ordinary checkpoint of two bytes a weight; its values are not those its authors published.
"""

import argparse
from pathlib import Path

from teal_fast.cli import run
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.gguf_config import ROPE_SCALINGS
from teal_fast.files.paths import checkpoints_folder, command
from teal_fast.files.pre_tokenizers import SPLITTINGS
from teal_fast.weights.formats import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a .gguf file")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/<name of the file>)")
    parser.add_argument("--dequantize", action="store_true", help="store quantized weights in --dtype")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="computation type (default: %(default)s)")
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
        keep=not options.dequantize,
        pre=options.pre,
        rope_scaling=options.rope_scaling,
        rope_theta=options.rope_theta,
    )
    print(f"wrote {out}\nnext: {command('calibrate')} --checkpoint {out}")


if __name__ == "__main__":
    run(main)
