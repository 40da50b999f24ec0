"""Measures the most memory that generate.py takes for an answer on the CPU, beyond what importing PyTorch takes.

    python -m teal_fast.benchmarks.memory --checkpoint model.gguf --sparsity 0.4 --out gguf-memory-cpu.json

Both are peaks of resident memory, mapped files included, of processes of their own. What the checkpoint needs besides,
as a GGUF file's values in our order and a calibration, is made before, if need be, by this process. The prompt is the
beginning of the text that ships with the project.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from teal_fast.cli import open_calibration, open_checkpoint, positive_int, run, sparsity
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.files.checkpoint import WEIGHTS
from teal_fast.files.paths import DATA, ROOT
from teal_fast.files.tokenizer import Tokenizer

IMPORTING = "import torch; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


def output(*words: str) -> str:
    """The last line that a Python process prints. Raises ValueError with what it says when it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{words[0]} failed: {done.stderr.strip()}")
    return done.stdout.splitlines()[-1]


def measure(checkpoint: str, fraction: float, tokens: int, new_tokens: int) -> dict:
    """The record of an answer of `new_tokens` to a prompt of about `tokens`."""
    folder = open_checkpoint(checkpoint)
    if fraction:
        open_calibration(folder)
    tokenizer = Tokenizer.load(folder)
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((DATA / "calibration").glob("*.txt")))
    prompt = tokenizer.decode(tokenizer.encode(text, add_bos=False)[:tokens])
    words = ["--checkpoint", checkpoint, "--device", "cpu", "--sparsity", fraction, "--max_new_tokens", new_tokens]
    words += ["--temperature", 0, "--prompt", prompt, "--json"]
    answer = json.loads(output("generate.py", *map(str, words)))
    file = Path(checkpoint) if Path(checkpoint).is_file() else folder / WEIGHTS
    imported, stored = int(output("-c", IMPORTING)) << 10, file.stat().st_size
    return describe(folder.resolve().name, torch.device("cpu"), answer["format"]) | {
        "benchmark": "memory",
        **{name: answer[name] for name in ("sparsity", "prompt_tokens", "new_tokens", "peak_bytes")},
        "import_bytes": imported,
        "file_bytes": stored,
        "of_file": (answer["peak_bytes"] - imported) / stored,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", nargs="+", default=["demo"], help="GGUF files or checkpoints (default: demo)")
    parser.add_argument("--sparsity", type=sparsity, default=0.4, help="nominal (default: %(default)s)")
    parser.add_argument("--tokens", type=positive_int, default=2021, help="of the prompt (default: %(default)s)")
    parser.add_argument("--new_tokens", type=positive_int, default=27, help="decoded (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    records = []
    for checkpoint in options.checkpoint:
        records.append(measure(checkpoint, options.sparsity, options.tokens, options.new_tokens))
        print(f"{records[-1]['model']}: {records[-1]['of_file']:.2f} of the file beyond PyTorch's import", flush=True)
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
