"""Makes a quantized checkpoint from a dense one: rounding to nearest or GPTQ, tuning of scales, and the files around.

Weights are read, quantized and written one tensor at a time, so that memory holds one layer, or one block with GPTQ.
Embeddings, norms and biases are copied. Reading a quantized checkpoint is files/load.py's matter.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_fast.calibration.corpus import encode_corpus
from teal_fast.calibration.passes import cut_sequences
from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION, Calibration, calibration_path
from teal_fast.files.checkpoint import METADATA, WEIGHTS, fingerprint, read_config
from teal_fast.files.load import PACKED, load_model, stored_as
from teal_fast.files.memory import memory_for
from teal_fast.files.store import new_file, open_safetensors, short, write_safetensors
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer
from teal_fast.quantization.gptq_quantizer import GptqQuantizer, check_finite
from teal_fast.quantization.tuning import STEP_TOKENS, tune_scales
from teal_fast.sparse_model import format_of, sparse_layers, sparsify
from teal_fast.weights.blocks import in_blocks
from teal_fast.weights.dense import Weight
from teal_fast.weights.formats import QUANTIZED, Format
from teal_fast.weights.output import Int8Output

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"
SEQUENCE_TOKENS = 1024  # of a sequence, at most
PACKED_NAME = PACKED[METADATA["version"]]  # of a quantized layer's tensor in the file
FULL_PRECISION = (
    "quantize the model in full precision or, to round these values a second time, what "
    "`python -m teal_fast.scripts.convert_gguf --dequantize` makes of the file"
)
Pack = Callable[[str, Tensor], Weight]  # a layer's name and weight [K, N] to its quantized weight


def check_dense(folder: Path, format: Format) -> None:
    """Raises ValueError when the checkpoint is unsound or quantized already, or when the format does not suit it."""
    model = load_model(folder)  # memory-mapped
    if in_blocks(model):
        raise ValueError(f"{folder} holds a GGUF file's own values, in {format_of(model)}: {FULL_PRECISION}")
    if format_of(model) in QUANTIZED:
        raise ValueError(f"{folder} is in {format_of(model)} already: quantize the checkpoint that it was made from")
    for name, layer in sparse_layers(model).items():
        parts = 2 if name.endswith("w13") else 1  # gate and up share no group
        format.within(name).empty(layer.weight.in_features, layer.weight.out_features // parts)
    if (folder / CALIBRATION).exists():
        Calibration.load(folder / CALIBRATION).check(folder)


def rounded_to(folder: Path) -> str | None:
    """What a checkpoint's weights were rounded to before they became its own: a GGUF file's types, as Q4_K_M."""
    with open_safetensors(folder / WEIGHTS) as file:
        found = (file.metadata() or {}).get("rounded_to")
    return None if found is None else short(found)


def read_sequences(folder: Path, corpus: list[Path], tokens: int, seed: int) -> list[list[int]]:
    """Draws `tokens` tokens of the corpus in sequences of at most SEQUENCE_TOKENS. Raises ValueError on less than 2."""
    tokenizer, args = Tokenizer.load(folder), model_args(read_config(folder))
    documents = encode_corpus(corpus, tokenizer, args)
    if sequences := cut_sequences(documents, min(SEQUENCE_TOKENS, args.max_position), tokens, seed):
        return sequences
    raise ValueError("the corpus has fewer than 2 tokens: give more text, or a larger --tokens")


@dataclass(frozen=True)
class Fit:
    """What a quantized checkpoint is fitted to, and by which means: gptq for rounding, tune for the scales.

    calibration: the dense checkpoint's, whose thresholds make inputs sparse; sequences: token ids; device: where the
    computation runs.
    """

    calibration: Calibration
    sequences: list[list[int]]
    device: torch.device
    gptq: bool
    tune: bool


def make_quantized(folder: Path, out: Path, format: Format, fit: Fit | None = None) -> None:
    """Fills the folder `out` with a quantized copy of the dense checkpoint in `folder`, calibration included.

    Without GPTQ weights are rounded to nearest. Raises ValueError on NaN and inf, and on inputs that GPTQ cannot use.
    """

    def pack_nearest(name: str, weight: Tensor) -> Weight:
        return format.within(name).pack(weight)

    if fit and fit.gptq:
        tokens = sum(map(len, fit.sequences))
        with memory_for(f"the hidden states of {tokens} tokens", "lower --tokens, or take another --device"):
            quantizer = GptqQuantizer(folder, format, fit.calibration, fit.sequences, fit.device)
            write_quantized(folder, out, format, quantizer)
        del quantizer  # frees its hidden states
    else:
        write_quantized(folder, out, format, pack_nearest)
    if fit and fit.tune:
        tune_checkpoint(folder, out, format, fit)
    carry_calibration(folder, out)


def write_quantized(folder: Path, out: Path, format: Format, pack: Pack) -> None:
    """Fills the folder `out` with a quantized checkpoint, all but its calibration.

    pack: quantizes a block's linear layer; layers are asked for in the model's order. Raises ValueError on NaN and inf.
    """
    with torch.device("meta"):
        model = sparsify(Transformer(model_args(read_config(folder))), format)
    with open_safetensors(folder / WEIGHTS) as file:
        layout, quantized = {}, set()
        for name, parameter in model.named_parameters():
            stored = stored_as(name, PACKED_NAME)
            if name.endswith((".packed", ".scale")) or name == OUTPUT:
                quantized.add(stored)
            layout[stored] = (parameter.dtype if stored in quantized else file.get_tensor(name).dtype, parameter.shape)
        for path in folder.iterdir():
            if path.is_file() and path.name not in (WEIGHTS, CALIBRATION) and not path.name.startswith("."):
                shutil.copyfile(path, out / path.name)
        source = QuantizedSource(file, quantized, pack)
        write_safetensors(out / WEIGHTS, layout, source.read, METADATA | format.metadata())


class QuantizedSource:
    """The tensors of a quantized checkpoint by stored name, made one layer at a time from an open dense one's.

    quantized: the stored names that belong to quantized layers; all others are passed on unchanged.
    """

    def __init__(self, file: Any, quantized: set[str], pack: Pack):
        self.file, self.names, self.quantized, self.pack = file, set(file.keys()), quantized, pack
        self.parts: dict[str, Tensor] = {}  # of the layer whose tensors are being written

    def load(self, name: str) -> Tensor:
        """The dense checkpoint's tensor; a tied output layer's is the embeddings. Raises ValueError on NaN and inf."""
        tensor = self.file.get_tensor(EMBEDDINGS if name == OUTPUT and name not in self.names else name)
        check_finite(name, tensor)
        return tensor

    def read(self, name: str) -> Tensor:
        if name not in self.quantized:
            return self.load(name)
        if name not in self.parts:
            module = name.rsplit(".", 1)[0]
            weight = self.load(f"{module}.weight")
            is_output = f"{module}.weight" == OUTPUT
            packed = Int8Output.pack(weight) if is_output else self.pack(module, weight)
            prefix = "output." if is_output else f"{module}.weight."
            self.parts = {
                stored_as(prefix + part, PACKED_NAME): tensor.data.cpu() for part, tensor in packed.named_parameters()
            }
        return self.parts[name]


def tune_checkpoint(folder: Path, out: Path, format: Format, fit: Fit) -> None:
    """Tunes the scales of the quantized checkpoint `out` towards the dense one in `folder` (quantization/tuning.py)."""
    # A step takes the first half of a full sequence: 8 s for the demo model on 2 cores.
    sequences = [ids[:STEP_TOKENS] for ids in fit.sequences]
    with memory_for(f"both models in fp32 on {fit.device}, which --tune holds", "try --device cpu"):
        models = (load_model(place, fit.device, torch.float32) for place in (out, folder))
        factors = tune_scales(*models, fit.calibration, sequences)
    with open_safetensors(out / WEIGHTS) as file, new_file(out / WEIGHTS) as temporary:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict); memory-mapped
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}

        def read(name: str) -> Tensor:
            tensor, layer = stored[name], name.removesuffix(".scale")
            return tensor * factors[layer].cpu() if name.endswith(".scale") and layer in factors else tensor

        write_safetensors(temporary, layout, read, METADATA | format.metadata())


def carry_calibration(folder: Path, out: Path) -> None:
    """Writes the calibration of `folder`, if it has one, into `out` as that checkpoint's own: thresholds stay valid."""
    if (path := calibration_path(folder)).exists():
        replace(Calibration.load(path), model=fingerprint(out)).save(out / CALIBRATION)
