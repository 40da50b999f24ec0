"""Makes a quantized checkpoint from a dense one: rounding to nearest or GPTQ, tuning of scales, and the files around.

Weights are read, quantized and written one tensor at a time, so that memory holds one layer, or one block with GPTQ.
Embeddings, norms and biases are copied. Reading a quantized checkpoint is files/load.py's matter.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_fast.calibration.corpus import encode_corpus
from teal_fast.calibration.passes import cut_sequences
from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION, Calibration, calibration_path
from teal_fast.files.checkpoint import METADATA, SOURCE, WEIGHTS, fingerprint, read_config, source_of
from teal_fast.files.load import PACKED, keeps_type, load_model, stored_as
from teal_fast.files.memory import memory_for
from teal_fast.files.store import new_file, open_safetensors, write_safetensors
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.kernels.block_planes import NARROW
from teal_fast.model import Transformer
from teal_fast.quantization.gptq_quantizer import GptqQuantizer, check_finite
from teal_fast.quantization.mixtures import MIXTURES, make_format
from teal_fast.quantization.tuning import STEP_TOKENS, tune_scales
from teal_fast.sparse_model import format_of, sparse_layers, sparsify
from teal_fast.weights.blocks import BlockWeight, in_blocks
from teal_fast.weights.dense import Weight
from teal_fast.weights.formats import FORMATS, BlockFormat, Format, LayerBlocks

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"
ROUNDING_TOKENS, TUNING_TOKENS = 2048, 65536  # by default: a model of 1.5B is rounded in 12 minutes on 2 cores
ROUNDING_LENGTH, TUNING_LENGTH = 256, 1024  # of a sequence, at most: few tokens come from several texts
TENSOR = re.compile(r"(\.weight)?\.(packed|scale|weight|parts\..+)$")  # what follows a quantized layer's name
FULL_PRECISION = (
    "quantize the model in full precision or, to round these values a second time, what "
    "`python -m teal_fast.scripts.convert_gguf --dequantize` makes of the file"
)
Pack = Callable[[str, Tensor], Weight]  # a layer's name and weight [K, N] to its quantized weight


def choose_format(folder: Path, mode: str, group: int | None) -> tuple[Format | BlockFormat, str | None]:
    """The format that a mode of quantize.py means for this checkpoint, and what there is to say of it.

    Raises ValueError when the checkpoint is unsound or quantized already, or when the format does not suit it.
    """
    model = load_model(folder)  # memory-mapped
    if in_blocks(model) and format_of(model) not in MIXTURES:
        raise ValueError(f"{folder} holds a GGUF file's own values, in {format_of(model)}: {FULL_PRECISION}")
    if format_of(model) in (*FORMATS, *MIXTURES):
        raise ValueError(f"{folder} is in {format_of(model)} already: quantize the checkpoint that it was made from")
    if (folder / CALIBRATION).exists():
        Calibration.load(folder / CALIBRATION).check(folder)
    if mode in MIXTURES:
        return make_format(mode, model.args, model.norm.weight.dtype)
    format = Format(mode, (group or 64) if mode == "int4" else 0)
    for name, layer in sparse_layers(model).items():
        parts = 2 if name.endswith("w13") else 1  # gate and up share no group
        format.within(name).empty(layer.weight.in_features, layer.weight.out_features // parts)
    return format, None


def read_sequences(folder: Path, corpus: list[Path], tokens: int, length: int, seed: int) -> list[list[int]]:
    """Draws `tokens` tokens of the corpus in sequences of at most `length`. Raises ValueError on less than 2."""
    tokenizer, args = Tokenizer.load(folder), model_args(read_config(folder))
    documents = encode_corpus(corpus, tokenizer, args)
    if sequences := cut_sequences(documents, min(length, args.max_position), tokens, seed, tokenizer.prefix):
        return sequences
    raise ValueError("the corpus has fewer than 2 tokens: give more text, or a larger --tokens")


@dataclass(frozen=True)
class Fit:
    """What a quantized checkpoint is fitted to, and by which means: GPTQ for rounding, tuning for the scales.

    calibration: the dense checkpoint's, whose thresholds make inputs sparse; device: where the computation runs;
    rounding, tuning: token ids of the sequences for each, none where it is not to be done.
    """

    calibration: Calibration
    device: torch.device
    rounding: list[list[int]]
    tuning: list[list[int]]


def make_quantized(folder: Path, out: Path, format: Format | BlockFormat, fit: Fit | None = None) -> None:
    """Fills the folder `out` with a quantized copy of the dense checkpoint in `folder`, calibration included.

    Without GPTQ weights are rounded to nearest. Raises ValueError on NaN and inf, and on inputs that GPTQ cannot use.
    """

    def pack_nearest(name: str, weight: Tensor) -> Weight:
        return format.within(name).pack(weight)

    if fit and fit.rounding:
        tokens = sum(map(len, fit.rounding))
        with memory_for(f"the hidden states of {tokens} tokens", "lower --tokens, or take another --device"):
            quantizer = GptqQuantizer(folder, format, fit.calibration, fit.rounding, fit.device)
            write_quantized(folder, out, format, quantizer)
        del quantizer  # frees its hidden states
    else:
        write_quantized(folder, out, format, pack_nearest)
    if fit and fit.tuning:
        tune_checkpoint(folder, out, format, fit)
    carry_calibration(folder, out)


def write_quantized(folder: Path, out: Path, format: Format | BlockFormat, pack: Pack) -> None:
    """Fills the folder `out` with a quantized checkpoint, all but its calibration.

    pack: quantizes a block's linear layer; layers are asked for in the model's order. Raises ValueError on NaN and inf.
    """
    with torch.device("meta"):
        model = sparsify(Transformer(model_args(read_config(folder))), format)
    metadata = metadata_of(folder, format)
    packed_name = PACKED[metadata["version"]]
    with open_safetensors(folder / WEIGHTS) as file:
        source = QuantizedSource(file, format, pack)
        names = {stored_as(name, packed_name): name for name, _ in model.named_parameters()}
        source.made_of = {stored: name for stored, name in names.items() if stored not in source.names}
        layout = {}
        for stored, name in names.items():
            parameter = model.get_parameter(name)
            if stored in source.made_of and keeps_type(name, parameter):
                dtype = parameter.dtype
            else:
                was = f"{TENSOR.sub('', name)}.weight" if stored in source.made_of else stored
                dtype = file.get_tensor(was).dtype
            layout[stored] = (dtype, parameter.shape)
        for path in folder.iterdir():
            if path.is_file() and path.name not in (WEIGHTS, CALIBRATION) and not path.name.startswith("."):
                shutil.copyfile(path, out / path.name)
        write_safetensors(out / WEIGHTS, layout, source.read, metadata)


def metadata_of(folder: Path, format: Format | BlockFormat) -> dict[str, str]:
    """What the weights of a copy in this format say of themselves, and that they were made of those in `folder`."""
    return METADATA | format.metadata() | {SOURCE: source_of(folder)}


class QuantizedSource:
    """The tensors of a quantized checkpoint by stored name, made one layer at a time from an open dense one's.

    made_of: the parameter's name in the model by the stored name, of quantized layers; all other tensors are passed on
    unchanged.
    """

    def __init__(self, file: Any, format: Format | BlockFormat, pack: Pack):
        self.file, self.names, self.format, self.pack = file, set(file.keys()), format, pack
        self.made_of: dict[str, str] = {}
        self.parts: dict[str, Tensor] = {}  # by parameter, of the layer whose tensors are being written

    def load(self, name: str) -> Tensor:
        """The dense checkpoint's tensor; a tied output layer's is the embeddings. Raises ValueError on NaN and inf."""
        tensor = self.file.get_tensor(EMBEDDINGS if name == OUTPUT and name not in self.names else name)
        check_finite(name, tensor)
        return tensor

    def read(self, stored: str) -> Tensor:
        if (name := self.made_of.get(stored)) is None:
            return self.load(stored)
        if name not in self.parts:
            module = TENSOR.sub("", name)
            weight = self.load(f"{module}.weight")
            if module.startswith("layers."):
                packed, prefix = self.pack(module, weight), f"{module}.weight."
            else:
                packed = self.format.pack_end(module, weight)
                prefix = f"{module}.weight." if isinstance(packed, BlockWeight) else f"{module}."
            self.parts = {prefix + part: tensor.data.cpu() for part, tensor in packed.named_parameters()}
        return self.parts[name]


def tune_checkpoint(folder: Path, out: Path, format: Format | BlockFormat, fit: Fit) -> None:
    """Tunes the scales of the quantized checkpoint `out` towards the dense one in `folder` (quantization/tuning.py)."""
    # A step takes the first half of a full sequence: 8 s for the demo model on 2 cores.
    sequences = [ids[:STEP_TOKENS] for ids in fit.tuning]
    with memory_for(f"both models in fp32 on {fit.device}, which --tune holds", "try --device cpu"):
        models = (load_model(place, fit.device, torch.float32) for place in (out, folder))
        factors = tune_scales(*models, fit.calibration, sequences)
    with open_safetensors(out / WEIGHTS) as file, new_file(out / WEIGHTS) as temporary:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict); memory-mapped
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}

        def read(name: str) -> Tensor:
            tensor, module = stored[name], TENSOR.sub("", name)
            if module not in factors or not tensor.is_floating_point():
                return tensor
            return tensor * factor_of(name, factors[module].cpu(), format.within(module))

        write_safetensors(temporary, layout, read, metadata_of(folder, format))


def factor_of(name: str, factor: Tensor, format: Format | LayerBlocks) -> Tensor | float:
    """What a layer's floats of this name are multiplied by when its outputs are, each by its entry of `factor` [N].

    Of a part of a weight in blocks these are the scales above all others.
    """
    if not isinstance(format, LayerBlocks):
        return factor if name.endswith(".scale") else 1.0
    outputs = [N for _, N in format.parts]
    part = factor.split(outputs)[int(name.split(".parts.")[1].split(".")[0])]
    return F.pad(part, (0, -len(part) % NARROW), value=1.0)


def carry_calibration(folder: Path, out: Path) -> None:
    """Writes the calibration of `folder`, if it has one, into `out` as that checkpoint's own: thresholds stay valid."""
    if (path := calibration_path(folder)).exists():
        replace(Calibration.load(path), model=fingerprint(out)).save(out / CALIBRATION)
