"""The Hugging Face folder that scripts/export_hf.py writes, as other engines' adapters read it.

    config.json                    a Hugging Face config.json whose `quantization_config` is a `TealConfig`
    model.safetensors, …           dense weights in Hugging Face's names and order
    model.safetensors.index.json   which files have weights; see `write_index`
    teal_thresholds.safetensors    fp32 [K] by module name, at the block's sparsity; for programs without this project
    teal_calibration.safetensors   the calibration, which gives thresholds at any other sparsity

Adapters go by the calibration; that the thresholds agree with it is checked. No other engine is imported here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_fast.families.config import is_teal, model_args
from teal_fast.families.tensors import Tensors
from teal_fast.files.calibration import Calibration, layer_inputs
from teal_fast.files.checkpoint import CONFIG, WEIGHTS, read_config, sizes
from teal_fast.files.store import new_file, open_safetensors, short, write_safetensors

METHOD, VERSION = "teal", 1
INDEX = f"{WEIGHTS}.index.json"
MODES = ("decode", "mask")
AGAIN = "make the folder again with `python -m teal_fast.scripts.export_hf`"


@dataclass(frozen=True)
class TealConfig:
    """config.json's `quantization_config`: how much is skipped, and when. Raises ValueError on a bad value.

    sparsity: nominal, 0 to 1; at 0 all is dense. mode: "decode", calls of at most `max_m` tokens (batch x tokens) are
    sparse and others dense; or "mask", all are sparse. fingerprint: the weights' hash in the calibration.
    thresholds, calibration: names of files in the same folder.
    """

    sparsity: float
    fingerprint: str
    mode: str = "decode"
    max_m: int = 1
    thresholds: str = "teal_thresholds.safetensors"
    calibration: str = "teal_calibration.safetensors"

    def __post_init__(self):
        expected = {
            "sparsity": (type(self.sparsity) in (int, float) and 0 <= self.sparsity <= 1, "a number from 0 to 1"),
            "mode": (self.mode in MODES, " or ".join(map(repr, MODES))),
            "max_m": (type(self.max_m) is int and self.max_m >= 1, "a whole number of at least 1"),
            "fingerprint": (isinstance(self.fingerprint, str) and self.fingerprint, "a text"),
        } | {name: (is_file_name(getattr(self, name)), "a file's name") for name in ("thresholds", "calibration")}
        for name, (sound, what) in expected.items():
            if not sound:
                raise ValueError(f"quantization_config: {name} is {short(getattr(self, name))}, expected {what}")

    @classmethod
    def from_dict(cls, block: dict[str, Any]) -> "TealConfig":
        """Reads the block. Raises ValueError naming the first key that is missing, unknown or unsound."""
        if not is_teal(block):
            method = block.get("quant_method") if isinstance(block, dict) else block
            raise ValueError(f"quantization_config: quant_method is {short(method)}, expected {METHOD!r}: {AGAIN}")
        if (version := block.get("version")) != VERSION or type(version) is not int:
            todo = f"{AGAIN}, or update teal-fast"
            raise ValueError(f"quantization_config: version is {short(version)}, expected {VERSION}: {todo}")
        names = [field.name for field in fields(cls)]
        if differing := sorted(block.keys() ^ {"quant_method", "version", *names}):
            side = "lacks" if differing[0] in names else "has the unknown"
            raise ValueError(f"quantization_config {side} {short(differing[0])}: {AGAIN}")
        return cls(**{name: block[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The block, as `from_dict` reads it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"quant_method": METHOD, "version": VERSION} | values

    @property
    def most(self) -> int | None:
        """The most tokens of a call that skips channels, all sequences together; None for any number."""
        return None if self.mode == "mask" else self.max_m

    def sparse(self, tokens: int) -> bool:
        return is_sparse(tokens, self.most)


def is_sparse(tokens: int, most: int | None) -> bool:
    """Whether a call of so many tokens skips channels; see `TealConfig.most`."""
    return most is None or tokens <= most


def is_file_name(given: Any) -> bool:
    """Whether this names a safetensors file, and none outside its folder."""
    return isinstance(given, str) and given.endswith(".safetensors") and Path(given).name == given


@contextmanager
def plain_defaults() -> Iterator[None]:
    """In a block or a decorated function tensors are made in fp32 on the CPU, which loaders of other engines change."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Exported:
    """What an exported folder says besides its weights.

    layers: what a module of Hugging Face's is part of in the calibration, by module name ("model.layers.0.mlp.up_proj":
    "layers.0.feed_forward.w13"); q, k and v share a layer, and so do gate and up. inputs: K of each module.
    """

    config: TealConfig
    calibration: Calibration
    layers: dict[str, str]
    inputs: dict[str, int]

    @classmethod
    def of(cls, config: dict[str, Any], teal: TealConfig, calibration: Calibration) -> "Exported":
        """config: a config.json. Raises ValueError when the calibration is another model's."""
        args, todo = model_args(config), AGAIN
        calibration.check_model(sizes(args) | {"weights": teal.fingerprint}, args, todo)
        names, inputs = Tensors(config, args).names, layer_inputs(args)
        layers = {}
        for layer in inputs:
            _, i, module = layer.split(".", 2)
            layers |= {part.format(i): layer for part in names[f"layers.{{}}.{module}"]}
        return cls(teal, calibration, layers, {name: inputs[layer] for name, layer in layers.items()})

    @plain_defaults()
    def thresholds(self, sparsity: float | None = None) -> dict[str, Tensor]:
        """Of each module, by name, fp32 [K], contiguous: a channel is skipped where |x| <= threshold.

        sparsity None: the block's. Modules of one layer have the same tensor. At 0 thresholds are below every |x|.
        """
        sparsity = self.config.sparsity if sparsity is None else sparsity
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if layer not in found:
                found[layer] = self.calibration.threshold(layer, sparsity).expand(self.inputs[name]).contiguous()
        return {name: found[layer] for name, layer in self.layers.items()}

    def at(self, sparsity: float) -> "Exported":
        """The same, at another sparsity."""
        return replace(self, config=replace(self.config, sparsity=sparsity))

    def write(self, folder: Path) -> None:
        """Writes thresholds and calibration; config.json is written by those who write weights."""
        thresholds = self.thresholds()
        layout = {name: (torch.float32, threshold.shape) for name, threshold in thresholds.items()}
        with new_file(folder / self.config.thresholds) as temporary:
            write_safetensors(temporary, layout, thresholds.__getitem__, self.metadata(), progress=None)
        self.calibration.save(folder / self.config.calibration)

    def metadata(self) -> dict[str, str]:
        """What the thresholds' file says of itself."""
        about = {"fingerprint": self.config.fingerprint, "sparsity": str(float(self.config.sparsity))}
        return {"format": "pt", "version": str(VERSION)} | about


@plain_defaults()
def open_exported(folder: Path) -> Exported:
    """Reads an exported folder's config.json, thresholds and calibration, no weights.

    Raises FileNotFoundError, or ValueError in one line when something is unsound or belongs to another model.
    """
    config = read_config(folder)
    if not is_teal(block := config.get("quantization_config")):
        raise ValueError(f"{folder / CONFIG} has no quantization_config of quant_method {METHOD!r}: {AGAIN}")
    try:
        teal = TealConfig.from_dict(block)
        exported = Exported.of(config, teal, Calibration.load(folder / teal.calibration))
        check_thresholds(folder / teal.thresholds, exported)
    except ValueError as error:
        raise ValueError(f"{folder}: {str(error).removeprefix(f'{folder}/')}") from error
    return exported


def write_index(folder: Path, where: dict[str, str], size: int) -> None:
    """Writes which file has each weight, also where there is one: vLLM takes what no index names for weights.

    size: bytes of all weights.
    """
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_thresholds(path: Path, exported: Exported) -> None:
    """Raises ValueError unless the file has the thresholds that the calibration gives."""
    expected = exported.thresholds()
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        for name, value in exported.metadata().items():
            if metadata.get(name) != value:
                raise ValueError(f"{path}: {name} is {short(metadata.get(name))}, expected {value!r}: {AGAIN}")
        if differing := sorted(expected.keys() ^ set(file.keys())):
            side = "lacks" if differing[0] in expected else "has, unlike the model,"
            raise ValueError(f"{path} {side} {short(differing[0])}: {AGAIN}")
        for name, threshold in expected.items():
            found = file.get_slice(name)
            if (found.get_dtype(), found.get_shape()) != ("F32", list(threshold.shape)):
                kind = f"{found.get_dtype()} {short(found.get_shape())}"
                raise ValueError(f"{path}: {name} is {kind}, expected F32 {list(threshold.shape)}: {AGAIN}")
            if not torch.allclose(file.get_tensor(name), threshold, rtol=1e-5, atol=0):
                raise ValueError(f"{path}: {name} is not what the calibration gives: {AGAIN}")
