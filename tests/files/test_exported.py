"""What an exported folder says to other engines' adapters, and that a damaged one says it in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal_fast.files.calibration import Calibration
from teal_fast.files.exported import TealConfig, open_exported
from teal_fast.tests.exported import make_up_calibration, write_block, write_exported
from teal_fast.tests.models import TINY

BLOCK = TealConfig(0.5, "0123456789abcdef").to_dict()


def changed(**more) -> dict:
    return {name: value for name, value in (BLOCK | more).items() if value is not None}


def test_the_block_is_read_as_it_was_written():
    assert TealConfig.from_dict(json.loads(json.dumps(BLOCK))) == TealConfig(0.5, "0123456789abcdef")
    assert BLOCK["quant_method"] == "teal" and BLOCK["version"] == 1


@pytest.mark.parametrize(
    "block, message",
    [
        (None, "has no quantization_config of quant_method 'teal'"),
        (changed(quant_method="gptq"), "has no quantization_config of quant_method 'teal'"),
        (changed(version=2), "version is 2, expected 1: make the folder again"),
        (changed(version=True), "version is True, expected 1"),
        (changed(sparsity=1.5), "sparsity is 1.5, expected a number from 0 to 1"),
        (changed(sparsity="0.5"), "sparsity is '0.5', expected a number"),
        (changed(sparsity=float("nan")), "NaN is no number in JSON"),
        (changed(mode="fast"), "mode is 'fast', expected 'decode' or 'mask'"),
        (changed(mode=["decode"]), r"mode is \['decode'\], expected 'decode' or 'mask'"),
        (changed(max_m=0), "max_m is 0, expected a whole number of at least 1"),
        (changed(max_m=None), "quantization_config lacks 'max_m': make the folder again"),
        (changed(bits=4), "quantization_config has the unknown 'bits'"),
        (changed(thresholds="../t.safetensors"), "thresholds is '../t.safetensors', expected a file's name"),
        (changed(calibration="c.pt"), "calibration is 'c.pt', expected a file's name"),
        (changed(fingerprint="fedcba9876543210"), "another model's: it has weights '0123456789abcdef'"),
        (changed(sparsity=0.4), r"teal_thresholds.safetensors: sparsity is '0.5', expected '0.4'"),
    ],
)
def test_a_bad_block_is_one_line(block, message, tmp_path):
    write_exported(tmp_path)
    write_block(tmp_path, block)
    with pytest.raises(ValueError, match=message) as error:
        open_exported(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_thresholds_are_the_calibrations(tmp_path):
    exported = write_exported(tmp_path)
    opened = open_exported(tmp_path)
    stored, thresholds = load_file(tmp_path / BLOCK["thresholds"]), opened.thresholds()
    assert stored.keys() == thresholds.keys() == opened.inputs.keys() and len(stored) == 7 * TINY["num_hidden_layers"]
    for name, threshold in thresholds.items():
        assert torch.equal(stored[name], threshold) and threshold.is_contiguous()
        assert threshold.shape == (opened.inputs[name],)
    layer = "model.layers.1.self_attn."
    assert thresholds[f"{layer}q_proj"] is thresholds[f"{layer}v_proj"]
    assert len(thresholds[f"{layer}o_proj"].unique()) == opened.inputs[f"{layer}o_proj"]
    calibration = Calibration.load(tmp_path / BLOCK["calibration"])
    for sparsity in (0.4, 0.5):
        expected = calibration.threshold("layers.1.feed_forward.w13", sparsity)
        assert (opened.thresholds(sparsity)["model.layers.1.mlp.up_proj"] == expected).all()
    assert opened.at(0.4).thresholds()["model.layers.0.mlp.down_proj"][0] == pytest.approx(0.4 * 4)
    assert all((threshold < 0).all() for threshold in opened.thresholds(0).values())
    assert exported.config == opened.config


def test_calls_that_are_sparse():
    config = TealConfig(0.5, "0123456789abcdef", max_m=2)
    assert [config.sparse(tokens) for tokens in (1, 2, 3)] == [True, True, False]
    assert TealConfig(0.5, "0123456789abcdef", mode="mask").sparse(1000)


@pytest.mark.parametrize("name", ["thresholds", "calibration"])
def test_a_missing_file_is_named(name, tmp_path):
    write_exported(tmp_path)
    (tmp_path / BLOCK[name]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{BLOCK[name]} is missing"):
        open_exported(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.popitem(), "lacks 'model.layers"),
        (lambda tensors: tensors.update(extra=torch.zeros(3)), "has, unlike the model, 'extra'"),
        (lambda tensors: tensors["model.layers.0.mlp.up_proj"].mul_(1.01), "up_proj is not what the calibration gives"),
        (lambda tensors: tensors["model.layers.0.mlp.up_proj"].fill_(torch.nan), "up_proj is not what the calibration"),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.up_proj": torch.zeros(3)}),
            r"up_proj is F32 \[3\], expected F32 \[128\]",
        ),
    ],
)
def test_other_thresholds_are_refused(change, message, tmp_path):
    exported = write_exported(tmp_path)
    tensors = load_file(tmp_path / BLOCK["thresholds"])
    change(tensors)
    save_file(tensors, tmp_path / BLOCK["thresholds"], exported.metadata())
    with pytest.raises(ValueError, match=message):
        open_exported(tmp_path)


def test_another_models_calibration_is_refused(tmp_path):
    write_exported(tmp_path)
    deeper = make_up_calibration(TINY | {"num_hidden_layers": 3}, BLOCK["fingerprint"])
    deeper.save(tmp_path / BLOCK["calibration"])
    with pytest.raises(
        ValueError, match=r"another model's: it has n_layers '3' .checkpoint: '2'.; make the folder again"
    ):
        open_exported(tmp_path)


def test_opens_where_a_loader_has_changed_the_defaults(tmp_path):
    expected = write_exported(tmp_path).thresholds(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = open_exported(tmp_path).thresholds(0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], threshold) for name, threshold in expected.items())
