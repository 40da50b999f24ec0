"""A store of prefixes as one file, so that conversations go on after a restart without being read again.

The file holds what was said as token ids, and is its owner's alone. It is written whole or not at all. Everything in it
is checked before use, but for single numbers of keys and values that are finite and yet not those that were saved: as
in a checkpoint, there is no checksum. Trouble with it is one line on stderr and never an error, since a prefix that is
not there is computed again.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from teal_fast.engine.prefixes import Block, PrefixStore
from teal_fast.files.calibration import Calibration
from teal_fast.files.checkpoint import fingerprint
from teal_fast.files.store import (
    SAFETENSORS_DTYPES,
    is_finite,
    new_file,
    one_line,
    open_safetensors,
    parse_json,
    short,
    write_safetensors,
)
from teal_fast.model import KVCache, Transformer

VERSION = "2"  # 1 did not tell keys of dense graph steps on CUDA from those of passes


def identity(folder: Path, model: Transformer, calibration: Calibration | None) -> dict[str, str]:
    """What the keys and values of the checkpoint in `folder` depend on, and what their sparsities mean.

    A fingerprint alone tells weights and their format, but neither what else config.json says, such as how positions
    are rotated, nor the type that is computed in.
    """
    thresholds = hashlib.sha256()
    for part in (calibration.curves, calibration.factors) if calibration else ():
        for name in sorted(part):
            thresholds.update(name.encode() + part[name].numpy().tobytes())
    return fingerprint(folder) | {
        "config": hashlib.sha256(repr(model.args).encode()).hexdigest()[:16],
        "dtype": str(model.norm.weight.dtype),
        "calibration": thresholds.hexdigest()[:16],
    }


def save_prefixes(store: PrefixStore, path: Path, model: dict[str, str]) -> None:
    """Writes all that the store keeps, or leaves the file that was there.

    model: see `identity`. Does nothing where nothing has changed since the store was saved or loaded.
    """
    if not store.changed:
        return
    blocks = list(reversed(store.parents))  # most recently used first, so that parents come before their children
    numbers = {store.root: 0} | {block: number for number, block in enumerate(blocks, 1)}
    entries = [[numbers[store.parents[block]], block.ids, block.made] for block in blocks]
    about = {"version": VERSION, "model": model, "blocks": entries}
    kept = {str(numbers[block]): block.kv for block in blocks}
    layout = {name: (kv.dtype, kv.shape) for name, kv in kept.items()}
    try:
        with new_file(path) as temporary:
            temporary.chmod(0o600)
            metadata = {"prefixes": json.dumps(about)}
            write_safetensors(temporary, layout, lambda name: kept[name].cpu(), metadata, progress=None)
        store.changed = False
    except (OSError, ValueError) as error:
        print(f"the prefix cache is not saved: {one_line(error)}", file=sys.stderr)


def load_prefixes(store: PrefixStore, path: Path, model: dict[str, str], cache: KVCache) -> None:
    """Puts what was saved in the place of what the store keeps: what was used last, as far as the budget goes.

    cache: one of the model's, whose sizes, dtype and device hold. A file that is missing, unsound or another model's
    leaves the store empty.
    """
    store.clear()
    try:
        for parent, block in reversed(_read(path, model, cache, store) if path.exists() else []):
            store.parents[block] = parent
            store.attach(parent, block)
    except (OSError, ValueError) as error:
        print(f"the prefix cache starts empty and replaces its file: {one_line(error)}", file=sys.stderr)
    store.changed = False


def _read(path: Path, model: dict[str, str], cache: KVCache, store: PrefixStore) -> list[tuple[Block, Block]]:
    """Parents and blocks in the file's order, as many as the store's budget allows."""
    found, blocks, room = [], [store.root], store.budget
    with open_safetensors(path) as file:
        entries, names = _read_entries(path, file.metadata() or {}, model), set(file.keys())
        if names != set(map(str, range(1, len(entries) + 1))):
            raise ValueError(f"{path} has {len(names)} tensors that are not those of its {len(entries)} blocks")
        for number, entry in enumerate(entries, 1):
            parent, ids, made = _check_entry(f"{path}: block {number}", entry, blocks, store.block)
            kv = _read_kv(path, file, str(number), len(ids), cache)
            if (room := room - kv.nbytes) < 0:
                break
            blocks.append(Block(ids, made, kv))
            found.append((parent, blocks[-1]))
    if len({(parent, block.ids) for parent, block in found}) < len(found):
        raise ValueError(f"{path} has a block twice")
    return found


def _read_entries(path: Path, metadata: dict[str, str], model: dict[str, str]) -> list[Any]:
    """The blocks' entries, of a file of this version and model."""
    if "prefixes" not in metadata:
        raise ValueError(f"{path} has no metadata called prefixes, with version, model and blocks")
    about = parse_json(metadata["prefixes"], f"{path}: prefixes", todo="remove it")
    if (version := about.get("version")) != VERSION:
        raise ValueError(f"{path}: version is {short(version)}, expected {VERSION!r}")
    if (found := about.get("model")) != model:
        raise ValueError(f"{path} is another model's: {_difference(found, model)}")
    if not isinstance(entries := about.get("blocks"), list):
        raise ValueError(f"{path}: blocks is {short(entries)}, expected a list")
    return entries


def _difference(found: Any, model: dict[str, str]) -> str:
    if not isinstance(found, dict) or found.keys() != model.keys():
        return f"model is {short(found)}"
    name = next(name for name in model if found[name] != model[name])
    return f"{name} is {short(found[name])}, expected {model[name]!r}"


def _check_entry(place: str, entry: Any, blocks: list[Block], most: int) -> tuple[Block, tuple[int, ...], list[float]]:
    """Parent, ids and sparsities of a block, by its entry, that of its parent's among the blocks before it."""
    if not isinstance(entry, list) or len(entry) != 3 or not all(isinstance(part, list) for part in entry[1:]):
        raise ValueError(f"{place} is {short(entry)}, expected its parent's number, ids and sparsities")
    number, ids, made = entry
    if type(number) is not int or not 0 <= number < len(blocks):
        raise ValueError(f"{place}: parent is {short(number)}, expected the number of a block before it")
    parent = blocks[number]
    if number and len(parent.ids) != most:
        raise ValueError(f"{place}: its parent has {len(parent.ids)} tokens, expected {most}")
    if not 1 <= len(ids) <= most or not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError(f"{place}: ids are {short(ids)}, expected 1 to {most} whole numbers")
    sound = len(made) == len(ids) and all(type(sparsity) in (int, float) for sparsity in made)
    if not sound or (steps := [*(parent.made[-1:] or [0.0]), *made, 1.0]) != sorted(steps):
        raise ValueError(f"{place}: sparsities are {short(made)}, expected one an id, ascending up to 1")
    return parent, tuple(ids), made


def _read_kv(path: Path, file: Any, name: str, tokens: int, cache: KVCache) -> Tensor:
    """A block's keys and values on the cache's device. Type and shape are looked at before memory is taken."""
    row, part = cache.k[0], file.get_slice(name)
    expected = SAFETENSORS_DTYPES[row.dtype], [2 * len(cache.k), row.shape[1], tokens, row.shape[3]]
    if (found := (part.get_dtype(), part.get_shape())) != expected:
        raise ValueError(f"{path}: tensor {name} is {short(found)}, expected {expected}")
    kv = file.get_tensor(name)
    if not is_finite(kv):
        raise ValueError(f"{path}: tensor {name} holds NaN or inf")
    return kv.to(row.device, copy=True)  # its own memory: the file's would go only with all of its blocks
