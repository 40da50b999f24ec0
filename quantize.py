"""Writes a quantized copy of a checkpoint: smaller weights, so that fewer bytes are read a token, sparse or not.

    python quantize.py --checkpoint demo --mode int8
    python generate.py --checkpoint checkpoints/demo-int8 --sparsity 0.5

int8 has a scale for every output channel, int4 one for every `--group` outputs of an input channel besides. In int4 the
attention's weights are int8, and the output layer is in both; embeddings and norms stay as they are.

Without `--calibrated` weights are rounded to nearest; with it, so that what layers give on a corpus changes least
(GPTQ: arXiv:2210.17323), for inputs as they are and with half of their channels dropped, and each layer makes up for
the layers before it (GPTAQ: arXiv:2504.02692). One block at a time is held in memory. `--tune` then moves scales for
what the whole model gives, dense and with half of the channels dropped (tuning.py); it holds both models in memory. The
calibration of thresholds is carried over.
"""

import argparse
from pathlib import Path

from teal_fast.calibration.make import DEFAULT_CORPUS
from teal_fast.cli import open_checkpoint, pick_device, positive_int, run
from teal_fast.files.checkpoint import WEIGHTS
from teal_fast.files.paths import checkpoints_folder
from teal_fast.files.store import new_folder
from teal_fast.quantization.calibrated import Calibrated
from teal_fast.quantization.checkpoint import carry_calibration, check_dense, quantize, read_sequences, tune
from teal_fast.quantization.tuning import STEP
from teal_fast.weights.formats import QUANTIZED, Format


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER|demo", help="a converted checkpoint, or demo")
    parser.add_argument("--mode", choices=QUANTIZED, default="int8", help="the weights' format (default: %(default)s)")
    parser.add_argument("--group", type=positive_int, help="outputs a scale in int4 (default: 64)")
    parser.add_argument("--calibrated", action="store_true", help="round for the least change of what layers give")
    parser.add_argument("--tune", action="store_true", help="then move scales for what the whole model gives")
    parser.add_argument("--corpus", type=Path, nargs="+", help="text for these two (default: data/calibration)")
    parser.add_argument(
        "--tokens",
        type=positive_int,
        default=65536,
        help="of the corpus, for --calibrated; --tune takes half of them (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="draws the text (default: %(default)s)")
    parser.add_argument("--device", help="where these two compute: cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="folder to make (default: checkpoints/<name>-<mode>)")
    options = parser.parse_args()
    if not (options.calibrated or options.tune) and options.corpus:
        parser.error("--corpus is text for --calibrated and --tune")
    if options.group and options.mode != "int4":
        parser.error("--group is for --mode int4")

    folder = open_checkpoint(options.checkpoint)
    format = Format(options.mode, (options.group or 64) if options.mode == "int4" else 0)
    check_dense(folder, format)
    out = options.out or checkpoints_folder() / f"{folder.resolve().name}-{options.mode}"
    device = pick_device(options.device)
    with new_folder(out) as made:
        if options.calibrated or options.tune:  # read first: bad text is refused before the work
            sequences = read_sequences(folder, options.corpus or [DEFAULT_CORPUS], options.tokens, options.seed)
        if options.calibrated:
            quantize(folder, made, format, Calibrated(folder, format, sequences, device))
        else:
            quantize(folder, made, format, lambda name, weight: format.within(name).pack(weight))
        if options.tune:
            # Half of each sequence is a step: on 2 cores one takes 8 s for the demo model.
            tune(folder, made, format, [sequence[:STEP] for sequence in sequences], device)
        carry_calibration(folder, made)
    before, after = ((place / WEIGHTS).stat().st_size / 1e6 for place in (folder, out))
    print(f"wrote {out}: {after:.0f} MB instead of {before:.0f} MB")


if __name__ == "__main__":
    run(main)
