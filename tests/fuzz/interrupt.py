"""Ends commands by SIGTERM and SIGKILL wherever they touch a file, and looks at what they leave.

    python -m teal_fast.tests.fuzz.interrupt [--every 1]

Python tells of every file that is opened for writing, renamed, removed or made (sys.addaudithook), and tqdm of every
tensor that is written and every pass that ends. A child that counts these moments ends itself at one of them. What is
then there is the whole output or none, nothing half-written is taken for whole, and the next run of the same command
makes the same output as an undisturbed one, with no hidden file left beside it.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tqdm

from teal_fast import calibrate, quantize
from teal_fast.cli import run
from teal_fast.kernels.native import library
from teal_fast.scripts import convert_gguf, convert_hf_checkpoint
from teal_fast.tests.fuzz.bases import make_bases
from teal_fast.tests.fuzz.case import contents
from teal_fast.tests.fuzz.children import Ended, run_child
from teal_fast.tests.fuzz.doors import run_command

FILES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "shutil.rmtree", "os.truncate")
MOMENT = "teal_fast.moment"  # our own event: a tensor or a pass


def commands(bases: Path, out: Path) -> dict[str, tuple[Callable[[], None], list]]:
    """The commands that write, small: `main` and its arguments, by what they do."""
    text = ["--corpus", bases / "corpus.txt", "--tokens", 128, "--out", out]
    own = ["--checkpoint", bases / "own-dense"]
    return {
        "convert a file": (convert_gguf.main, [bases / "gguf-llama" / "model.gguf", "--out", out]),
        "convert a folder": (convert_hf_checkpoint.main, [bases / "hf-qwen2", "--out", out]),
        "calibrate": (calibrate.main, [*own, *text, "--context", 64, "--pass_tokens", 64, "--method", "uniform"]),
        "quantize": (quantize.main, [*own, "--mode", "int4", "--group", 64, "--tune", *text, "--no_prepare"]),
    }


def watch(place: Path, moment: int | None, number: signal.Signals, seen: list[str]) -> None:
    """Counts, in this process, the moments at which something below `place` changes; ends it at the one asked for."""
    iterate = tqdm.tqdm.__iter__

    def tell(self):
        for item in iterate(self):
            sys.audit(MOMENT, str(place))
            yield item

    def count(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in FILES or event == MOMENT) and str(arguments[0]).startswith(str(place)):
            seen.append(event)
            if len(seen) - 1 == moment:
                os.kill(os.getpid(), number)

    tqdm.tqdm.__iter__ = tell
    sys.addaudithook(count)


def run_once(main: Callable, arguments: list, place: Path, moment: int | None = None, number=signal.SIGKILL) -> Ended:
    """The command in a child, ended at a moment if one is given; its last line of output counts the moments."""

    def work() -> None:
        seen: list[str] = []
        watch(place, moment, number, seen)
        try:
            run(lambda: run_command(main, [str(argument) for argument in arguments]))
        finally:
            print(len(seen), flush=True)

    return run_child(work, place)


def look(main: Callable, arguments: list, place: Path, sound: dict[str, str], moment: int, number: int) -> str:
    """What must not be after an interruption and the next run; nothing where all is well."""
    out = place / "out"
    ended = run_once(main, arguments, place, moment, number)
    if ended.code == 0 and contents(out) == sound:  # it was done already
        return ""
    if ended.code not in (-number, 128 + number, 130):
        return f"ends by {ended.code} instead: {ended.err[-300:]}"
    whole = out.exists()
    if whole and contents(out) != sound:
        return f"half an output: {sorted(contents(out))} of {sorted(sound)}"
    for rest in place.glob(".*"):
        os.utime(rest, (0, 0))  # the next run spares what another process may have made this second
    again = run_once(main, arguments, place)
    if again.code and not (whole and "exists already" in again.err):
        return f"the next run ends by {again.code}: {again.err[-300:]}"
    if contents(out) != sound:
        return "the next run writes something else"
    rest = sorted(path.name for path in place.iterdir() if path != out)
    return f"left behind after the next run: {', '.join(rest)}" if rest else ""


def interrupt(name: str, bases: Path, place: Path, every: int) -> list[str]:
    """The faults of one command, a line each."""
    out, faults, runs = place / "out", [], 0
    main, arguments = commands(bases, out)[name]
    place.mkdir()
    ended = run_once(main, arguments, place)
    if ended.code:
        return [f"{name} fails undisturbed: {ended.err}"]
    sound, moments = contents(out), int(ended.out.splitlines()[-1])
    for moment in range(moments):
        for number in (signal.SIGKILL, signal.SIGTERM):
            if (2 * moment + (number == signal.SIGTERM)) % every:
                continue
            shutil.rmtree(place)
            place.mkdir()
            runs += 1
            if fault := look(main, arguments, place, sound, moment, number):
                faults.append(f"{name}, {signal.Signals(number).name} at moment {moment} of {moments}: {fault}")
    print(f"{name}: {runs} interruptions at {moments} moments, {len(faults)} faults", flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every so many-th interruption (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0
    library()
    started, faults = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="interrupt") as folder:
        bases = Path(folder) / "bases"
        bases.mkdir()
        ended = run_child(lambda: make_bases(bases), bases, seconds=300)
        if ended.code:
            sys.exit(f"the unmutated models do not pass: {ended.err}")
        for number, name in enumerate(commands(bases, bases)):
            faults += interrupt(name, bases, Path(folder) / f"place-{number}", options.every)
    print("\n".join(faults) or f"no faults in {time.perf_counter() - started:.0f} s")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
