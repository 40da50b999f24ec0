"""The models that a benchmark measures: one model's checkpoints in several formats, or random weights in its shapes."""

from dataclasses import dataclass

import torch

from teal_fast.benchmarks.shapes import COMMON, SHAPES, calibrate_on_random_tokens, random_model
from teal_fast.cli import ModelChoice, open_model
from teal_fast.files.calibration import Calibration
from teal_fast.model import Transformer
from teal_fast.weights.formats import DTYPES, FORMATS, Format


@dataclass(frozen=True)
class Choice:
    """Which models: `checkpoints` of one model, or random weights in the shapes of `shape` in all `formats`.

    dtype: bf16, fp16 or fp32; None for the stored one, and bf16 for random weights.
    """

    device: torch.device
    checkpoints: tuple[str, ...] = ()
    shape: str | None = None
    formats: tuple[str, ...] = ("dense",)
    dtype: str | None = None

    def load(self, calibrated: bool = True) -> list[tuple[Transformer, Calibration | None]]:
        """The models and, if asked for, their calibrations; random models are calibrated on random tokens."""
        if self.shape is None:
            return self._load_checkpoints(calibrated)
        config, dtype = COMMON | SHAPES[self.shape], DTYPES[self.dtype or "bf16"]
        groups = {"int4": 128 if config["hidden_size"] % 128 == 0 else 64}  # outputs a scale
        formats = [Format(name, groups.get(name, 0)) if name in FORMATS else None for name in self.formats]
        models = [random_model(config, self.device, dtype, format=format) for format in formats]
        return [(model, calibrate_on_random_tokens(model) if calibrated else None) for model in models]

    def _load_checkpoints(self, calibrated: bool) -> list[tuple[Transformer, Calibration | None]]:
        choices = [ModelChoice(name, str(self.device), self.dtype) for name in self.checkpoints]
        opened = [open_model(choice, calibrated) for choice in choices]
        if any(one.model.args != opened[0].model.args for one in opened):
            raise ValueError("--checkpoint takes formats of one model, got several models: run them one by one")
        return [(one.model, one.calibration) for one in opened]
