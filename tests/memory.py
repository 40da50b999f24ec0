"""Peak memory of code in a process of its own, above what the same code takes on something tiny."""

import subprocess
import sys

from teal_fast.files.paths import ROOT

SCRIPT = """
from pathlib import Path
import torch
from teal_fast.files import gguf, huggingface
from teal_fast.files.load import load_model

def forward(folder):
    with torch.inference_mode():
        model = load_model(Path(folder))
        cache = model.new_cache(1, 8)
        model(torch.tensor([[1, 2, 3, 4]]), None, cache)
        model(torch.tensor([[5]]), torch.tensor([4]), cache)

def peak():
    # Not getrusage: its ru_maxrss starts with that of the process which started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024

{warm_up}
before = peak()
{code}
print(peak() - before)
"""


def peak_bytes(code: str, warm_up: str) -> int:
    """How far `code` raises the process's peak resident memory (mapped files included) after `warm_up`."""
    script = SCRIPT.format(code=code, warm_up=warm_up)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
