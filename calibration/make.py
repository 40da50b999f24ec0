"""Makes the calibration of a checkpoint: reads the text, runs a method, writes the file.

calibrate.py calls it, and so does every command that finds a calibration missing. The methods are in methods.py.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from teal_fast.calibration.corpus import encode_corpus
from teal_fast.calibration.methods import fit_curves
from teal_fast.calibration.passes import Journal, Passes, cut_sequences
from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION_VERSION, Calibration
from teal_fast.files.checkpoint import fingerprint, read_config
from teal_fast.files.load import load_model
from teal_fast.files.memory import memory_for
from teal_fast.files.paths import DATA
from teal_fast.files.store import check_writable
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.weights.formats import DTYPES

DEFAULT_CORPUS = DATA / "calibration"


@dataclass(frozen=True)
class Settings:
    """How a calibration is made: by which method of methods.py, on which text, on how many tokens in which pieces."""

    method: str = "measured"
    corpus: tuple[Path, ...] = (DEFAULT_CORPUS,)
    tokens: int = 16384
    pass_tokens: int = 4096  # tokens of each pass over the text
    context: int = 1024  # longest sequence
    seed: int = 1234  # draws the sequences


# For who wants to start soon; docs/usage.md says what it loses beside the above, docs/quality_log.md what was tried.
QUICK = Settings("global", tokens=7 * 1024, pass_tokens=1024, context=256)


def make_calibration(
    folder: Path, out: Path, device: torch.device, dtype: str | None = None, settings: Settings | None = None
) -> Calibration:
    """Calibrates the checkpoint in `folder` and writes the calibration to `out`.

    dtype: bf16, fp16, fp32, or None for the stored one. Finished passes are kept in a file beside `out`, from which an
    interrupted run resumes. Raises ValueError when the text is too short, or where `out` can't be written, at once.
    """
    check_writable(out)
    settings = settings or Settings()
    tokenizer = Tokenizer.load(folder)
    documents = encode_corpus(list(settings.corpus), tokenizer, model_args(read_config(folder)))
    model = load_model(folder, device, DTYPES.get(dtype), thorough=True)
    context = min(settings.context, model.args.max_position)
    sequences = cut_sequences(documents, context, settings.tokens, settings.seed, tokenizer.prefix)
    if not sequences:
        raise ValueError("the corpus has fewer than 2 tokens to calibrate on: give more text, or a larger --tokens")
    tokens = sum(map(len, sequences))
    if tokens < settings.tokens:
        print(f"the corpus holds {tokens} tokens, fewer than the {settings.tokens} asked for", file=sys.stderr)
    origin = {
        "corpus": ", ".join(path.name for path in settings.corpus),
        "tokens": str(tokens),
        "pass_tokens": str(settings.pass_tokens),
        "context": str(context),
        "seed": str(settings.seed),
        "method": settings.method,
        "tokens_sha256": hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:16],
    }
    about = {"version": CALIBRATION_VERSION, "model": fingerprint(folder), "dtype": dtype} | origin
    journal = Journal(out.with_name(f"{out.name}.partial"), about)
    with memory_for(f"calibrating on sequences of {context} tokens", "lower --context, or take another --device"):
        curves, factors = fit_curves(Passes(model, sequences, settings.pass_tokens, journal), settings.method)
    calibration = Calibration(curves, fingerprint(folder), origin, factors)
    calibration.save(out)
    journal.path.unlink(missing_ok=True)
    return calibration
