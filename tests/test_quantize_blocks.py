"""quantize.py to GGUF's block types: such a checkpoint is loaded and run as a GGUF file's own values are."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from teal_fast import eval as evaluation
from teal_fast import generate
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.files.calibration import CALIBRATION, Calibration, load_calibration
from teal_fast.files.checkpoint import CONFIG, METADATA, WEIGHTS, fingerprint
from teal_fast.files.load import load_model
from teal_fast.quantization.mixtures import make_format
from teal_fast.sparse_model import DECODE, format_of, sparse_layers
from teal_fast.tests.test_quantize import OTHER_TEXT, TEXT, arguments, call, held_out, logits, off, refused, run_here
from teal_fast.weights.blocks import BlockWeight
from teal_fast.weights.output import output_weight

LOGIT_ERROR = {"q4_k": 0.12, "q8_0": 0.015}
each_mode = pytest.mark.parametrize("mode", LOGIT_ERROR)
either = pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
NOTE = "128 inputs in Q5_0 instead of Q4_K"


@pytest.fixture(scope="module")
def dense(even, tmp_path_factory):
    """A checkpoint of 128 and 256 inputs, with a calibration of its own and a text beside it."""
    folder = shutil.copytree(even, tmp_path_factory.mktemp("dense") / "even")
    sequences = torch.randint(3, 40_000, (8, 64), generator=torch.Generator().manual_seed(2)).tolist()
    Calibration(measure_quantiles(load_model(folder), sequences), fingerprint(folder), {}).save(folder / CALIBRATION)
    (folder.parent / "text.txt").write_text(TEXT)
    (folder.parent / "other.txt").write_text(OTHER_TEXT)
    return folder


@pytest.fixture(scope="module")
def made(dense):
    """Quantized copies of it by mode and whether --calibrated."""
    folders = {}
    for mode in LOGIT_ERROR:
        for calibrated in (False, True):
            folders[mode, calibrated] = out = dense.parent / f"{mode}-{calibrated}"
            code, _, err = run_here(*arguments(dense, mode, calibrated), "--out", out)
            assert code == 0 and (NOTE in err) == (mode == "q4_k"), err
    return folders


def widened(folder, dense):
    """The dense model with the weights that the quantized one stands for."""
    model, source = load_model(dense), load_model(folder, dtype=torch.float32)
    for name, layer in sparse_layers(model).items():
        layer.weight.packed.data = sparse_layers(source)[name].weight.dequantize()
    model.tok_embeddings.weight.data = source.tok_embeddings.weight.dequantize().t()
    model.output.weight = torch.nn.Parameter(output_weight(source.output))
    return model


@each_mode
@either
def test_the_file_holds_what_it_should(made, dense, mode, calibrated):
    folder, source = made[mode, calibrated], load_model(dense)
    format, _ = make_format(mode, source.args, torch.float32)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == METADATA | format.metadata() | {"source": fingerprint(dense)["weights"]}
    assert (folder / CONFIG).read_bytes() == (dense / CONFIG).read_bytes()
    before, after = load_file(dense / WEIGHTS), load_file(folder / WEIGHTS)
    assert all(torch.equal(after[name], before[name]) for name in before if "norm" in name)
    model = load_model(folder)
    assert format_of(model) == mode and model.norm.weight.dtype == torch.float32
    for name, layer in sparse_layers(model).items():
        assert tuple((part.kind.name, part.N) for part in layer.weight.parts) == format.parts[name]
    assert isinstance(model.tok_embeddings.weight, BlockWeight) and isinstance(model.output.weight, BlockWeight)
    assert load_calibration(folder).origin == load_calibration(dense).origin


@each_mode
@either
def test_logits_are_those_of_the_weights_and_near_the_dense_ones(made, dense, mode, calibrated):
    tokens, model = held_out(dense), load_model(made[mode, calibrated])
    found = logits(model, tokens)
    assert off(found, logits(widened(made[mode, calibrated], dense), tokens)) < 1e-5
    assert off(found, logits(load_model(dense), tokens)) < LOGIT_ERROR[mode]
    assert off(logits(model, tokens[:, :1], DECODE), found[:1]) < 0.03  # inputs are rounded to 8 bits


@each_mode
def test_calibrated_rounding_is_nearer_on_held_out_text(made, dense, mode):
    """In the hidden states: embeddings and output layer are rounded to nearest."""
    tokens = held_out(dense)
    with torch.no_grad():
        models = {how: load_model(made[mode, how]) for how in (False, True)}
        for model in models.values():
            model.tok_embeddings = load_model(dense).tok_embeddings
        expected = load_model(dense).hidden(tokens)
        plain, calibrated = (off(models[how].hidden(tokens), expected) for how in (False, True))
    assert calibrated < 0.9 * plain


def test_tuning_moves_the_scales_above_all_others(dense, tmp_path):
    for name, more in (("untuned", []), ("tuned", ["--tune"])):
        words = [*arguments(dense, "q4_k", True), *more, "--tokens", 256, "--out", tmp_path / name]
        assert run_here(*words)[0] == 0
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("untuned", "tuned"))
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    floats = {name for name, t in before.items() if name.startswith("layers") and t.dtype == torch.float16}
    assert floats and differing == floats
    ratio = {
        name.rsplit(".", 1)[1]: (after[name].float() / before[name].float())[:, :128]
        for name in floats
        if name.startswith("layers.0.feed_forward.w2")
    }
    torch.testing.assert_close(
        ratio["super_scale"], ratio["super_scale"][:1].expand_as(ratio["super_scale"]), rtol=0.02, atol=0
    )
    load_calibration(tmp_path / "tuned")


def test_generate_and_eval_run_on_it(made, dense):
    folder = made["q4_k", True]
    words = ["--max_new_tokens", 8, "--sparsity", 0.5, "--json", "--device", "cpu"]
    code, out, err = call(generate.main, "--checkpoint", folder, *words)
    assert code == 0 and json.loads(out.splitlines()[-1]), err
    words = ["--text", dense.parent / "other.txt", "--context", 64, "--sparsity", 0, 0.5, "--device", "cpu"]
    scores = {}
    for place in (folder, dense):
        code, out, err = call(evaluation.main, "--checkpoint", place, *words)
        assert code == 0, err
        scores[place] = [record["perplexity"] for record in json.loads(out.splitlines()[-1])]
    assert scores[folder] == pytest.approx(scores[dense], rel=0.05) and scores[folder] != scores[dense]


def test_it_is_not_quantized_again(made, tmp_path):
    answer = run_here("--checkpoint", made["q4_k", False], "--mode", "int8", "--out", tmp_path / "out")
    refused(answer, tmp_path, [], r"error: .*is in q4_k already: quantize the checkpoint that")


def test_equal_runs_give_equal_bytes(made, dense, tmp_path):
    assert run_here(*arguments(dense, "q4_k", True), "--out", tmp_path / "out")[0] == 0
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (made["q4_k", True] / path.name).read_bytes()


@either
def test_layers_that_fit_no_type_stay_dense(calibrated, tiny, tmp_path):
    """64 inputs and 172, which are no multiple of 32."""
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(TEXT)
    sequences = torch.randint(3, 40_000, (4, 64), generator=torch.Generator().manual_seed(2)).tolist()
    Calibration(measure_quantiles(load_model(folder), sequences), fingerprint(folder), {}).save(folder / CALIBRATION)
    code, _, err = run_here(*arguments(folder, "q4_k", calibrated), "--out", tmp_path / "out")
    assert code == 0 and "matrices of 172 inputs as they are" in err
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    name = "layers.0.feed_forward.w2.weight"
    assert torch.equal(after[name], before[name]) and "layers.0.feed_forward.w13.weight.parts.0.plane0" in after
    tokens = held_out(folder)
    assert off(logits(load_model(tmp_path / "out"), tokens), logits(load_model(folder), tokens)) < 0.2


def test_nan_is_named(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "damaged")
    (folder / CALIBRATION).unlink()
    tensors = load_file(folder / WEIGHTS)
    tensors["layers.1.feed_forward.w2.weight"][3, 5] = torch.nan

    save_file(tensors, folder / WEIGHTS, metadata=METADATA)
    answer = run_here(*arguments(folder, "q4_k"), "--out", tmp_path / "out")
    refused(answer, tmp_path, ["damaged"], r"error: .*layers.1.feed_forward.w2.weight holds NaN or inf")
