"""Which models may draft for a checkpoint: a folder that is named, or quantized copies that lie beside it."""

import sys
from collections.abc import Iterator
from pathlib import Path

from teal_fast.engine.fixed_text import with_fixed_text
from teal_fast.engine.speculation.drafters import DraftModel
from teal_fast.engine.speculation.lossless import AUTO, NGRAM, SELF
from teal_fast.families.config import model_args
from teal_fast.files.calibration import find_calibration
from teal_fast.files.checkpoint import CONFIG, WEIGHTS, find_checkpoint, read_config, source_of
from teal_fast.files.load import load_model
from teal_fast.files.paths import command
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer

COPIES = ("int8", "int4")  # what is looked for beside a checkpoint called NAME: NAME-int8 and NAME-int4


def find_drafts(folder: Path, model: Transformer, tokenizer: Tokenizer, draft: str = AUTO) -> Iterator[DraftModel]:
    """Loads the models besides itself that may draft for that of a checkpoint folder, by a request's or flag's `draft`.

    Raises ValueError on a named folder whose model has another vocabulary or tokenizer, FileNotFoundError on none.
    """
    if draft in (SELF, NGRAM):
        return
    if draft != AUTO:
        yield _open(find_checkpoint(draft), draft, folder, model, tokenizer)
        return
    name, source = folder.name, source_of(folder)
    for copy in (folder.with_name(f"{name}-{format}") for format in COPIES):
        if not all((copy / file).is_file() for file in (CONFIG, WEIGHTS)):
            continue
        if source_of(copy) == source:
            yield _open(copy, copy.name, folder, model, tokenizer)
        else:
            said = f"it is no copy of {folder}, or an older release made it: `{command('quantize')}` makes one"
            print(f"{copy} does not draft: {said}", file=sys.stderr)


def _open(draft: Path, name: str, folder: Path, model: Transformer, tokenizer: Tokenizer) -> DraftModel:
    theirs, ours = model_args(read_config(draft)).vocab_size, model.args.vocab_size
    if theirs != ours:
        raise ValueError(f"{draft} has {theirs} tokens, {folder} {ours}: a draft model needs the same vocabulary")
    if Tokenizer.load(draft).pieces != tokenizer.pieces:
        raise ValueError(f"{draft} and {folder} have different tokenizers: a draft model needs the same one")
    device = model.norm.weight.device
    shared = source_of(draft) == source_of(folder)
    dtype = model.norm.weight.dtype if shared else None
    drafting = with_fixed_text(load_model(draft, device, dtype), draft, tokenizer)
    return DraftModel(name, drafting, find_calibration(draft), shared)
