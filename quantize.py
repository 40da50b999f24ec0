"""Writes a quantized copy of a checkpoint, in int8, int4 or types of GGUF files: a token then reads fewer bytes.

    python quantize.py --checkpoint demo --mode int8
    python generate.py --checkpoint checkpoints/demo-int8 --sparsity 0.5

int8 has a scale for each output channel. int4 has, in addition, a row scale for every `--group` outputs of each input
channel; its attention weights are int8. The output layer is int8 in both; embeddings and norms stay as they are. In
output8 nothing but the output layer is quantized, which every token reads whole. q4_k, q5_k, q6_k and q8_0 are
mixtures of llama.cpp's block types, embeddings and output layer among them (quantization/mixtures.py), and lie as a
GGUF file's own values do: they are made for CPUs.

By default weights are rounded to nearest. `--calibrated` rounds them with GPTQ (arXiv:2210.17323) on a corpus, for
dense inputs and for inputs with half of their channels dropped, and lets each layer compensate for the errors of the
layers before it (GPTAQ, arXiv:2504.02692); one block at a time is in memory. `--tune` then trains the scales on the
whole model's logits (EfficientQAT, arXiv:2407.11062), with both models in memory. The thresholds' calibration is copied
over; `--calibrated` and `--tune` need one and make it when it is missing.
"""

import argparse
import sys
from pathlib import Path

from teal_fast.calibration.make import DEFAULT_CORPUS
from teal_fast.cli import add_prepare_argument, open_calibration, open_checkpoint, pick_device, positive_int, run
from teal_fast.files.checkpoint import ROUNDED, WEIGHTS, rounded_to
from teal_fast.files.paths import checkpoints_folder
from teal_fast.files.store import check_new, new_folder, short
from teal_fast.quantization.checkpoint import (
    FULL_PRECISION,
    ROUNDING_LENGTH,
    ROUNDING_TOKENS,
    TUNING_LENGTH,
    TUNING_TOKENS,
    Fit,
    choose_format,
    make_quantized,
    read_sequences,
)
from teal_fast.quantization.mixtures import MIXTURES
from teal_fast.weights.formats import FORMATS, OUTPUT8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER|demo", help="a converted checkpoint, or demo")
    parser.add_argument(
        "--mode", choices=[*FORMATS, *MIXTURES], default="int8", help="the weights' format (default: %(default)s)"
    )
    parser.add_argument("--group", type=positive_int, help="outputs that share a row scale in int4 (default: 64)")
    parser.add_argument("--calibrated", action="store_true", help="round with GPTQ instead of to nearest")
    parser.add_argument("--tune", action="store_true", help="then train the scales on the whole model's logits")
    parser.add_argument("--corpus", type=Path, nargs="+", help="text for these two (default: data/calibration)")
    parser.add_argument(
        "--tokens",
        type=positive_int,
        help=f"tokens of the corpus (default: {ROUNDING_TOKENS} for --calibrated and {TUNING_TOKENS} for --tune, which "
        "uses half of them)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="draws the text (default: %(default)s)")
    parser.add_argument("--device", help="where these two compute: cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/<name>-<mode>)")
    add_prepare_argument(parser)
    options = parser.parse_args()
    if not (options.calibrated or options.tune) and options.corpus:
        parser.error("--corpus is text for --calibrated and --tune")
    if options.mode == OUTPUT8 and (options.calibrated or options.tune):
        parser.error("--mode output8 rounds the output layer alone, to nearest: leave --calibrated and --tune out")
    if options.group and options.mode != "int4":
        parser.error("--group is for --mode int4")
    return options


def main() -> None:
    options = parse_arguments()
    if Path(options.checkpoint).is_file():
        raise ValueError(f"{options.checkpoint} is a file with values of its own: {FULL_PRECISION}")
    folder = open_checkpoint(options.checkpoint, not options.no_prepare)
    out = options.out or checkpoints_folder() / f"{folder.resolve().name}-{options.mode}"
    check_new(out)
    format, note = choose_format(folder, options.mode, options.group)
    if note:
        print(note, file=sys.stderr)
    if before := rounded_to(folder / WEIGHTS).get(ROUNDED):
        print(f"these weights were rounded to {short(before)} before: what this loses comes on top", file=sys.stderr)
    device = pick_device(options.device)
    with new_folder(out) as made:
        fit = None
        if options.calibrated or options.tune:

            def read(wanted: bool, tokens: int, length: int) -> list[list[int]]:
                corpus = options.corpus or [DEFAULT_CORPUS]
                return read_sequences(folder, corpus, options.tokens or tokens, length, options.seed) if wanted else []

            # The text is read before anything is computed, so that bad text is refused at once.
            rounding = read(options.calibrated, ROUNDING_TOKENS, ROUNDING_LENGTH)
            tuning = read(options.tune, TUNING_TOKENS, TUNING_LENGTH)
            calibration = open_calibration(folder, None, device, not options.no_prepare)
            fit = Fit(calibration, device, rounding, tuning)
        make_quantized(folder, made, format, fit)
    before, after = ((place / WEIGHTS).stat().st_size / 1e6 for place in (folder, out))
    print(f"wrote {out}: {after:.0f} MB instead of {before:.0f} MB")


if __name__ == "__main__":
    run(main)
