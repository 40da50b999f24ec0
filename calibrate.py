"""Finds a model's thresholds for every sparsity by running it over text, and writes them beside its weights.

    python calibrate.py --checkpoint checkpoints/<model> [--method METHOD] [--corpus FILE|DIR …] [--tokens N]

Methods differ in how they distribute a sparsity over the layers; calibration/methods.py describes them. The other
commands call the default one when a calibration is missing.
"""

import argparse
from pathlib import Path

from teal_fast.calibration.hub import fetch, push, repo_id
from teal_fast.calibration.make import DEFAULT_CORPUS, Settings, make_calibration
from teal_fast.calibration.methods import METHODS
from teal_fast.cli import add_model_arguments, open_checkpoint, pick_device, positive_int, run
from teal_fast.files.calibration import CALIBRATION
from teal_fast.files.store import check_writable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--method", choices=METHODS, default=Settings.method, help="see above (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[DEFAULT_CORPUS], help="text files or folders")
    parser.add_argument(
        "--tokens", type=positive_int, default=Settings.tokens, help="tokens to read (default: %(default)s)"
    )
    parser.add_argument(
        "--pass_tokens",
        type=positive_int,
        default=Settings.pass_tokens,
        help="tokens of each pass (default: %(default)s)",
    )
    parser.add_argument(
        "--context", type=positive_int, default=Settings.context, help="longest sequence (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=Settings.seed, help="draws the sequences (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {CALIBRATION} in the checkpoint's folder)")
    parser.add_argument("--push_to_hub", type=repo_id, metavar="REPO", help="share the file that an earlier run wrote")
    parser.add_argument("--results", type=Path, help="eval.py's records (its --out) to show on the shared file's card")
    parser.add_argument("--from_hub", type=repo_id, metavar="REPO", help="fetch a shared file instead of measuring")
    options = parser.parse_args()

    folder = open_checkpoint(options.checkpoint, not options.no_prepare)
    out = options.out or folder / CALIBRATION
    check_writable(out)
    if options.from_hub:
        return fetch(options.from_hub, folder, out)
    if options.push_to_hub:
        return push(options.push_to_hub, folder, out, options.results, pick_device(options.device))
    settings = Settings(
        options.method, tuple(options.corpus), options.tokens, options.pass_tokens, options.context, options.seed
    )
    made = make_calibration(folder, out, pick_device(options.device), options.dtype, settings)
    layers, tokens = len(made.curves), made.origin["tokens"]
    print(f"wrote {out}: thresholds of {layers} layers by the method {options.method} over {tokens} tokens")


if __name__ == "__main__":
    run(main)
