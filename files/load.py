"""TODO."""

from pathlib import Path

import torch
from torch import nn

from teal_fast.families.config import model_args
from teal_fast.files.checkpoint import WEIGHTS, read_config
from teal_fast.files.store import open_safetensors
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, sparse_layers, sparsify
from teal_fast.weights.formats import Format


def stored_as(name: str) -> str:
    """The name in model.safetensors of a parameter of the sparse model."""
    return name.replace(".weight.packed", ".weight").replace(".weight.scale", ".scale")


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The model of a checkpoint folder, its block linears sparse at sparsity 0; dtype None keeps the stored one.

    Quantized weights stay so; `dtype` is of what is computed, and of all else. On the CPU tensors stay memory-mapped
    unless it changes them.
    """
    args = model_args(read_config(folder))
    tensors = {}
    with open_safetensors(folder / WEIGHTS) as file:
        metadata, stored = file.metadata() or {}, set(file.keys())
        if metadata.get("format") != "teal-fast":
            raise ValueError(
                f"{folder} is not converted yet: run `python -m teal_fast.scripts.convert_hf_checkpoint {folder}`"
            )
        with torch.device("meta"):
            model = sparsify(Transformer(args), Format.read(metadata))
        for name, parameter in model.named_parameters():
            stored_name = stored_as(name)
            if stored_name not in stored:
                raise ValueError(f"{folder / WEIGHTS} lacks {stored_name}, which its config.json calls for: remake it")
            tensor = file.get_tensor(stored_name).to(device=device)
            quantized = not tensor.is_floating_point() or name.endswith(".scale")
            tensors[name] = tensor if quantized else tensor.to(dtype=dtype)
            if tensor.shape != parameter.shape:
                found, expected = list(tensor.shape), list(parameter.shape)
                raise ValueError(f"{folder / WEIGHTS}: {stored_name} is {found}, config.json calls for {expected}")
        if extra := sorted(stored - set(map(stored_as, tensors))):
            raise ValueError(f"{folder / WEIGHTS} holds {extra[0]}, unknown to its config.json: make it again")
    model.load_state_dict(tensors, strict=False, assign=True)
    if isinstance(model.output, nn.Linear) and args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    for layer in sparse_layers(model).values():
        layer.threshold = torch.full(layer.threshold.shape, KEEP_ALL, device=device)
    return model.to(device).requires_grad_(False).eval()
