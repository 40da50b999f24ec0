"""TODO."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from teal_fast.files.checkpoint import WEIGHTS, fingerprint
from teal_fast.files.paths import DATA
from teal_fast.files.store import new_file, open_safetensors
from teal_fast.model import Transformer
from teal_fast.sparse_model import KEEP_ALL, SPARSE_WEIGHT, sparse_layers

CALIBRATION = "calibration.safetensors"
CALIBRATION_VERSION = "2"
SHIPPED = DATA / "demo-calibration.safetensors"  # the demo model's, made by calibrate.py's defaults
FACTOR = ".factor"  # what a layer's factors are called in the file, after its name


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
            about = json.loads((file.metadata() or {}).get("calibration", "{}"))
            if about.get("version") != CALIBRATION_VERSION:
                raise ValueError(f"{path} is no calibration of version {CALIBRATION_VERSION}: run calibrate.py again")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, values in tensors.items():
            row = values.dtype == torch.float32 and values.ndim == 1 and len(values) > 1 and values.isfinite().all()
            if not (row and ((values >= 0) if name.endswith(FACTOR) else values.diff() >= 0).all()):
                expected = "fp32 of at least 0" if name.endswith(FACTOR) else "ascending fp32"
                raise ValueError(f"{path}: values of {name} are not {expected}: run calibrate.py again")
        factors = {name.removesuffix(FACTOR): tensors.pop(name) for name in list(tensors) if name.endswith(FACTOR)}
        return cls(tensors, about["model"], about["origin"], factors)

    def check(self, folder: Path) -> None:
        """Raises ValueError naming what differs when this is not the calibration of the checkpoint in `folder`."""
        expected = fingerprint(folder)
        if differing := [name for name in expected if self.model.get(name) != expected[name]]:
            found = ", ".join(f"{name} {self.model.get(name)} (checkpoint: {expected[name]})" for name in differing)
            raise ValueError(f"the calibration is another model's: it has {found}; run calibrate.py on {folder}")
        with open_safetensors(folder / WEIGHTS) as file:
            layers = {name.removesuffix(".weight") for name in file.keys() if SPARSE_WEIGHT.fullmatch(name)}  # noqa: SIM118
        if differing := sorted(layers ^ self.curves.keys()):
            side = "lacks" if differing[0] in layers else "has, unlike the model,"
            raise ValueError(f"the calibration {side} layer {differing[0]}: run calibrate.py on {folder}")


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
        raise MissingCalibrationError(f"{folder} has no calibration: run `python calibrate.py --checkpoint {folder}`")
    calibration = Calibration.load(path)
    calibration.check(folder)
    return calibration
