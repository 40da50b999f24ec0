"""Times decoding in two checkouts by turns, each time in a process of its own: whether a change has cost speed.

    python -m teal_fast.benchmarks.alternate ../before --rounds 9 -- --checkpoint demo --device cpu --sparsity 0 0.5

What comes after `--` are arguments of benchmarks.decode. The other checkout runs with its own code and checkpoints, by
`-m teal_fast.benchmarks.decode` or, from before the root was a package, `-m benchmarks.decode`. A round is one process
of each; the record holds each round's ratio of this checkout's tokens/s to the other's, and their median.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from teal_fast.cli import positive_int, run
from teal_fast.evaluation.record import check_records_path, put_out
from teal_fast.files.paths import IN_A_CLONE, ROOT
from teal_fast.files.store import parse_json

DECODE = "teal_fast.benchmarks.decode"
FIELDS = ("model", "format", "sparsity", "prompt_tokens")  # what rows of both checkouts are matched by


def decode(root: Path, links: Path, arguments: list[str]) -> list[dict]:
    """The records of benchmarks.decode in the checkout `root`, in which it runs; links: where to make it importable."""
    package = (root / "pyproject.toml").is_file() and "teal_fast" in (root / "pyproject.toml").read_text("utf-8")
    links.mkdir(exist_ok=True)
    if package and not (links / "teal_fast").exists():
        (links / "teal_fast").symlink_to(root, target_is_directory=True)
    path = os.pathsep.join(filter(None, (str(links if package else root), os.environ.get("PYTHONPATH"))))
    module = DECODE if package else DECODE.removeprefix("teal_fast.")
    words = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(words, cwd=root, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise ValueError(f"{module} failed in {root}, see above")
    lines = done.stdout.decode().splitlines() or [""]
    return parse_json(lines[-1], f"the last line of {module} in {root}", list)


def compare(rounds: list[tuple[list[dict], list[dict]]]) -> list[dict]:
    """One record a row: tokens/s before and after in each round, their ratios and the median of these."""
    records = []
    for place, row in enumerate(rounds[0][1]):
        pairs = [(before[place], after[place]) for before, after in rounds]
        if any(b[name] != row[name] or a[name] != row[name] for b, a in pairs for name in FIELDS):
            raise ValueError("the two checkouts timed different rows: give arguments that mean the same in both")
        before, after = ([one["tokens_per_s"] for one in side] for side in zip(*pairs, strict=True))
        ratios = [a / b for b, a in zip(before, after, strict=True)]
        found = {"tokens_per_s_before": before, "tokens_per_s": after, "ratios": ratios}
        records.append({name: row[name] for name in FIELDS} | found | {"ratio": statistics.median(ratios)})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="folder of the other checkout, such as a git worktree")
    parser.add_argument("--before_commit", help="its commit, where git is not there to say")
    parser.add_argument("--rounds", type=positive_int, default=9, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    if "--" not in sys.argv:
        parser.error("give -- and then arguments of benchmarks.decode, such as -- --checkpoint demo")
    cut = sys.argv.index("--")
    arguments, options = sys.argv[cut + 1 :], parser.parse_args(sys.argv[1:cut])
    check_records_path(options.out)
    if not IN_A_CLONE:
        raise ValueError("it compares two checkouts: run it in a clone of this project")
    before = options.before.resolve()
    if not (before / "benchmarks" / "decode.py").is_file():
        raise FileNotFoundError(f"{before} has no benchmarks/decode.py: expected another checkout of this project")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            sides = [decode(root, Path(folder, name), arguments) for name, root in (("b", before), ("a", ROOT))]
            rounds.append(tuple(sides))
            print(f"round {number + 1}:", *(f"{r['ratio']:.3f}" for r in compare(rounds[-1:])), flush=True)
    of_machine = ("device", "threads", "instruction_set", "settings", "versions", "date", "run")
    about = {name: value for name, value in rounds[0][1][0].items() if name in of_machine}
    about |= {"benchmark": "alternate", "peer": None}
    about["commit_before"] = options.before_commit or rounds[0][0][0]["versions"]["commit"]
    records = [about | record for record in compare(rounds)]
    for record in records:
        print(
            f"{record['sparsity']:.0%} after {record['prompt_tokens']}: {record['ratio']:.4f} times as fast as before"
        )
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
