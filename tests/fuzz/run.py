"""Fuzzes the door: mutated checkpoints, GGUF files, tokenizers, calibrations and configs, each in a forked child.

    python -m teal_fast.tests.fuzz.run --cases 500 [--seed 1] [--only 123 …]

Each case gives one line and exit code 1 or 2, or a result: the unmutated source's, transformers' on the same folder,
or, where what was mutated is a value that a sound file may have, one on which two implementations of the step agree. No
case ends in a traceback or by a signal, hangs, takes 2 GB, or leaves files behind. A case is drawn from the seed and
its number alone and can be run again by them. Every 16th goes through a command, the others through the library.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import tqdm

from teal_fast.kernels.native import library
from teal_fast.tests.fuzz.bases import NAMES, make_bases
from teal_fast.tests.fuzz.case import Case
from teal_fast.tests.fuzz.children import run_child
from teal_fast.tests.fuzz.doors import run_door


def prepare(place: Path) -> dict[str, dict]:
    """Makes the sound sources in the folder `place`; their answers by name."""
    ended = run_child(lambda: make_bases(place), place, seconds=300)
    sound = {}
    for name in NAMES if ended.code == 0 else ():
        result = place.with_name(f"{name}.json")
        ended = run_child(lambda: run_door(place / name, place.with_name("out") / name, result), place)  # noqa: B023
        if ended.code:
            break
        sound[name] = json.loads(result.read_text())
    if ended.code:
        sys.exit(f"the unmutated models do not pass, exit code {ended.code}: {ended.err}")
    return sound


def run_cases(numbers: list[int], seed: int, bases: Path, sound: dict[str, dict], records: Path) -> None:
    """Runs cases one after another and writes a line for each; what must not be is said at once."""
    with open(records, "w", encoding="utf-8") as file:
        for number in numbers:
            record = Case(seed, number, bases, records.with_name(f"case-{number}"), sound).run()
            file.write(json.dumps(record) + "\n")
            file.flush()
            if record["fault"]:
                again = f"python -m teal_fast.tests.fuzz.run --seed {seed} --only {number}"
                print(json.dumps(record | {"again": again}, ensure_ascii=False), file=sys.stderr, flush=True)


def spread(numbers: list[int], jobs: int, *rest) -> list[dict]:
    """The records of all cases, run by `jobs` forked processes that take turns over the numbers."""
    place, runners = Path(rest[1]).parent, []
    for job in range(jobs):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_cases(numbers[job::jobs], *rest, place / f"records-{job}.jsonl")
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        runners.append(pid)
    if any([os.waitpid(pid, 0)[1] for pid in runners]):
        sys.exit("the fuzzer itself failed, see above")
    lines = [line for job in range(jobs) for line in (place / f"records-{job}.jsonl").read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda record: record["number"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="how many, numbered from 0 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="draws the mutations (default: %(default)s)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases to run, alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: one a core)")
    parser.add_argument("--out", type=Path, help="write a JSON line for each case to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread
    library()  # compiled once, for all children
    started, numbers = time.perf_counter(), options.only or list(range(options.cases))
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        bases = Path(folder) / "bases"
        bases.mkdir()
        sound = prepare(bases)
        records = spread(numbers, options.jobs, options.seed, bases, sound)
    if options.out:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    faults = [record for record in records if record["fault"]]
    kinds = Counter("fault" if record["fault"] else record["kind"] for record in records)
    commands = sum(record["command"] is not None for record in records)
    print(
        f"{len(records)} cases of seed {options.seed}, {commands} through commands, in "
        f"{time.perf_counter() - started:.0f} s: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
