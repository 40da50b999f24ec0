"""Opens an engine for programs: `engine, tokenizer = load("demo")`."""

from pathlib import Path

from teal_fast.engine.device import find_device
from teal_fast.engine.engine import DEFAULT_CONTEXT, Engine
from teal_fast.engine.fixed_text import with_fixed_text
from teal_fast.files.calibration import find_calibration
from teal_fast.files.checkpoint import find_checkpoint
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.weights.formats import DTYPES


def load(
    checkpoint: str | Path,
    device: str | None = None,
    dtype: str | None = None,
    context: int = DEFAULT_CONTEXT,
    calibration: Path | None = None,
) -> tuple[Engine, Tokenizer]:
    """An engine over a converted checkpoint's folder, or "demo", and its tokenizer.

    device: cpu, cuda or cuda:N, by default CUDA where there is one. dtype: bf16, fp16 or fp32, by default the stored
    one. context: the most tokens of a prompt with its answer; the model's own limit holds besides. calibration: a file,
    by default the checkpoint's own; without one the engine serves sparsity 0. Nothing is downloaded or calibrated:
    FileNotFoundError and ValueError say what to run.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not known, expected one of {', '.join(DTYPES)}")
    if context < 1:
        raise ValueError(f"context {context}: expected at least 1 token")
    folder, where = find_checkpoint(str(checkpoint)), find_device(device)
    tokenizer = Tokenizer.load(folder)
    found = find_calibration(folder, calibration)
    model = with_fixed_text(load_model(folder, where, DTYPES.get(dtype)), folder, tokenizer)
    return Engine(model, found, tokenizer.eos_ids, context), tokenizer
