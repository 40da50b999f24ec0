"""What every command here shares: argument types, and errors that end in one line instead of a traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

MAX_SPARSITY = 0.95


def run(main: Callable[[], None]) -> NoReturn:
    """Calls `main` and exits: 0, or 1 with one line on stderr for bad input, or 130 for Ctrl-C."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout went away (`| head`): nothing is left to be said to it
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def sparsity(text: str) -> float:
    """argparse type: a fraction of input channels in [0, 0.95]."""
    return _number(text, 0, MAX_SPARSITY, f"a fraction from 0 (dense) to {MAX_SPARSITY} (0.5 is 50 %)")


def probability(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    return _number(text, 0, 1, "a number from 0 to 1")


def temperature(text: str) -> float:
    """argparse type: a number of at least 0."""
    return _number(text, 0, sys.float_info.max, "a number of at least 0 (0: greedy)")


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _number(text: str, low: float, high: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that loads a model."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="FOLDER|demo", help="a converted checkpoint's folder, or demo"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="computation type (default: the stored one)")
