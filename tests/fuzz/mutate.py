"""Draws a mutation for a source: a file of it, and what happens to that file."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teal_fast.tests.fuzz.mutate_gguf import mutate_blocks, mutate_entry, mutate_metadata
from teal_fast.tests.fuzz.mutate_tensors import (
    mutate_header,
    mutate_length,
    mutate_stored,
    mutate_values,
)
from teal_fast.tests.fuzz.mutate_text import (
    mutate_bytes,
    mutate_config,
    mutate_json,
    mutate_sentencepiece,
    mutate_template,
    mutate_tiktoken,
)

Mutator = Callable[[random.Random, Path], str]


@dataclass(frozen=True)
class Mutation:
    """file: the mutated one's name; text: what happened to it; sound: whether a sound file may be so.

    A header that does not describe its data is never sound, nor is an offset that is another. Of all else the mutators
    don't know, so that it may be.
    """

    file: str
    text: str
    sound: bool


def mutate_place(rng: random.Random, path: Path) -> str:
    """The file is gone, or something else stands in its place."""
    kind = rng.choice(("gone", "folder", "dangling link", "loop"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to("nowhere" if kind == "dangling link" else path.name)
    return f"file: {kind}"


def mutators(path: Path) -> list[Mutator]:
    """What may happen to a file, by its name; as often as it stands here."""
    tiktoken = path.name == "tokenizer.model" and path.read_bytes()[:1] != b"\n"
    pieces = mutate_tiktoken if tiktoken else mutate_sentencepiece
    of_its_kind: dict[str, list[Mutator]] = {
        "config.json": [mutate_config] * 8 + [mutate_json] * 3,
        "tokenizer_config.json": [mutate_template] * 3 + [mutate_json] * 5,
        "tokenizer.model": [pieces] * 8,
        ".safetensors": [mutate_header] * 6 + [mutate_length, *[mutate_values, mutate_stored] * 2],
        ".json": [mutate_json] * 9,
        ".jinja": [mutate_template] * 5,
        ".gguf": [mutate_entry] * 5 + [mutate_metadata] * 6 + [mutate_blocks],
        ".bin": [],
    }
    own = of_its_kind.get(path.name, of_its_kind.get(path.suffix))
    return [*own, mutate_bytes, mutate_place]


def mutate(rng: random.Random, source: Path) -> Mutation:
    """Changes one file of the source in place, once or twice; config.json three times as often as others."""
    files = sorted(path for path in source.iterdir() if path.suffix != ".txt")
    path = rng.choice([*files, *[file for file in files if file.name == "config.json"] * 2])
    texts, sound = [], True
    for _ in range(rng.choice((1, 1, 1, 2))):
        if texts and not path.is_file():
            break
        mutator = rng.choice(mutators(path))
        try:
            texts.append(mutator(rng, path))
        except Exception:  # what the first one left may be no JSON, no header, no reader's file
            if not texts:
                raise
            break
        at_odds = mutator in (mutate_header, mutate_length) and " swap " not in texts[-1]
        # New metadata are written with the whole file, tensors in their places.
        sound = mutator == mutate_metadata or (sound and not at_odds and not texts[-1].startswith("offset"))
    return Mutation(path.name, "; ".join(texts), sound)
