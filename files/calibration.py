"""Calibrations: the thresholds of a model's sparse layers for any sparsity, as one file beside the weights.

Thresholds depend on how a model's hidden states are spread, so that they are measured once (calibration/) and kept with
a fingerprint of the model they belong to and with what they were measured on. A file may come from anyone, by the hub:
everything in it is checked before use, its metadata by their whole schema. How thresholds are found is not said here.
"""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from teal_fast.families.config import model_args
from teal_fast.families.fields import LARGEST
from teal_fast.files.checkpoint import FINGERPRINT, fingerprint, read_config
from teal_fast.files.paths import DATA, command
from teal_fast.files.store import new_file, open_safetensors, parse_json, short
from teal_fast.model import ModelArgs, Transformer
from teal_fast.sparse_model import KEEP_ALL, sparse_layers
from teal_fast.weights.shards import Shard

CALIBRATION = "calibration.safetensors"
CALIBRATION_VERSION = "2"
SHIPPED = DATA / "demo-calibration.safetensors"  # the demo model's, made by calibrate.py's defaults
FACTOR = ".factor"  # what a layer's factors are called in the file, after its name
MOST_POINTS, MOST_INPUTS = 2**16, LARGEST  # of a curve, of a layer: more is a corrupt file
AGAIN = f"run `{command('calibrate')}` again"


@dataclass(frozen=True)
class Calibration:
    """Thresholds of every sparse layer for any sparsity of the model, by bytes of its sparse layers' rows.

    curves: by module name, fp32 [points], ascending, the layer's threshold at model sparsities evenly spaced from 0 to
    1. model: `checkpoint.fingerprint` of the model it belongs to. origin: what it was measured on (corpus, tokens,
    seed) and how (method). factors: by module name, fp32 [K], what a layer's threshold is times for each channel;
    layers without one have the same for all.
    """

    curves: dict[str, Tensor]
    model: dict[str, str]
    origin: dict[str, str]
    factors: dict[str, Tensor] = field(default_factory=dict)

    def threshold(self, name: str, sparsity: float) -> Tensor:
        """Of layer `name` at a model sparsity: fp32 [K], or a scalar where channels share it; linear between points."""
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity {sparsity}: expected a fraction from 0 to 1")
        if sparsity == 0:
            return torch.tensor(KEEP_ALL)
        points = self.curves[name]
        position = sparsity * (len(points) - 1)
        below = min(int(position), len(points) - 2)
        threshold = torch.lerp(points[below], points[below + 1], position - below)
        return threshold * self.factors[name] if name in self.factors else threshold

    def part(self, shard: Shard) -> "Calibration":
        """That of a shard of the model: a layer's factors go with its inputs."""
        factors = {name: factor[shard.inputs(name, len(factor))] for name, factor in self.factors.items()}
        return replace(self, factors=factors)

    def save(self, path: Path) -> None:
        """Writes the file whole or leaves what was there."""
        about = {"version": CALIBRATION_VERSION, "model": self.model, "origin": self.origin}
        tensors = self.curves | {name + FACTOR: factor for name, factor in self.factors.items()}
        with new_file(path) as temporary:
            # One entry of metadata: of several, safetensors shuffles the order, and equal files should be equal bytes.
            temporary.write_bytes(save(tensors, {"calibration": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Raises FileNotFoundError, or ValueError when the file is not a sound calibration of this version."""
        with open_safetensors(path) as file:
            about = _read_about(path, file.metadata() or {})
            tensors = {name: _read_values(path, file, name) for name in sorted(file.keys())}
        factors = {name.removesuffix(FACTOR): tensors.pop(name) for name in list(tensors) if name.endswith(FACTOR)}
        lengths = Counter(map(len, tensors.values()))
        usual = max(lengths, key=lengths.__getitem__, default=0)
        for name, points in tensors.items():
            if len(points) != usual:
                raise ValueError(f"{path}: {short(name)} has {len(points)} points, others {usual}: {AGAIN}")
        return cls(tensors, about["model"], about["origin"], factors)

    def check(self, folder: Path) -> None:
        """Raises ValueError naming what differs when this is not the calibration of the checkpoint in `folder`."""
        args, todo = model_args(read_config(folder)), f"run `{command('calibrate')} --checkpoint {folder}`"
        self.check_model(fingerprint(folder), args, todo)

    def check_model(self, expected: dict[str, str], args: ModelArgs, todo: str) -> None:
        """The same by the model's fingerprint and sizes. todo: what the user can do."""
        if differing := [name for name in expected if self.model.get(name) != expected[name]]:
            found = ", ".join(
                f"{name} {short(self.model.get(name))} (checkpoint: {expected[name]!r})" for name in differing
            )
            raise ValueError(f"the calibration is another model's: it has {found}; {todo}")
        inputs = layer_inputs(args)
        if differing := sorted(inputs.keys() ^ self.curves.keys()) or sorted(self.factors.keys() - inputs.keys()):
            side = "lacks" if differing[0] in inputs else "has, unlike the model,"
            raise ValueError(f"the calibration {side} layer {short(differing[0])}: {todo}")
        for name, factor in self.factors.items():
            if len(factor) != inputs[name]:
                found = f"{len(factor)} factors, the layer {inputs[name]} inputs"
                raise ValueError(f"the calibration's {name}{FACTOR} has {found}: {todo}")


def _read_about(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The metadata's one entry: version, model and origin, and nothing else."""
    if "calibration" not in metadata:
        raise ValueError(f"{path} has no metadata called calibration, with version, model and origin: {AGAIN}")
    about = parse_json(metadata["calibration"], f"{path}: calibration", todo=AGAIN)
    if (version := about.get("version")) != CALIBRATION_VERSION:
        raise ValueError(f"{path}: version is {short(version)}, expected {CALIBRATION_VERSION!r}: {AGAIN}")
    for key in ("model", "origin"):
        if not isinstance(found := about.get(key), dict):
            raise ValueError(f"{path}: {key} is {short(found)}, expected an object of texts: {AGAIN}")
        for name, value in found.items():
            if not isinstance(value, str):
                raise ValueError(f"{path}: {key}.{short(name)} is {short(value)}, expected a text: {AGAIN}")
    if extra := sorted(about.keys() - {"version", "model", "origin"}):
        raise ValueError(f"{path}: {short(extra[0])} is unknown, expected version, model and origin: {AGAIN}")
    if differing := sorted(set(FINGERPRINT) ^ about["model"].keys()):
        side = "lacks" if differing[0] in FINGERPRINT else "has the unknown"
        raise ValueError(f"{path}: model {side} {short(differing[0])}: {AGAIN}")
    return about


def _read_values(path: Path, file: Any, name: str) -> Tensor:
    """A layer's curve or, by its name, its factors. Type and shape are looked at before memory is taken."""
    part, is_factor = file.get_slice(name), name.endswith(FACTOR)
    dtype, shape = part.get_dtype(), part.get_shape()
    least, most = (1, MOST_INPUTS) if is_factor else (2, MOST_POINTS)
    if dtype != "F32" or len(shape) != 1 or not least <= shape[0] <= most:
        expected = f"F32 of {least} to {most} values"
        raise ValueError(f"{path}: {short(name)} is {dtype} {short(shape)}, expected {expected}: {AGAIN}")
    values = file.get_tensor(name)
    sound = (values > 0) if is_factor else torch.cat((values[:1] >= 0, values.diff() >= 0))
    if not (sound & values.isfinite()).all():
        expected = "positive" if is_factor else "ascending from at least 0"
        raise ValueError(f"{path}: values of {short(name)} are not finite and {expected}: {AGAIN}")
    return values


def layer_inputs(args: ModelArgs) -> dict[str, int]:
    """How many input channels each sparse layer has, by module name."""
    query = args.n_heads * args.head_dim
    sizes = {"attention.wqkv": args.dim, "attention.wo": query, "feed_forward.w13": args.dim}
    sizes["feed_forward.w2"] = args.ffn_dim
    return {f"layers.{i}.{name}": size for i in range(args.n_layers) for name, size in sizes.items()}


def set_sparsity(model: Transformer, calibration: Calibration | None, sparsity: float) -> None:
    """Sets every layer's thresholds in place so that a share `sparsity` of the sparse layers' bytes is not read.

    Sparsity 0 needs no calibration.
    """
    for name, layer in sparse_layers(model).items():
        layer.threshold.copy_(calibration.threshold(name, sparsity) if sparsity else torch.tensor(KEEP_ALL))


class MissingCalibrationError(FileNotFoundError):
    """A checkpoint has no calibration yet; commands make one (cli.py)."""


def calibration_path(folder: Path) -> Path:
    """The checkpoint's own calibration or, for the demo model, the one that ships with the project."""
    own = folder / CALIBRATION
    if not own.exists() and SHIPPED.exists() and Calibration.load(SHIPPED).model == fingerprint(folder):
        return SHIPPED
    return own


def load_calibration(folder: Path, path: Path | None = None) -> Calibration:
    """The calibration at `path`, or the checkpoint's own (see `calibration_path`). Raises ValueError on a misfit.

    Raises MissingCalibrationError, a FileNotFoundError, when there is none.
    """
    if path is None and not (path := calibration_path(folder)).exists():
        raise MissingCalibrationError(
            f"{folder} has no calibration: run `{command('calibrate')} --checkpoint {folder}`"
        )
    calibration = Calibration.load(path)
    calibration.check(folder)
    return calibration


def find_calibration(folder: Path, path: Path | None = None) -> Calibration | None:
    """`load_calibration`, but None for a checkpoint that has none of its own yet."""
    try:
        return load_calibration(folder, path)
    except MissingCalibrationError:
        return None
