"""quantize.py: what it writes is the model again up to rounding, runs everywhere, and is whole or not there at all."""

import io
import json
import re
import resource
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from teal_fast import cli, generate, quantize
from teal_fast import eval as evaluation
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.engine.steps import fast_step
from teal_fast.files.calibration import CALIBRATION, Calibration, load_calibration, set_sparsity
from teal_fast.files.checkpoint import CONFIG, METADATA, WEIGHTS, fingerprint
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer
from teal_fast.quantization.gptq_quantizer import GptqQuantizer
from teal_fast.sparse_model import DECODE, format_of, sparse_layers
from teal_fast.tests.models import write_tokenizer
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output

MODES = ["int8", "int4"]
FORMATS = {"int8": Format("int8"), "int4": Format("int4", 64)}
# Off the dense model's logits, as a share of their norm: rounding adds 0.9 % and 9 % to a weight, and eight layers in a
# row about twice that.
LOGIT_ERROR = {"int8": 0.02, "int4": 0.2}
FACTORS = {"int8": 1e-4, "int4": 0.02}  # one token's inputs are rounded to 16 bits (output layer) and 8 bits (int4)
TEXT = " ".join(f"The {i}th sentence is about {i * i} whales, a harpoon and {i % 7} captains." for i in range(200))
OTHER_TEXT = " ".join(
    f"The {i}th letter was about {i * i} harpoons, a captain and {i % 5} whales." for i in range(9, 30)
)


def call(main, *arguments):
    """Runs a command in this process, which saves the seconds that importing takes: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
    return ended.value.code, out.getvalue(), err.getvalue()


def run_here(*arguments):
    return call(quantize.main, *arguments)


@pytest.fixture(scope="module")
def dense(even, tmp_path_factory):
    """The checkpoint whose sizes fit, with a calibration of its own and a text beside it."""
    folder = shutil.copytree(even, tmp_path_factory.mktemp("dense") / "even")
    sequences = torch.randint(3, 40_000, (8, 64), generator=torch.Generator().manual_seed(2)).tolist()
    made = Calibration(measure_quantiles(load_model(folder), sequences), fingerprint(folder), {"corpus": "random"})
    made.save(folder / CALIBRATION)
    (folder.parent / "text.txt").write_text(TEXT)
    (folder.parent / "other.txt").write_text(OTHER_TEXT)
    return folder


@pytest.fixture(scope="module")
def made(dense):
    """Quantized copies of it by mode and whether --calibrated, with what the command printed."""
    folders = {}
    for mode in MODES:
        for calibrated in (False, True):
            out = dense.parent / f"{mode}-{calibrated}"
            code, printed, err = run_here(*arguments(dense, mode, calibrated), "--out", out)
            assert code == 0, err
            folders[mode, calibrated] = out, printed
    return folders


def arguments(folder, mode, calibrated=False):
    words = ["--checkpoint", folder, "--mode", mode]
    return [*words, "--calibrated", "--corpus", folder.parent / "text.txt", "--device", "cpu"] if calibrated else words


def held_out(folder):
    return torch.tensor([Tokenizer.load(folder).encode(OTHER_TEXT)[:128]])


@torch.no_grad()
def logits(model, tokens, phase=None):
    return model(tokens, phase=phase)[0].float()


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def widened(folder, dense) -> Transformer:
    """The dense model with the weights that the quantized one stands for."""
    model, source = load_model(dense), load_model(folder)
    for name, layer in sparse_layers(model).items():
        layer.weight.packed.data = sparse_layers(source)[name].weight.dequantize()
    model.output.weight = torch.nn.Parameter(source.output.weight * source.output.scale[:, None])
    return model


either = pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
each_mode = pytest.mark.parametrize("mode", MODES)


@each_mode
@either
def test_the_file_holds_what_it_should(made, dense, mode, calibrated):
    folder, printed = made[mode, calibrated]
    assert re.fullmatch(rf"wrote {folder}: \d+ MB instead of \d+ MB\n", printed)
    assert {path.name for path in folder.iterdir()} == {path.name for path in dense.iterdir()}
    assert (folder / CONFIG).read_bytes() == (dense / CONFIG).read_bytes()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == METADATA | FORMATS[mode].metadata() | {"source": fingerprint(dense)["weights"]}
    before, after = load_file(dense / WEIGHTS), load_file(folder / WEIGHTS)
    same = [name for name in before if "norm" in name or name == "tok_embeddings.weight"]
    assert len(same) == 6 and all(torch.equal(after[name], before[name]) for name in same)
    size = {"int8": 1, "int4": 0.5 + 2 / 64}[mode]
    w13 = after["layers.1.feed_forward.w13.packed"]
    assert w13.nbytes == -(-512 * size // 32) * 32 * 128 and after["layers.1.feed_forward.w13.scale"].shape == (512,)
    assert after["output.packed"].dtype == torch.int8


@each_mode
def test_load_model_gives_the_weights_as_they_were_packed(made, dense, mode):
    model, source = load_model(made[mode, False][0]), load_model(dense)
    for name, layer in sparse_layers(model).items():
        format = FORMATS[mode].within(name)
        expected = format.pack(sparse_layers(source)[name].weight.packed)
        assert layer.weight.format == format.name
        for attribute in ("packed", "scale"):
            assert torch.equal(getattr(layer.weight, attribute), getattr(expected, attribute))
    assert len(sparse_layers(model)) == 8
    output = Int8Output.pack(source.output.weight)
    assert torch.equal(model.output.weight, output.weight) and torch.equal(model.output.scale, output.scale)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@each_mode
@either
def test_logits_are_those_of_the_weights_and_near_the_dense_ones(made, dense, mode, calibrated):
    folder, tokens = made[mode, calibrated][0], held_out(dense)
    model = load_model(folder)
    found = logits(model, tokens)
    assert off(found, logits(widened(folder, dense), tokens)) < 1e-5
    assert off(found, logits(load_model(dense), tokens)) < LOGIT_ERROR[mode]
    single = logits(model, tokens[:, :1])
    assert off(single, found[:1]) < FACTORS[mode]


@each_mode
def test_calibrated_rounding_is_nearer_on_held_out_text(made, dense, mode):
    tokens = held_out(dense)
    expected = logits(load_model(dense), tokens)
    plain, calibrated = (off(logits(load_model(made[mode, how][0]), tokens), expected) for how in (False, True))
    assert calibrated < 0.9 * plain


@each_mode
def test_tuning_moves_scales_and_nothing_else(made, dense, tmp_path, mode):
    written = []
    for name in ("once", "again"):
        code, _, err = run_here(*arguments(dense, mode, True), "--tune", "--tokens", 256, "--out", tmp_path / name)
        assert code == 0, err
        written.append((tmp_path / name / WEIGHTS).read_bytes())
    assert written[0] == written[1]
    code, _, err = run_here(*arguments(dense, mode, True), "--tokens", 256, "--out", tmp_path / "untuned")
    assert code == 0, err
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("untuned", "once"))
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == {f"{name}.scale" for name in sparse_layers(load_model(dense))} and before.keys() == after.keys()
    for name in differing:
        torch.testing.assert_close(after[name], before[name], rtol=0.2, atol=0)
    with safe_open(tmp_path / "once" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == METADATA | FORMATS[mode].metadata() | {"source": fingerprint(dense)["weights"]}
    assert {path.name for path in (tmp_path / "once").iterdir()} == {path.name for path in dense.iterdir()}
    load_calibration(tmp_path / "once")  # is that of the scales as they are now


def test_tuning_needs_no_calibrated_rounding(made, dense, tmp_path):
    text = ["--corpus", dense.parent / "text.txt", "--tokens", 256]
    code, _, err = run_here(*arguments(dense, "int8"), "--tune", *text, "--out", tmp_path / "out")
    assert code == 0, err
    before, after = (load_file(folder / WEIGHTS) for folder in (made["int8", False][0], tmp_path / "out"))
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert len(same) == len(before) - 8


@each_mode
def test_load_model_in_another_type(made, mode):
    folder = made[mode, False][0]
    model, exact = load_model(folder, dtype=torch.bfloat16), load_model(folder)
    assert model.norm.weight.dtype == torch.bfloat16
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.weight.scale, sparse_layers(exact)[name].weight.scale)
        assert layer.weight.packed.dtype == {"int8": torch.int8, "int4": torch.uint8}[FORMATS[mode].within(name).name]
    tokens = held_out(folder)
    assert off(logits(model, tokens), logits(exact, tokens)) < 4 * 2**-8  # a rounding a layer


@each_mode
@either
def test_calibration_is_carried_over_and_accepted(made, dense, mode, calibrated):
    folder = made[mode, calibrated][0]
    carried, own = load_calibration(folder), Calibration.load(dense / CALIBRATION)
    assert carried.origin == own.origin
    assert all(torch.equal(carried.curves[name], points) for name, points in own.curves.items())
    with pytest.raises(ValueError, match="weights"):
        own.check(folder)
    model, tokens = load_model(folder), held_out(folder)
    before = logits(model, tokens[:, :1], DECODE)
    set_sparsity(model, carried, 0.5)
    assert off(logits(model, tokens[:, :1], DECODE), before) > 0.05


def test_without_a_calibration_none_is_written(even, tmp_path):
    assert run_here(*arguments(even, "int8"), "--out", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / CALIBRATION).exists() and not (even / CALIBRATION).exists()


@each_mode
def test_generate_and_eval_run_on_it(made, dense, mode):
    folder = made[mode, True][0]
    words = ["--max_new_tokens", 8, "--sparsity", 0.5, "--json", "--device", "cpu"]
    code, out, err = call(generate.main, "--checkpoint", folder, *words)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])
    words = ["--text", dense.parent / "other.txt", "--context", 64, "--sparsity", 0, 0.5, "--device", "cpu"]
    scores = {}
    for place in (folder, dense):
        code, out, err = call(evaluation.main, "--checkpoint", place, *words)
        assert code == 0, err
        scores[place] = [record["perplexity"] for record in json.loads(out.splitlines()[-1])]
    assert scores[folder] == pytest.approx(scores[dense], rel=0.05) and scores[folder] != scores[dense]


@each_mode
def test_equal_runs_give_equal_bytes(made, dense, tmp_path, mode):
    for calibrated in (False, True):
        out = tmp_path / str(calibrated)
        assert run_here(*arguments(dense, mode, calibrated), "--out", out)[0] == 0
        for path in out.iterdir():
            assert path.read_bytes() == (made[mode, calibrated][0] / path.name).read_bytes()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def biased(request, tmp_path_factory):
    """A tiny random Qwen2 with biases on q, k, v, as a checkpoint folder in bf16."""
    folder = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=128,
        tie_word_embeddings=request.param,
    )
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf")
    convert_huggingface(folder / "hf", folder / "qwen2", torch.bfloat16)
    return folder / "qwen2"


@each_mode
def test_biases_are_kept_and_both_output_layers_work(biased, tmp_path, mode):
    assert run_here(*arguments(biased, mode), "--out", tmp_path / "out")[0] == 0
    before, after = load_file(biased / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    biases = [name for name in before if name.endswith("bias")]
    assert len(biases) == 2 and all(torch.equal(after[name], before[name]) for name in biases)
    assert after["tok_embeddings.weight"].dtype == torch.bfloat16
    model, source = (load_model(folder, dtype=torch.float32) for folder in (tmp_path / "out", biased))
    output = before.get("output.weight", before["tok_embeddings.weight"])
    assert torch.equal(model.output.weight, Int8Output.pack(output).weight)
    tokens = torch.arange(3, 300, 17)[None]
    assert off(logits(model, tokens), logits(source, tokens)) < LOGIT_ERROR[mode]


def damaged(dense, tmp_path, change):
    """A copy whose weights `change` has changed in place."""
    folder = shutil.copytree(dense, tmp_path / "damaged")
    (tmp_path / "text.txt").write_text(TEXT)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=METADATA)
    return folder


def refused(answer, tmp_path, before, message):
    """Exit code 1 with one line at the end that says it, nothing printed and nothing written."""
    code, out, err = answer
    assert (code, out) == (1, "")
    assert "Traceback" not in err and re.search(message, err.splitlines()[-1]), err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)


@either
@pytest.mark.parametrize(
    "name, value",
    [
        ("layers.1.attention.wo", torch.nan),
        ("layers.1.feed_forward.w2", torch.inf),
        ("tok_embeddings", torch.nan),
        ("norm", -torch.inf),
    ],
)
def test_nan_and_inf_are_named(dense, tmp_path, calibrated, name, value):
    def change(tensors):
        tensors[f"{name}.weight"].view(-1)[5 * 128 + 3 if name != "norm" else 3] = value

    folder = damaged(dense, tmp_path, change)
    if name == "norm":  # of its entries the calibration knows all
        Calibration(load_calibration(dense).curves, fingerprint(folder), {}).save(folder / CALIBRATION)
    answer = run_here(*arguments(folder, "int4", calibrated), "--out", tmp_path / "out")
    refused(answer, tmp_path, ["damaged", "text.txt"], rf"error: .*{name}\.weight holds NaN or inf")


@each_mode
def test_a_dead_output_channel_is_no_trouble(dense, tmp_path, mode):
    folder = damaged(dense, tmp_path, lambda tensors: tensors["layers.1.feed_forward.w13.weight"][:, 7].zero_())
    (folder / CALIBRATION).unlink()
    code, _, err = run_here(*arguments(folder, mode), "--out", tmp_path / "out")
    assert code == 0, err
    tokens = held_out(dense)
    assert off(logits(load_model(tmp_path / "out"), tokens), logits(load_model(folder), tokens)) < LOGIT_ERROR[mode]


def test_tensors_that_do_not_fit_the_config_are_one_error(dense, tmp_path):
    folder = damaged(dense, tmp_path, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))
    (folder / CALIBRATION).unlink()
    answer = run_here(*arguments(folder, "int8"), "--out", tmp_path / "out")
    refused(answer, tmp_path, ["damaged", "text.txt"], r"error: .*norm\.weight is \[64\]")


def test_unconverted_folder_says_what_to_run(tiny_hf, tmp_path):
    answer = run_here(*arguments(tiny_hf, "int8"), "--out", tmp_path / "out")
    refused(answer, tmp_path, [], "is not converted yet: run `python -m teal_fast.scripts.convert_hf_checkpoint")


@each_mode
def test_no_checkpoint_is_quantized_twice(made, tmp_path, mode):
    answer = run_here(*arguments(made[mode, False][0], "int8"), "--out", tmp_path / "out")
    refused(answer, tmp_path, [], f"error: .* is in {mode} already: quantize the checkpoint that it was made from")


@pytest.mark.parametrize("group", [256, 96, 32])
def test_groups_that_do_not_divide_are_refused(dense, tmp_path, group):
    answer = run_here(*arguments(dense, "int4"), "--group", group, "--out", tmp_path / "out")
    refused(answer, tmp_path, [], rf"error: \d+ outputs do not fall into groups of {group}")


def test_a_group_that_does_not_divide_is_refused_before_the_corpus_is_read(tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    answer = run_here(*arguments(folder, "int4", True), "--group", 128, "--out", tmp_path / "out")
    refused(answer, tmp_path, ["tiny", "text.txt"], r"error: \d+ outputs do not fall into groups of 128")
    assert not (folder / CALIBRATION).exists()  # nothing was written there either


@either
def test_a_folder_that_exists_is_left_alone(even, tmp_path, calibrated):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    folder = shutil.copytree(even, tmp_path / "even")
    (tmp_path / "text.txt").write_text(TEXT)
    answer = run_here(*arguments(folder, "int8", calibrated), "--out", tmp_path / "out")
    refused(answer, tmp_path, ["out", "even", "text.txt"], "error: .*out exists already: remove it")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert not (folder / CALIBRATION).exists()


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--mode", "int3"], 2, "invalid choice: 'int3'"),
        (["--group", "0"], 2, "--group: got '0', expected a whole number"),
        (["--calibrated", "--tokens", "1"], 1, "fewer than 2 tokens"),
        (["--calibrated", "--device", "tpu"], 1, "--device tpu is not known here"),
        (["--calibrated", "--corpus", "none.txt"], 1, "none.txt does not exist"),
        (["--corpus", "none.txt"], 2, "--corpus is text for --calibrated and --tune"),
        (["--tune", "--tokens", "1"], 1, "fewer than 2 tokens"),
        (["--tune", "--device", "tpu"], 1, "--device tpu is not known here"),
    ],
    ids=repr,
)
def test_bad_arguments(dense, tmp_path, options, code, message):
    exit_code, out, err = run_here("--checkpoint", dense, "--out", tmp_path / "out", *options)
    assert (exit_code, out) == (code, "") and message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "megabytes", [0.1, 4, 30]
)  # in a file that is copied, in the first tensor, in the output layer
def test_a_full_disk_leaves_nothing_behind(dense, command, tmp_path, megabytes):
    """A limit on the size of files stands for it."""
    size = int(megabytes * 1e6)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = command("quantize", *arguments(dense, "int8"), "--out", tmp_path / "out", preexec_fn=limit)
    refused((done.returncode, done.stdout, done.stderr), tmp_path, [], "error: .*File too large")


def test_sequences_are_no_longer_than_the_model_takes(dense, monkeypatch, tmp_path):
    seen, init = [], GptqQuantizer.__init__

    def watch(self, folder, format, calibration, sequences, device):
        seen.extend(map(len, sequences))
        init(self, folder, format, calibration, sequences, device)

    monkeypatch.setattr(GptqQuantizer, "__init__", watch)
    assert run_here(*arguments(dense, "int8", True), "--out", tmp_path / "out")[0] == 0
    assert sum(seen) > 1000 and max(seen) <= load_model(dense).args.max_position


def test_a_missing_calibration_is_made(dense, tmp_path, little_calibration):
    folder = shutil.copytree(dense, tmp_path / "dense")
    (folder / CALIBRATION).unlink()
    text = ["--corpus", dense.parent / "text.txt", "--tokens", 256]
    code, _, err = run_here("--checkpoint", folder, "--calibrated", *text, "--device", "cpu", "--out", tmp_path / "out")
    assert code == 0 and "calibrating, once: python calibrate.py" in err
    assert load_calibration(tmp_path / "out").origin == load_calibration(folder).origin


def test_output8_quantizes_the_output_layer_alone(dense, tmp_path):
    code, printed, err = run_here("--checkpoint", dense, "--mode", "output8", "--out", tmp_path / "made")
    assert code == 0 and printed.startswith(f"wrote {tmp_path / 'made'}: ")
    model, source = load_model(tmp_path / "made"), load_model(dense)
    assert format_of(model) == "output8" and model.output.weight.dtype == torch.int8
    parameters = dict(model.named_parameters())
    for name, parameter in source.named_parameters():
        if not name.startswith("output."):
            assert parameters[name].dtype == parameter.dtype and torch.equal(parameters[name], parameter)
    tokens = held_out(dense)
    assert 0 < off(logits(model, tokens), logits(source, tokens)) < 0.01  # each row's 255 levels
    cache, step_cache = model.new_cache(1, 8), model.new_cache(1, 8)
    step = fast_step(model, step_cache)
    with torch.no_grad():
        for position, token in enumerate(tokens[0, :8]):
            found = step(token.view(1, 1), torch.tensor([position]))
            expected = model(token.view(1, 1), torch.tensor([position]), cache, DECODE)[0, -1]
            torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.02 * expected.std().item())
    for mode in ("int8", "output8"):
        code, _, err = run_here("--checkpoint", tmp_path / "made", "--mode", mode, "--out", tmp_path / "again")
        assert code == 1 and "is in output8 already: quantize the checkpoint that it was made from" in err
    code, _, err = run_here("--checkpoint", dense, "--mode", "output8", "--tune", "--out", tmp_path / "again")
    assert code == 2 and "--mode output8 rounds the output layer alone, to nearest" in err
