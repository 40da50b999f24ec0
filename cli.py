"""What every command here shares: argument types, and errors that end in one line instead of a traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

MAX_SPARSITY = 0.95
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(main: Callable[[], None]) -> NoReturn:
    """Calls `main` and exits: 0, or 1 with one line on stderr for bad input, or 130 for Ctrl-C."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout went away (`| head`): not our error, nothing left to say
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def sparsity(text: str) -> float:
    """argparse type: a fraction of input channels in [0, 0.95]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_SPARSITY:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a fraction from 0 (dense) to {MAX_SPARSITY}")
    return value


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def device(text: str) -> torch.device:
    """argparse type: a device that is there."""
    try:
        value = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu, cuda or cuda:N") from None
    if value.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("got cuda, but this torch sees no CUDA device: use --device cpu")
    if value.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu, cuda or cuda:N")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that loads a model."""
    parser.add_argument("--checkpoint", required=True, help="a converted checkpoint's folder, or demo")
    parser.add_argument("--device", type=device, default=default_device(), help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="computation type (default: the checkpoint's)")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
