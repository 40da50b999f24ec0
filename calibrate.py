"""Finds a model's thresholds for every sparsity by running it over text, and writes them beside its weights.

    python calibrate.py --checkpoint checkpoints/<model> [--method METHOD] [--corpus FILE|DIR …] [--tokens N] [--quick]

Methods differ in how they distribute a sparsity over the layers; calibration/methods.py describes them. The other
commands call the default one when a calibration is missing.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from teal_fast.calibration.hub import fetch, push, repo_id
from teal_fast.calibration.make import QUICK, Settings, make_calibration
from teal_fast.calibration.methods import METHODS
from teal_fast.cli import add_model_arguments, open_checkpoint, pick_device, positive_int, run
from teal_fast.files.calibration import CALIBRATION
from teal_fast.files.store import check_writable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add_settings_arguments(parser)
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
    settings = settings_of(options)
    made = make_calibration(folder, out, pick_device(options.device), options.dtype, settings)
    layers, tokens = len(made.curves), made.origin["tokens"]
    print(f"wrote {out}: thresholds of {layers} layers by the method {settings.method} over {tokens} tokens")


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each of `Settings`, absent unless given, and --quick, which changes what the absent ones stand for."""

    def add(name: str, help: str, **how: object) -> None:
        usual, quick = (getattr(settings, name) for settings in (Settings(), QUICK))
        both = usual if usual == quick else f"{usual}, with --quick {quick}"
        parser.add_argument(f"--{name}", help=help + (f" (default: {both})" if name != "corpus" else ""), **how)

    parser.add_argument(
        "--quick", action="store_true", help="on less text: up to 3 minutes for 1.5B on 2 cores, for a higher loss"
    )
    add("method", "see above", choices=METHODS)
    add("corpus", "text files or folders", type=Path, nargs="+")
    add("tokens", "tokens to read", type=positive_int)
    add("pass_tokens", "tokens of each pass", type=positive_int)
    add("context", "longest sequence", type=positive_int)
    add("seed", "draws the sequences", type=int)


def settings_of(options: argparse.Namespace) -> Settings:
    """What the flags of `add_settings_arguments` say."""
    given = {field.name: getattr(options, field.name) for field in fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    if "corpus" in given:
        given["corpus"] = tuple(given["corpus"])
    return replace(QUICK if options.quick else Settings(), **given)


if __name__ == "__main__":
    run(main)
