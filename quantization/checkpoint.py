"""TODO."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from teal_fast.calibration.corpus import read_corpus
from teal_fast.calibration.passes import cut_sequences
from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION, Calibration, load_calibration
from teal_fast.files.checkpoint import METADATA, WEIGHTS, fingerprint, read_config
from teal_fast.files.load import PACKED, load_model, stored_as
from teal_fast.files.store import new_file, open_safetensors, write_safetensors
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer
from teal_fast.quantization.calibrated import check_finite
from teal_fast.quantization.tuning import tune_scales
from teal_fast.sparse_model import format_of, sparse_layers, sparsify
from teal_fast.weights.dense import Weight
from teal_fast.weights.formats import QUANTIZED, Format
from teal_fast.weights.output import Int8Output

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"
CONTEXT = 1024  # tokens a sequence


def quantize(folder: Path, out: Path, format: Format, pack: Callable[[str, Tensor], Weight]) -> None:
    """Fills the folder `out` with a checkpoint, without calibration; `pack` quantizes the layer called so.

    Weights are [K, N]. Raises ValueError on NaN and inf.
    """
    with torch.device("meta"):
        model = sparsify(Transformer(model_args(read_config(folder))), format)
    with open_safetensors(folder / WEIGHTS) as file:
        names = set(file.keys())
        parts: dict[str, Tensor] = {}  # of the weight being written

        def load(name: str) -> Tensor:
            tensor = file.get_tensor(EMBEDDINGS if name == OUTPUT and name not in names else name)
            check_finite(name, tensor)
            return tensor

        def read(name: str) -> Tensor:
            if name in quantized and name not in parts:
                module = name.rsplit(".", 1)[0]
                weight = load(f"{module}.weight")
                made_of = Int8Output.pack(weight) if f"{module}.weight" == OUTPUT else pack(module, weight)
                prefix = "output." if f"{module}.weight" == OUTPUT else f"{module}.weight."
                parts.clear()
                for part, tensor in made_of.named_parameters():
                    parts[stored_as(prefix + part, packed)] = tensor.data.cpu()
            return parts[name] if name in quantized else load(name)

        layout, quantized, packed = {}, set(), PACKED[METADATA["version"]]
        for name, parameter in model.named_parameters():
            stored = stored_as(name, packed)
            if name.endswith((".packed", ".scale")) or name == OUTPUT:
                quantized.add(stored)
            layout[stored] = (parameter.dtype if stored in quantized else file.get_tensor(name).dtype, parameter.shape)
        for path in folder.iterdir():
            if path.is_file() and path.name not in (WEIGHTS, CALIBRATION) and not path.name.startswith("."):
                shutil.copyfile(path, out / path.name)
        write_safetensors(out / WEIGHTS, layout, read, METADATA | format.metadata())


def carry_calibration(folder: Path, out: Path) -> None:
    """Copies the calibration, if there is one, of one checkpoint to another, as that one's."""
    if (folder / CALIBRATION).exists():
        calibration = Calibration.load(folder / CALIBRATION)
        replace(calibration, model=fingerprint(out)).save(out / CALIBRATION)


def tune(folder: Path, out: Path, format: Format, sequences: list[list[int]], device: torch.device) -> None:
    """Tunes the scales of the checkpoint `out` in that format, made from the one in `folder`, to be like that one."""
    calibration = load_calibration(folder)
    try:
        models = (load_model(place, device, torch.float32) for place in (out, folder))
        factors = tune_scales(*models, calibration, sequences)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--tune holds both models in fp32, too much for {device}: try --device cpu") from error
    with open_safetensors(out / WEIGHTS) as file, new_file(out / WEIGHTS) as temporary:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict); memory-mapped
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}

        def read(name: str) -> Tensor:
            tensor, layer = stored[name], name.removesuffix(".scale")
            return tensor * factors[layer].cpu() if name.endswith(".scale") and layer in factors else tensor

        write_safetensors(temporary, layout, read, METADATA | format.metadata())


def check_dense(folder: Path, format: Format) -> None:
    """Raises ValueError when the checkpoint is unsound or quantized already, or does not fit the format."""
    model = load_model(folder)  # memory-mapped
    if format_of(model) in QUANTIZED:
        raise ValueError(f"{folder} is in {format_of(model)} already: quantize the checkpoint that it was made from")
    for name, layer in sparse_layers(model).items():
        parts = 2 if name.endswith("w13") else 1  # gate and up share no group
        format.within(name).empty(layer.weight.in_features, layer.weight.out_features // parts)
    if (folder / CALIBRATION).exists():
        Calibration.load(folder / CALIBRATION).check(folder)


def read_sequences(folder: Path, corpus: list[Path], tokens: int, seed: int) -> list[list[int]]:
    """Token sequences of the corpus, of at most CONTEXT tokens each."""
    tokenizer, args = Tokenizer.load(folder), model_args(read_config(folder))
    documents = [tokenizer.encode(text) for text in read_corpus(corpus)]
    if sequences := cut_sequences(documents, min(CONTEXT, args.max_position), tokens, seed):
        return sequences
    raise ValueError("the corpus has fewer than 2 tokens: give more text, or a larger --tokens")
