"""Exported folders: Hugging Face's own tensors, a config.json that transformers reads, and the way back."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION, Calibration, layer_inputs
from teal_fast.files.checkpoint import WEIGHTS, fingerprint, read_config
from teal_fast.files.exported import TealConfig, open_exported
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.scripts.export_hf import export
from teal_fast.tests.family_models import FAMILIES, make_family, write_family


def make_up_calibration(folder) -> Calibration:
    """A calibration of the checkpoint, of arbitrary thresholds, one layer's with factors; written beside it."""
    inputs = layer_inputs(model_args(read_config(folder)))
    curves = {name: torch.linspace(0, 1 + i, 11) for i, name in enumerate(inputs)}
    factors = {"layers.1.attention.wo": torch.linspace(0.5, 1.5, inputs["layers.1.attention.wo"])}
    calibration = Calibration(curves, fingerprint(folder), {"corpus": "none"}, factors)
    calibration.save(folder / CALIBRATION)
    return calibration


def teal_config(calibration: Calibration, **more) -> TealConfig:
    return TealConfig(**{"sparsity": 0.5, "fingerprint": calibration.model["weights"]} | more)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_there_and_back(family, tmp_path):
    theirs, ours, out, back = make_family(family), tmp_path / "ours", tmp_path / "out", tmp_path / "back"
    convert_huggingface(write_family(theirs, tmp_path / "hf"), ours, torch.bfloat16)
    calibration = make_up_calibration(ours)
    export(ours, out, teal_config(calibration), calibration)

    source, exported = load_file(tmp_path / "hf" / WEIGHTS), load_file(out / WEIGHTS)
    assert exported.keys() == source.keys() - ({"lm_head.weight"} - exported.keys())
    for name, tensor in exported.items():
        # Of what becomes 1 + w or w / 0.5, rounded, several w may be the source.
        error = 2**-7 if "norm" in name else 0
        torch.testing.assert_close(tensor, source[name].bfloat16(), rtol=error, atol=error)

    linear = {name: module for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    assert open_exported(out).inputs == {name: linear[name].in_features for name in linear if name != "lm_head"}
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.architectures, config.dtype) == ([type(theirs).__name__], torch.bfloat16)

    convert_huggingface(out, back, None)
    for name in (WEIGHTS, CALIBRATION):
        assert (back / name).read_bytes() == (ours / name).read_bytes()
