"""Exported folders: Hugging Face's own tensors, a config.json that transformers reads, and the way back."""

import json
import shutil

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from teal_fast.files.calibration import CALIBRATION, Calibration
from teal_fast.files.checkpoint import CONFIG, WEIGHTS, fingerprint, read_config
from teal_fast.files.exported import open_exported
from teal_fast.files.gguf import convert_gguf
from teal_fast.files.huggingface import convert_huggingface, find_shards, open_shard
from teal_fast.quantize import main as quantize
from teal_fast.scripts.convert_hf_checkpoint import main as convert_back
from teal_fast.scripts.export_hf import export
from teal_fast.scripts.export_hf import main as export_hf
from teal_fast.tests.exported import make_up_calibration, teal_config
from teal_fast.tests.family_models import FAMILIES, make_family, write_family
from teal_fast.tests.gguf_models import make_model, write_gguf


def calibrate(folder) -> Calibration:
    """A made-up calibration beside a checkpoint."""
    calibration = make_up_calibration(read_config(folder), fingerprint(folder)["weights"])
    calibration.save(folder / CALIBRATION)
    return calibration


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A tiny Llama with a made-up calibration."""
    folder = tmp_path_factory.mktemp("calibrated")
    convert_huggingface(write_family(make_family("llama"), folder / "hf"), folder / "ours", None)
    calibrate(folder / "ours")
    return folder / "ours"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, make_model(), GGMLQuantizationType.Q8_0)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_there_and_back(family, tmp_path):
    theirs, ours, out, back = make_family(family), tmp_path / "ours", tmp_path / "out", tmp_path / "back"
    convert_huggingface(write_family(theirs, tmp_path / "hf"), ours, torch.bfloat16)
    calibration = calibrate(ours)
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


def test_the_command_there_and_back(run_main, calibrated, tmp_path):
    arguments = ["--checkpoint", calibrated, "--sparsity", "0.4", "--mode", "mask", "--max_m", "3"]
    assert run_main(export_hf, *arguments, "--out", tmp_path / "out")[:2] == (0, f"wrote {tmp_path / 'out'}\n")
    config = open_exported(tmp_path / "out").config
    assert (config.sparsity, config.mode, config.max_m) == (0.4, "mask", 3)
    code, out, _ = run_main(convert_back, tmp_path / "out", "--out", tmp_path / "back")
    assert (code, out) == (0, f"wrote {tmp_path / 'back'}\n")  # there is nothing left to calibrate
    for name in (WEIGHTS, CALIBRATION, "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (calibrated / name).read_bytes()
    assert "quantization_config" not in read_config(tmp_path / "back")
    code, _, errors = run_main(export_hf, *arguments, "--out", tmp_path / "out")
    assert code == 1 and errors.startswith(f"error: {tmp_path / 'out'} exists already")


def test_in_several_files(calibrated, tmp_path):
    calibration = Calibration.load(calibrated / CALIBRATION)
    most = (calibrated / WEIGHTS).stat().st_size // 2
    export(calibrated, tmp_path / "out", teal_config(calibration), calibration, most)
    shards = find_shards(tmp_path / "out")
    assert [path.name for path in shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert all(path.stat().st_size <= most + 10_000 for path in shards)
    index = json.loads((tmp_path / "out" / f"{WEIGHTS}.index.json").read_text())
    held = {name: path.name for path in shards for name in open_shard(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for path in shards for t in open_shard(path).values())
    convert_huggingface(tmp_path / "out", tmp_path / "back", None)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (calibrated / WEIGHTS).read_bytes()


def test_what_weights_were_rounded_to_is_not_forgotten(gguf_file, tmp_path):
    convert_gguf(gguf_file, tmp_path / "ours", torch.bfloat16)
    calibration = calibrate(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "out", teal_config(calibration), calibration)
    convert_huggingface(tmp_path / "out", tmp_path / "back", None)
    assert b"rounded_to" in (tmp_path / "ours" / WEIGHTS).read_bytes()[:1000]
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == "llama"


def test_other_weights_lose_the_calibration_and_say_so(calibrated, tmp_path, capsys):
    calibration = Calibration.load(calibrated / CALIBRATION)
    export(calibrated, tmp_path / "out", teal_config(calibration), calibration)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "out" / WEIGHTS)
    convert_huggingface(tmp_path / "out", tmp_path / "back", None)
    assert "its calibration is left out: the calibration is another model's: it has weights" in capsys.readouterr().err
    assert not (tmp_path / "back" / CALIBRATION).exists()


def test_quantized_weights_are_refused(calibrated, tmp_path, run_main):
    folder = shutil.copytree(calibrated, tmp_path / "ours")
    assert run_main(quantize, "--checkpoint", folder, "--mode", "int8", "--out", tmp_path / "int8")[0] == 0
    arguments = ["--checkpoint", tmp_path / "int8", "--sparsity", "0.5", "--out", tmp_path / "out"]
    code, _, errors = run_main(export_hf, *arguments)
    assert code == 1 and errors.count("\n") == 1
    assert "has int8 weights, of which other engines can't skip any: export the checkpoint that it was made" in errors
    assert not (tmp_path / "out").exists()


def test_a_gguf_files_own_values_are_refused(gguf_file, tmp_path, run_main):
    convert_gguf(gguf_file, tmp_path / "kept", torch.bfloat16, keep=True)
    calibrate(tmp_path / "kept")
    for checkpoint in (gguf_file, tmp_path / "kept"):
        arguments = ["--checkpoint", checkpoint, "--sparsity", "0.5", "--out", tmp_path / "out"]
        code, _, errors = run_main(export_hf, *arguments)
        assert code == 1 and "convert_gguf --dequantize` and export that" in errors.splitlines()[-1]


def test_rotary_settings_of_a_gguf_file_are_refused(calibrated, tmp_path):
    folder = shutil.copytree(calibrated, tmp_path / "factors")
    config = read_config(folder)
    del config["rope_parameters"]
    config["rope_scaling"] = {"rope_type": "factors", "factors": [1.0] * 8}
    (folder / CONFIG).write_text(json.dumps(config | {"rope_theta": 1e4}))
    calibration = Calibration.load(folder / CALIBRATION)
    with pytest.raises(ValueError, match="rope_scaling is that of a GGUF file"):
        export(folder, tmp_path / "out", teal_config(calibration), calibration)


def test_without_a_calibration_one_line_says_what_to_run(calibrated, tmp_path, run_main):
    folder = shutil.copytree(calibrated, tmp_path / "ours")
    (folder / CALIBRATION).unlink()
    arguments = ["--checkpoint", folder, "--sparsity", "0.5", "--out", tmp_path / "out", "--no_prepare"]
    code, _, errors = run_main(export_hf, *arguments)
    assert code == 1 and "has no calibration: run `python calibrate.py --checkpoint" in errors
