"""Passes of a model over the calibration text, and the journal that lets an interrupted run resume.

A method (methods.py) needs several passes at different thresholds. Each takes another part of the text, so that
all of it is used and none of them is long.
"""

import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from teal_fast.calibration.block_passes import work
from teal_fast.calibration.corpus import as_text
from teal_fast.calibration.probe import observe
from teal_fast.calibration.progress import Progress
from teal_fast.files.store import check_writable, new_file, open_safetensors
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, sparse_layers

Seen = dict[str, dict[str, Tensor]]  # layer name to what was observed of its input (`Observed.summary`)


class Journal:
    """A file of finished passes, which lies beside the output until that is written.

    about: what determines a run (model, text, settings). What lies there otherwise, a damaged file or the journal of a
    run with another `about`, is replaced. The file has a hash over its tensors besides, since damage need not show.
    """

    def __init__(self, path: Path, about: dict):
        check_writable(path)
        self.path, self.about = path, json.dumps(about)
        self.tensors = self._read() if path.exists() else {}

    def _read(self) -> dict[str, Tensor]:
        try:
            with open_safetensors(self.path) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata.get("about") == self.about and metadata.get("sha256") == _digest(tensors):
                return tensors
            trouble = "is of another run" if metadata.get("about") != self.about else "is damaged"
        except (ValueError, OSError):
            trouble = "is damaged"
        print(f"{self.path} {trouble}: starting anew", file=sys.stderr)
        return {}

    def keep(self, title: str, make: Callable[[], Seen]) -> Seen:
        """The pass `title` from the journal or, if it is not there, from `make`, which is then written to the file."""
        found: Seen = {}
        for name, tensor in self.tensors.items():
            its_title, layer, what = name.split("/")
            if its_title == title:
                found.setdefault(layer, {})[what] = tensor
        if not found:
            found = make()
            self.tensors |= {f"{title}/{layer}/{what}": t for layer, seen in found.items() for what, t in seen.items()}
            with new_file(self.path) as temporary:
                temporary.write_bytes(save(self.tensors, {"about": self.about, "sha256": _digest(self.tensors)}))
        return found


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()  # the library sorts tensors, so that equal ones are equal bytes


def cut_sequences(
    documents: list[list[int]], length: int, tokens: int, seed: int, prefix: Sequence[int]
) -> list[list[int]]:
    """Draws sequences of at most `length` tokens at random from all documents, up to `tokens` tokens in total.

    documents: token ids; prefix: what every sequence begins with (`as_text`). Each has a token more than that, and 2.
    """
    pieces = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
    uncounted = max(1, len(prefix))  # the first token of a sequence has none before it
    pieces = [as_text(piece, prefix) for piece in pieces if len(piece) > uncounted]
    random.Random(seed).shuffle(pieces)
    chosen = []
    for piece in pieces:
        if tokens <= 1:
            break
        chosen.append(piece[:tokens])
        tokens -= len(chosen[-1])
    return chosen


class Passes:
    """Passes of a model over sequences of token ids, each over the next part of about `tokens` tokens."""

    def __init__(self, model: Transformer, sequences: list[list[int]], tokens: int, journal: Journal):
        self.model, self.sequences, self.journal = model, sequences, journal
        average = sum(map(len, sequences)) / len(sequences)
        self.count = min(max(round(tokens / average), 1), len(sequences))
        self.tokens = round(self.count * average)
        self.turn = 0
        self.progress: Progress | None = None  # None: each pass has a bar of its own

    def part(self, turn: int) -> list[list[int]]:
        """The sequences of a pass."""
        return [self.sequences[(turn * self.count + i) % len(self.sequences)] for i in range(self.count)]

    def work(self, turn: int, loss: str | None) -> float:
        """Layers x tokens of a pass."""
        return sum(work(self.model, len(sequence), loss) for sequence in self.part(turn))

    def next(self, title: str, thresholds: Tensor | None, factors: list[Tensor], loss: str | None = None) -> Seen:
        """Runs one pass and returns what `observe` returns.

        thresholds: [layers], None for the dense model; factors: [K] for each layer, by which its channels' thresholds
        are multiplied; loss: see `observe`.
        """
        for index, layer in enumerate(sparse_layers(self.model).values()):
            layer.threshold.copy_(torch.tensor(KEEP_ALL) if thresholds is None else thresholds[index] * factors[index])
        turn, self.turn = self.turn, self.turn + 1

        def run() -> Seen:
            observed.append(turn)
            return observe(self.model, self.part(turn), title, loss, factors, self.progress)

        observed: list[int] = []
        seen = self.journal.keep(f"{self.turn} {title}", run)
        if self.progress and not observed:
            self.progress.skip(self.work(turn, loss))
        return {name: seen[name] for name in sparse_layers(self.model)}  # the journal has an order of its own


def column(seen: Seen, what: str) -> list[Tensor]:
    """One entry of every layer's summary, in the model's order."""
    return [found[what] for found in seen.values()]
