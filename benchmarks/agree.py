"""Whether our model says what llama.cpp's says on the very same GGUF file: perplexity, and greedy texts.

    python -m teal_fast.benchmarks.agree --gguf model.gguf --windows 8
    python -m teal_fast.benchmarks.agree --gguf model.gguf --windows 8 --dtype fp32 --format bf16

Both score the same ids by the protocol of llama.cpp's perplexity tool (tools/perplexity in llama-cpp-python 0.3.36):
windows of 512 tokens of the text, of each of which the second half is scored, after BOS where the file asks for it.
Both then decode greedily after prompts out of the text, ours by its fast step; where the texts part, llama.cpp's margin
is how much likelier its own token is to it than ours. Everything is dense and on the CPU. Ends with an error when
perplexities are further apart than 0.2 %, or texts part at a margin of 0.3 or more.

llama.cpp rounds the inputs of quantized weights to 8 bits, we do so in the decode step only. With `--format bf16` it
takes the same weights and inputs in bf16, from a copy of the file: what is apart by more than that is no rounding.
On the demo's Q4_1 (12 windows, one run) its own two perplexities are 0.34 % apart, ours in fp32 and that one 0.03 %.
"""

import argparse
import ctypes
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from teal_fast.benchmarks.peer_llama import FILE, Decoder, load, native, requantized, type_of
from teal_fast.benchmarks.peers import check_installed
from teal_fast.calibration.corpus import read_ids
from teal_fast.cli import ModelChoice, open_model, positive_int, run
from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, window_loss
from teal_fast.evaluation.record import check_records_path, describe, write_records
from teal_fast.files.demo import find_gguf
from teal_fast.model import Transformer
from teal_fast.sparse_model import DENSE, dtype_name, format_of
from teal_fast.weights.formats import DTYPES
from teal_fast.weights.output import output_weight

WINDOW = 512
UNSCORED = WINDOW // 2 + 1  # tokens; the first one that is scored follows the window's first half and one more
PROMPT = 24  # tokens that greedy texts follow
MOST_APART, MOST_MARGIN = 0.002, 0.3  # of perplexities; nats


def cut(ids: list[int], limit: int | None, bos: int | None) -> list[list[int]]:
    """Windows of a text, each with BOS for its first token where there is one; `limit` of them, spread evenly."""
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)
    if not starts:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {WINDOW}: give more --text")
    count = min(limit or len(starts), len(starts))
    starts = [starts[i * len(starts) // count] for i in range(count)]
    return [ids[i : i + WINDOW] if bos is None else [bos, *ids[i + 1 : i + WINDOW]] for i in starts]


def vocabulary_of(theirs: ctypes.c_void_p) -> tuple[int, int | None]:
    """The tokens of llama.cpp's model, and BOS where its file asks for it."""
    vocabulary = native().llama_model_get_vocab(theirs)
    bos = native().llama_vocab_bos(vocabulary) if native().llama_vocab_get_add_bos(vocabulary) else None
    return native().llama_vocab_n_tokens(vocabulary), bos


@torch.no_grad()
def our_losses(model: Transformer, windows: list[list[int]]) -> list[float]:
    """The mean loss of each window in nats."""
    output = output_weight(model.output)
    return [window_loss(model, output, window, UNSCORED, DENSE).mean().item() for window in windows]


class Scorer(Decoder):
    """llama.cpp with all logits of a window's second half."""

    def loss(self, window: list[int]) -> float:
        """The mean loss in nats."""
        self.keep(0)
        batch = native().llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = UNSCORED - 1 <= i < len(window) - 1
        try:
            if code := native().llama_decode(self.context, batch):
                raise ValueError(f"llama.cpp cannot decode: it says {code}")
            shape = (len(window) - UNSCORED, self.vocab_size)
            logits = np.ctypeslib.as_array(native().llama_get_logits(self.context), shape=shape)
            pairs = zip(logits, window[UNSCORED:], strict=True)
            return -float(np.mean([log_softmax(row)[token] for row, token in pairs]))
        finally:
            native().llama_batch_free(batch)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def compare_text(engine: Engine, decoder: Decoder, prompt: list[int], new_tokens: int) -> dict:
    """Where greedy texts part: the token's index, None where they do not, and llama.cpp's margin there."""
    stream = engine.stream(Request(prompt, Sampling(0.0), 0.0, new_tokens, stop=()))
    decoder.keep(0)
    given = prompt
    for index, token in enumerate(stream):
        logits = log_softmax(decoder.logits(given))
        if (margin := float(logits.max() - logits[token.id])) > 0:
            stream.close()
            return {"parted": index, "margin": margin}
        given = [token.id]
    return {"parted": None, "margin": 0.0}


def compare_texts(engine: Engine, decoder: Decoder, prompts: list[list[int]], new_tokens: int) -> list[dict]:
    return [compare_text(engine, decoder, prompt, new_tokens) for prompt in tqdm(prompts, "greedy", unit="text")]


def compare_perplexity(model: Transformer, scorer: Scorer, windows: list[list[int]]) -> dict:
    """Both perplexities and how far ours is from llama.cpp's, as a fraction of it, with its standard error."""
    ours = our_losses(model, windows)
    theirs = [scorer.loss(window) for window in tqdm(windows, "llama.cpp", unit="window")]
    perplexities = [math.exp(sum(losses) / len(losses)) for losses in (ours, theirs)]
    return {
        "protocol": f"context {WINDOW}, second half of {len(windows)} windows, as llama.cpp's",
        "tokens": len(windows) * (WINDOW - UNSCORED),
        "perplexity": perplexities[0],
        "llama_cpp_perplexity": perplexities[1],
        "apart": perplexities[0] / perplexities[1] - 1,
        "apart_error": float(np.std(np.subtract(ours, theirs), ddof=1) / math.sqrt(len(ours))) if ours[1:] else None,
        "losses": ours,
        "llama_cpp_losses": theirs,
    }


def compare(
    choice: ModelChoice, format: str, text: list[Path], windows: int | None, prompts: int, new_tokens: int
) -> dict:
    """The record of one file, which the choice names. format: of llama.cpp's weights, FILE or one of its copies."""
    opened = open_model(choice, calibrated=False)
    path = Path(choice.checkpoint) if format == FILE else requantized(Path(choice.checkpoint), format)
    theirs, model = load(path), opened.model
    if not theirs:
        raise ValueError(f"llama.cpp cannot load {path}: take another file")
    size, bos = vocabulary_of(theirs)
    ids = read_ids(text, opened.tokenizer, model.args)
    asked = [window[:PROMPT] for window in cut(ids, prompts, bos)]
    found = compare_perplexity(model, Scorer(theirs, size, [0], WINDOW - 1), cut(ids, windows, bos))
    engine, decoder = Engine(model, None, (), PROMPT + new_tokens), Decoder(theirs, size, [0], PROMPT + new_tokens)
    texts = compare_texts(engine, decoder, asked, new_tokens)
    about = describe(opened.name, opened.device, format_of(model)) | {"benchmark": "agree", "mode": engine.step.mode}
    about["dtype"] = dtype_name(model)
    peer = {"peer": f"llama.cpp {type_of(theirs)}", "peer_version": native().__version__}
    return about | peer | found | {"new_tokens": new_tokens, "answers": texts}


def print_record(record: dict) -> None:
    print(f"{record['model']}, {record['format']}: {record['protocol']}")
    ours, theirs = record["perplexity"], record["llama_cpp_perplexity"]
    error = "" if record["apart_error"] is None else f" (standard error {record['apart_error']:.3%})"
    print(f"perplexity {ours:.4f}, llama.cpp's {theirs:.4f}: {record['apart']:+.3%}{error}")
    parted = [f"{text['parted']} ({text['margin']:.3f})" for text in record["answers"] if text["parted"] is not None]
    equal = len(record["answers"]) - len(parted)
    where = f"; others part at token (margin in nats): {', '.join(parted)}" if parted else ""
    print(f"greedy, {record['new_tokens']} tokens: {equal} of {len(record['answers'])} texts equal{where}")


def check(record: dict) -> None:
    """Raises ValueError where the programs are further apart than rounding puts them."""
    if abs(record["apart"]) > MOST_APART:
        raise ValueError(f"perplexities are {record['apart']:+.3%} apart, expected at most {MOST_APART:.1%}")
    if (most := max(text["margin"] for text in record["answers"])) >= MOST_MARGIN:
        raise ValueError(f"texts part where llama.cpp's margin is {most:.3f} nats, expected less than {MOST_MARGIN}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="the file (default: the demo's)")
    parser.add_argument("--dtype", choices=DTYPES, help="what we compute in (default: bf16)")
    parser.add_argument("--format", choices=(FILE, "bf16"), default=FILE, help="of llama.cpp's (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="files or folders of text")
    parser.add_argument("--windows", type=positive_int, help=f"of {WINDOW} tokens, spread over the text (default: all)")
    parser.add_argument("--prompts", type=positive_int, default=10, help="greedy texts (default: %(default)s)")
    parser.add_argument("--new_tokens", type=positive_int, default=64, help="of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON record to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    check_installed([("llama.cpp", FILE)])
    gguf = options.gguf or find_gguf()
    choice = ModelChoice(str(gguf), "cpu", options.dtype)
    record = compare(choice, options.format, options.text, options.windows, options.prompts, options.new_tokens)
    print_record(record)
    print(json.dumps([record]))
    if options.out:
        write_records(options.out, [record])
    check(record)


if __name__ == "__main__":
    run(main)
