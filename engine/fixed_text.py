"""How large the sums of q/k/v, o and the MLP were in each column, at most, on a text that ships with the project.

A dense pass measures it once a model, and it is kept in $XDG_CACHE_HOME/teal-fast/sums under a name made of the model's
fingerprint and the text's ids: so the grids that follow (grids.py), and with them the bits of sums, are the same in
every run. Models without a tokenizer take ids at even distances over the vocabulary, and are measured each time, as are
models that ranks share.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from teal_fast.engine.ranks.layers import ranks_of
from teal_fast.files.checkpoint import fingerprint
from teal_fast.files.paths import DATA
from teal_fast.files.store import new_file
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.kernels.native import cache_folder
from teal_fast.model import Transformer

TOKENS = 256  # of the beginning of each file in data/calibration
EVEN = 8, 32  # sequences and tokens without a tokenizer
PARTS = ("attention.wqkv", "attention.wo", "feed_forward.w2")
Sums = tuple[Tensor, ...]  # of a layer's PARTS, fp32 [N] each


class FixedText(NamedTuple):
    """The text's ids [sequences][tokens] by the tokenizer of the checkpoint in `folder`."""

    folder: Path
    ids: list[list[int]]


def with_fixed_text(model: Transformer, folder: Path, tokenizer: Tokenizer) -> Transformer:
    """The model, which from now on knows the fixed text as its tokenizer has it."""
    files, most = sorted((DATA / "calibration").glob("*.txt")), min(TOKENS, model.args.max_position)
    texts = [tokenizer.encode(path.read_text(encoding="utf-8")[: 16 * TOKENS])[:most] for path in files]
    shortest = min(map(len, texts))
    model.fixed_text = FixedText(folder, [ids[:shortest] for ids in texts])
    return model


def largest_sums(model: Transformer) -> list[Sums]:
    """Of each layer, on the model's device: measured, or as they are kept."""
    text: FixedText | None = getattr(model, "fixed_text", None)
    if text is None:
        count, vocab = EVEN[0] * EVEN[1], model.args.vocab_size
        return _measure(model, (torch.arange(count) * vocab // count).view(EVEN))
    ids = torch.tensor(text.ids)
    if ranks_of(model) is not None:
        return _measure(model, ids)
    key = hashlib.sha256(json.dumps([fingerprint(text.folder), text.ids], sort_keys=True).encode())
    path = cache_folder() / "sums" / f"{key.hexdigest()[:32]}.safetensors"
    if (found := _read(path, model)) is None:
        found = _measure(model, ids)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_bytes(save(dict(zip(_names(model), (sum for sums in found for sum in sums), strict=True))))
    return found


def _names(model: Transformer) -> list[str]:
    return [f"layers.{number}.{part}" for number in range(len(model.layers)) for part in PARTS]


def _read(path: Path, model: Transformer) -> list[Sums] | None:
    """What is kept there; None where there is nothing, or nothing sound."""
    names = _names(model)
    if not path.is_file():
        return None
    try:
        tensors = load_file(path, str(model.norm.weight.device))
    except (ValueError, OSError, SafetensorError):
        return None
    shapes = {name: (model.get_submodule(name).weight.out_features,) for name in names}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        return None
    return [tuple(tensors[name] for name in names[i : i + len(PARTS)]) for i in range(0, len(names), len(PARTS))]


@torch.no_grad()
def _measure(model: Transformer, ids: Tensor) -> list[Sums]:
    """By a dense pass over ids [sequences, tokens]."""
    found: list[list[Tensor]] = [[] for _ in model.layers]

    def watch(bias: Tensor | None, number: int, module: nn.Module, given: tuple, made: Tensor) -> None:
        made = made if bias is None else made - bias
        found[number].append(made.flatten(0, 1).abs().amax(0).float().contiguous())

    hooks = []
    for number, layer in enumerate(model.layers):
        for part in PARTS:
            module = layer.get_submodule(part)
            bias = module.bias if part == PARTS[0] else None  # which the kernels add to the sum
            hooks.append(module.register_forward_hook(partial(watch, bias, number)))
    try:
        model.hidden(ids.to(model.norm.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(sums) for sums in found]
