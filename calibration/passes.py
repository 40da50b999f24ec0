"""Passes of a model over the text it is calibrated on, and the journal that keeps those which are finished."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from teal_fast.calibration.probe import observe
from teal_fast.files.store import new_file, open_safetensors
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, sparse_layers

Seen = dict[str, dict[str, Tensor]]


class Journal:
    """Passes over the text that are finished, kept in a file beside the output until that is written.

    A run that was cut off goes on from there, if it is the same in all that `about` says. What lies there otherwise, a
    damaged file or another run's, is replaced.
    """

    def __init__(self, path: Path, about: dict):
        self.path, self.about = path, json.dumps(about)
        self.tensors = self._read() if path.exists() else {}

    def _read(self) -> dict[str, Tensor]:
        try:
            with open_safetensors(self.path) as file:
                names = list(file.keys())
                if (file.metadata() or {}).get("about") == self.about and all(n.count("/") == 2 for n in names):
                    return {name: file.get_tensor(name) for name in names}
            trouble = "is of another run"
        except (ValueError, FileNotFoundError):
            trouble = "is damaged"
        print(f"{self.path} {trouble}: starting anew", file=sys.stderr)
        return {}

    def keep(self, title: str, make: Callable[[], Seen]) -> Seen:
        """What `make` gives, or gave in an earlier run."""
        found: Seen = {}
        for name, tensor in self.tensors.items():
            of, layer, what = name.split("/")
            if of == title:
                found.setdefault(layer, {})[what] = tensor
        if not found:
            found = make()
            self.tensors |= {f"{title}/{layer}/{what}": t for layer, seen in found.items() for what, t in seen.items()}
            with new_file(self.path) as temporary:
                temporary.write_bytes(save(self.tensors, {"about": self.about}))
        return found


def cut_sequences(documents: list[list[int]], length: int, tokens: int, seed: int) -> list[list[int]]:
    """Up to `tokens` tokens of the documents as sequences of at most `length`, drawn at random from all of them."""
    pieces = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # the first token of a sequence is not counted
    random.Random(seed).shuffle(pieces)
    chosen = []
    for piece in pieces:
        if tokens <= 1:
            break
        chosen.append(piece[:tokens])
        tokens -= len(chosen[-1])
    return chosen


class Passes:
    """Passes of a model over the text, each over another part of about `tokens` tokens."""

    def __init__(self, model: Transformer, sequences: list[list[int]], tokens: int, journal: Journal):
        self.model, self.sequences, self.journal = model, sequences, journal
        average = sum(map(len, sequences)) / len(sequences)
        self.count = min(max(round(tokens / average), 1), len(sequences))
        self.tokens = round(self.count * average)
        self.turn = 0

    def next(self, title: str, found: Tensor | None, factors: list[Tensor], loss: str | None = None) -> Seen:
        """What is observed at thresholds [layers] times the layers' factors [K], densely when there are none."""
        for index, layer in enumerate(sparse_layers(self.model).values()):
            layer.threshold.copy_(torch.tensor(KEEP_ALL) if found is None else found[index] * factors[index])
        start, self.turn = self.turn * self.count, self.turn + 1
        part = [self.sequences[(start + i) % len(self.sequences)] for i in range(self.count)]
        seen = self.journal.keep(f"{self.turn} {title}", lambda: observe(self.model, part, title, loss, factors))
        return {name: seen[name] for name in sparse_layers(self.model)}  # the journal has an order of its own


def column(seen: Seen, what: str) -> list[Tensor]:
    return [found[what] for found in seen.values()]
