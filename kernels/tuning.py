"""How the launches of the step in three stages are best cut on a card: measured ones, by the card's name.

`teal-fast tune` measures them (benchmarks/tune.py) and keeps them in $XDG_CACHE_HOME/teal-fast/tuning/CARD.json, which
goes before what tuned/CARD.json has. A file has an object of some of TUNED for each shape of a model.
"""

import functools
import json
import re
import sys
from dataclasses import astuple
from pathlib import Path

from teal_fast.kernels.native import cache_folder
from teal_fast.kernels.stage_shape import TUNED, StageShape

SHIPPED = Path(__file__).with_name("tuned")


def key_of(shape: StageShape) -> str:
    """What a shape is called in the files."""
    return " ".join(str(int(value)) for value in astuple(shape))


def own_file(card: str) -> Path:
    """Where this machine's measurements of a card are kept."""
    return cache_folder() / "tuning" / f"{_stem(card)}.json"


def find_tuned(card: str, shape: StageShape) -> dict[str, int]:
    """What was measured best for a model's shape on a card; nothing where nothing was, which is said of unknown cards.

    Raises ValueError for a file that is not sound.
    """
    files = [path for path in (own_file(card), SHIPPED / f"{_stem(card)}.json") if path.is_file()]
    if not files:
        _say_unknown(card)
    return next((found for path in files if (found := read_tuned(path).get(key_of(shape)))), {})


def read_tuned(path: Path) -> dict[str, dict[str, int]]:
    """The measured constants in a file, by shape. Raises ValueError for a file that is not sound."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sound = all(_is_sound(constants) for constants in found.values())
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is not what `teal-fast tune` writes: remove it, and tune again")
    return found


def _is_sound(constants: dict[str, int]) -> bool:
    return all(name in TUNED and type(value) is int and 1 <= value <= TUNED[name] for name, value in constants.items())


def _stem(card: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-")


@functools.cache
def _say_unknown(card: str) -> None:
    print(f"{card} is not tuned for: decoding as on an H200; `teal-fast tune` measures this one", file=sys.stderr)
