"""Calibrations made up for tests, and exported folders without weights."""

import json
from pathlib import Path
from typing import Any

import torch

from teal_fast.families.config import model_args
from teal_fast.files.calibration import Calibration, layer_inputs
from teal_fast.files.checkpoint import CONFIG, sizes
from teal_fast.files.exported import Exported, TealConfig
from teal_fast.tests.models import TINY


def make_up_calibration(config: dict[str, Any], weights: str) -> Calibration:
    """Thresholds from 0 to 1, and to 2, 3 … in further layers; one layer's differ by channel. weights: their hash."""
    args = model_args(config)
    inputs = layer_inputs(args)
    curves = {name: torch.linspace(0, 1 + i, 11) for i, name in enumerate(inputs)}
    factors = {"layers.1.attention.wo": torch.linspace(0.5, 1.5, inputs["layers.1.attention.wo"])}
    return Calibration(curves, sizes(args) | {"weights": weights}, {"corpus": "none"}, factors)


def teal_config(calibration: Calibration, **more: Any) -> TealConfig:
    """The block of an export at 50 %."""
    return TealConfig(**{"sparsity": 0.5, "fingerprint": calibration.model["weights"]} | more)


def write_exported(folder: Path) -> Exported:
    """The small files of an exported folder of a tiny Llama."""
    calibration = make_up_calibration(TINY, "0123456789abcdef")
    exported = Exported.of(TINY, teal_config(calibration), calibration)
    write_block(folder, exported.config.to_dict())
    exported.write(folder)
    return exported


def write_block(folder: Path, block: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(TINY | {"quantization_config": block}))
