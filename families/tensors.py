"""What another program calls a model's tensors, and what they become in ours.

Our rotary embedding turns channel d of a head with channel d + head_dim / 2. Where others turn neighbours, or only a
part of the channels, rows of q and k are put in that order, which no score depends on. Norms that are stored less 1
have it added, and what divides the logits divides the last norm: so none of it costs anything later.
"""

import re
from typing import Any

import torch
from torch import Tensor

from teal_fast.families.args import ModelArgs
from teal_fast.families.config import family_of, text_config
from teal_fast.families.fields import positive
from teal_fast.families.table import GGUF, HUGGINGFACE

TOP = ("tok_embeddings", "norm", "output")  # of no layer
OUTER = re.compile(r"^(model\.language_model\.|language_model\.model\.)(?!lm_head)|^language_model\.(?=lm_head)")
VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector|vision_model)\.")


def inner_name(name: str) -> str | None:
    """The name of a Hugging Face tensor without a vision tower beside the text; None for one of that tower."""
    if VISION.match(name):
        return None
    return OUTER.sub(lambda found: "" if "lm_head" in name else "model.", name)


class Tensors:
    """How tensors of Hugging Face, or of a GGUF file, make a model's; names: as find_sources (files/conversion.py)."""

    def __init__(self, config: dict[str, Any], args: ModelArgs, gguf: bool = False):
        config = text_config(config)
        self.args, self.family = args, family_of(config)
        theirs = GGUF | self.family.gguf_names if gguf else HUGGINGFACE | self.family.names
        where = {True: "", False: "blk.{}."} if gguf else {True: "model.", False: "model.layers.{}."}
        self.names = {
            module if module in TOP else f"layers.{{}}.{module}": tuple(where[module in TOP] + part for part in parts)
            for module, parts in theirs.items()
        } | ({} if gguf else {"output": ("lm_head",)})
        self.plus_one = self.family.plus_one and not gguf
        self.order = channel_order(args, self.family.gguf_interleaved if gguf else self.family.interleaved)
        self.divisor = positive("logits_scaling", config.get("logits_scaling") or 1.0)

    def adapt(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor under their name as it stands in ours: its rows in another order, or a norm's other values."""
        module, heads = self.place(name, tensor)
        tensor = fold(tensor, *self.folds(module))
        return tensor if self.order is None or not heads else in_order(tensor, heads, self.order)

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `adapt`, in the same dtype: what becomes `tensor`, which is stored in ours.

        Raises ValueError where nothing of that dtype does.
        """
        module, heads = self.place(name, tensor)
        if self.order is not None and heads:
            tensor = in_order(tensor, heads, self.order.argsort())
        added, divisor = self.folds(module)
        if not added and divisor == 1:
            return tensor
        if (found := unfold(tensor, added, divisor)) is None:
            raise ValueError(f"{name} has values that no {tensor.dtype} gives: convert the model again, as fp32")
        return found

    def folds(self, module: str) -> tuple[float, float]:
        """What is added to a module's values, and by what they are divided."""
        return float("norm" in module and self.plus_one), self.divisor if module == "norm" else 1.0

    def place(self, name: str, tensor: Tensor) -> tuple[str, int]:
        """The module of ours that a tensor of theirs is part of, and over how many heads its rows are put in order."""
        theirs = re.sub(r"\d+", "{}", name.rsplit(".", 1)[0], count=1)
        module, part = next(
            (module.removeprefix("layers.{}."), parts.index(theirs))
            for module, parts in self.names.items()
            if theirs in parts
        )
        if module in ("attention.q_norm", "attention.k_norm"):
            return module, tensor.shape[0] // self.args.head_dim
        if module != "attention.wqkv":
            return module, 0
        if len(self.names["layers.{}.attention.wqkv"]) == 1:
            return module, self.args.n_heads + self.args.n_kv_heads
        return module, (self.args.n_heads, self.args.n_kv_heads, 0)[part]


def fold(values: Tensor, added: float, divisor: float) -> Tensor:
    """(values + added) / divisor in fp32; the values as they are where that changes nothing."""
    return (values.float() + added) / divisor if added or divisor != 1 else values


def unfold(folded: Tensor, added: float, divisor: float) -> Tensor | None:
    """Values of the same dtype of which `fold` makes these: the nearest ones or a neighbour. None where it can't be."""
    dtype = folded.dtype
    found = nearest = (folded.float() * divisor - added).to(dtype)
    bits = nearest.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    for guess in (nearest, (bits + 1).view(dtype), (bits - 1).view(dtype)):
        found = torch.where(fold(guess, added, divisor).to(dtype) == folded, guess, found)
    return found if torch.equal(fold(found, added, divisor).to(dtype), folded) else None


def channel_order(args: ModelArgs, interleaved: bool) -> Tensor | None:
    """Which of a head's channels stands where in our order, int64 [head_dim]; None where all stay."""
    turned, half = args.turned, args.head_dim // 2
    channels = torch.arange(args.head_dim)
    first, second = (channels[:turned].view(-1, 2).t() if interleaved else channels[:turned].view(2, -1)).unbind()
    rest = channels[turned:]
    order = torch.cat((first, rest[: half - len(first)], second, rest[half - len(first) :]))
    return None if torch.equal(order, channels) else order


def in_order(rows: Tensor, heads: int, order: Tensor) -> Tensor:
    """Rows [heads x head_dim and more, …], those of the heads in another order."""
    count = heads * len(order)
    moved = rows[:count].unflatten(0, (heads, -1))[:, order].flatten(0, 1)
    return moved if count == len(rows) else torch.cat((moved, rows[count:]))
