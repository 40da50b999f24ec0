"""Whether our model says what llama.cpp's says on the very same GGUF file: perplexity, and greedy texts.

    python -m teal_fast.benchmarks.agree --gguf model.gguf --windows 8

Both score the same ids by the protocol of llama.cpp's perplexity tool (tools/perplexity in llama-cpp-python 0.3.36):
windows of 512 tokens of the text, of each of which the second half is scored, after BOS where the file asks for it.
Both then decode greedily after prompts out of the text, ours by its fast step; where the texts part, llama.cpp's margin
is how much likelier its own token is to it than ours. Everything is dense and on the CPU. Ends with an error when
perplexities are further apart than 0.2 %, or texts part at a margin of 0.3 or more: what rounding alone does not do.
"""

import argparse
import ctypes
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from teal_fast.benchmarks.peer_llama import Decoder, load, native, type_of
from teal_fast.benchmarks.peers import check_installed
from teal_fast.calibration.corpus import read_ids
from teal_fast.cli import ModelChoice, open_model, positive_int, run
from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, window_loss
from teal_fast.evaluation.record import check_records_path, describe, write_records
from teal_fast.model import Transformer
from teal_fast.sparse_model import DENSE, format_of
from teal_fast.weights.output import output_weight

WINDOW = 512
UNSCORED = WINDOW // 2 + 1  # tokens; the first one that is scored follows the window's first half and one more
MOST_APART, MOST_MARGIN = 0.002, 0.3  # of perplexities; nats


def cut(ids: list[int], limit: int | None, bos: int | None) -> list[list[int]]:
    """Windows of a text, each with BOS for its first token where there is one; `limit` of them, spread evenly."""
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)
    if not starts:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {WINDOW}: give more --text")
    count = min(limit or len(starts), len(starts))
    starts = [starts[i * len(starts) // count] for i in range(count)]
    return [ids[i : i + WINDOW] if bos is None else [bos, *ids[i + 1 : i + WINDOW]] for i in starts]


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
            return float(np.mean([-log_softmax(row)[token] for row, token in zip(logits, window[UNSCORED:])]))
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
