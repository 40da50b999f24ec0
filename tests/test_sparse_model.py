"""Sparse layers against the dense model and hand-made masks; calibration files; loading; accounting."""

import functools
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from teal_fast.benchmarks.shapes import random_model
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.cli import pick_device
from teal_fast.engine.accounting import Tally, bytes_per_token, tally_kept
from teal_fast.engine.cuda_step import plain_step
from teal_fast.engine.prefill import prefill
from teal_fast.families.config import model_args
from teal_fast.files.calibration import (
    Calibration,
    MissingCalibrationError,
    load_calibration,
    set_sparsity,
)
from teal_fast.files.checkpoint import WEIGHTS, fingerprint, read_config
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.model import Transformer
from teal_fast.sparse_model import (
    DECODE,
    KEEP_ALL,
    KINDS,
    SPARSE_WEIGHT,
    Phase,
    SparseLinear,
    sparse_layers,
    watch_inputs,
)
from teal_fast.tests.models import TINY, write_tokenizer
from teal_fast.weights.dense import DenseWeight
from teal_fast.weights.formats import DTYPES

TOKENS = torch.arange(3, 300, 17)[None]  # [1, 18]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # fp32, sums of up to 172 products in another order, through two layers


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A tiny random Qwen2 with biases on q, k, v and an output layer of its own, as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf")
    convert_huggingface(folder / "hf", folder / "qwen2", None)
    return folder / "qwen2"


@functools.cache
def calibrate(folder):
    sequences = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(2)).tolist()
    return Calibration(measure_quantiles(load_model(folder), sequences), fingerprint(folder), {"corpus": "random"})


@pytest.fixture(scope="module")
def calibration(tiny):
    return calibrate(tiny)


def load_dense(folder):
    """The checkpoint in a Transformer whose linear layers are plain nn.Linear."""
    model = Transformer(model_args(read_config(folder)))
    weights = {n: t.t() if SPARSE_WEIGHT.fullmatch(n) else t for n, t in load_file(folder / WEIGHTS).items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if model.args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


@torch.no_grad()
def run(model, tokens, prompt):
    """Logits of a prefill of `prompt` tokens and of every later token, one by one."""
    cache = model.new_cache(1, 64)
    logits = [prefill(model, cache, tokens[:, :prompt])]
    for position in range(prompt, tokens.shape[1]):
        logits.append(plain_step(model, cache, tokens[:, position : position + 1], torch.tensor([position])))
    return torch.stack(logits)


def make_layer(K=48, N=20, bias=False, threshold=0.7):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(K, N, generator=generator)
    layer = SparseLinear(DenseWeight(rows), torch.randn(N, generator=generator) if bias else None)
    # Channels differ in their threshold; the first few are always kept, one is always dropped.
    layer.threshold.copy_(torch.rand(K, generator=generator) * 2 * threshold)
    layer.threshold[:3] = KEEP_ALL
    layer.threshold[3] = 1e9
    return layer


def masked_by_hand(layer, x, dense):
    """What the layer owes for x [B, T, K] with the first `dense` tokens dense, one token and channel at a time."""
    y = torch.zeros(*x.shape[:2], layer.weight.out_features)
    for b, t in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        for k, value in enumerate(x[b, t]):
            if t < dense or abs(value) > layer.threshold[k]:
                y[b, t] += value * layer.weight.packed[k]
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("name", ["tiny", "biased"])
def test_sparsity_zero_is_the_dense_model(name, prompt, request):
    folder = request.getfixturevalue(name)
    model, dense = load_model(folder), load_dense(folder)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), dense(TOKENS))  # bit for bit; one token's sums have an order of their own
    expected = run(dense, TOKENS, prompt)
    torch.testing.assert_close(run(model, TOKENS, prompt), expected, **ROUNDING)
    some = calibrate(folder)
    set_sparsity(model, some, 0.5)
    assert not torch.allclose(run(model, TOKENS, prompt), expected, **ROUNDING)
    set_sparsity(model, some, 0)
    torch.testing.assert_close(run(model, TOKENS, prompt), expected, **ROUNDING)


def test_one_compiled_step_serves_every_sparsity_and_prompt(tiny, calibration):
    torch._dynamo.reset()
    model = load_model(tiny)
    cache = model.new_cache(1, 64)
    step = torch.compile(plain_step, fullgraph=True)
    with torch.no_grad():
        for position in range(2):
            step(model, cache, TOKENS[:, :1], torch.tensor([position]))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for prompt in (1, 4, 9):
                prefill(model, cache, TOKENS[:, :prompt])
                for index, sparsity in enumerate((0.25, 0.5, 0.9, 0.0)):  # changes between two tokens
                    set_sparsity(model, calibration, sparsity)
                    token, position = TOKENS[:, prompt + index, None], torch.tensor([prompt + index])
                    eager = plain_step(model, cache, token, position)
                    torch.testing.assert_close(step(model, cache, token, position), eager, **ROUNDING)
    torch._dynamo.reset()


def test_set_sparsity_keeps_addresses_and_shape(tiny, calibration):
    model = load_model(tiny)
    before = {name: layer.threshold.data_ptr() for name, layer in sparse_layers(model).items()}
    set_sparsity(model, calibration, 0.3)
    for name, layer in sparse_layers(model).items():
        assert layer.threshold.data_ptr() == before[name]
        assert layer.threshold.unique().item() == pytest.approx(calibration.threshold(name, 0.3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dense", [0, 1, 3, 6, 9])
def test_a_phase_masks_the_later_tokens(dense, batch, bias):
    layer = make_layer(bias=bias)
    x = torch.randn(batch, 6, 48, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(layer(x, Phase(dense)), masked_by_hand(layer, x, dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1, 6])
def test_without_a_phase_all_tokens_are_dense(tokens, batch):
    layer = make_layer(bias=True)
    x = torch.randn(batch, tokens, 48, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(layer(x), masked_by_hand(layer, x, tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x, DECODE), masked_by_hand(layer, x, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_one_token_and_several_agree(dtype):
    layer = make_layer(bias=True).to(dtype)
    layer.threshold = layer.threshold.float()
    x = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(6)).to(dtype)
    single = torch.cat([layer(x[:, t : t + 1], DECODE) for t in range(5)], dim=1)
    together = layer(x, DECODE)
    # A last bit may differ, and in bf16 one path rounds before it adds the bias.
    tolerance = 8 * torch.finfo(dtype).eps * together.abs().max().item()
    torch.testing.assert_close(single, together, rtol=0, atol=tolerance)


def test_threshold_boundary():
    layer = SparseLinear(DenseWeight(torch.ones(6, 1)))
    x = torch.tensor([[[0.5, -0.5, 0.5, -0.5, 0.0, 0.0]]])
    below = math.nextafter(0.5, 0)
    layer.threshold.copy_(torch.tensor([0.5, 0.5, below - 1e-7, 0.5 - 1e-7, 0.0, KEEP_ALL]))
    assert layer.dropped(x).flatten().tolist() == [True, True, False, False, True, False]
    x[..., 3] = -0.75
    assert layer(x, DECODE).item() == -0.25
    assert layer(x.expand(1, 2, 6), DECODE).flatten().tolist() == [-0.25, -0.25]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_travel_as_in_a_dense_layer(value, tokens):
    layer = make_layer(threshold=2.0)
    x = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(7))
    x[..., 10] = value
    expected = F.linear(x, layer.weight.packed.t())
    assert not expected.isfinite().any()
    torch.testing.assert_close(layer(x, DECODE), expected, equal_nan=True)


def test_one_token_prompts_are_prefilled_densely(tiny, calibration):
    model, dense = load_model(tiny), load_dense(tiny)
    set_sparsity(model, calibration, 0.9)
    with torch.no_grad():
        cache = model.new_cache(1, 1)
        assert torch.equal(prefill(model, cache, TOKENS[:, :1]), dense(TOKENS[:, :1])[0, -1])
        assert not torch.allclose(model(TOKENS[:, :1], phase=DECODE), dense(TOKENS[:, :1]))


def test_tally_counts_what_is_kept(tiny, calibration):
    model = load_model(tiny)
    set_sparsity(model, calibration, 0.4)
    inputs = {}

    def keep(name, layer, x, phase):
        inputs.setdefault(name, []).append(x[:, phase.dense_tokens :].clone())

    cache = model.new_cache(1, 64)
    with torch.no_grad(), watch_inputs(model, keep), tally_kept(model) as tally:
        model.hidden(TOKENS, None, cache, Phase(2))
        model.hidden(TOKENS[:, :1], torch.tensor([20]), cache, DECODE)
    assert len(inputs) == 8
    seen, kept = 0, 0
    for name, layer in sparse_layers(model).items():
        flat = [value for x in inputs[name] for value in x.abs().flatten().tolist()]
        assert tally.seen[name] == len(flat) == (TOKENS.shape[1] - 2 + 1) * layer.weight.in_features
        assert tally.kept[name].item() == sum(value > layer.threshold[0].item() for value in flat)
        seen += tally.seen[name] * layer.weight.packed[0].nbytes
        kept += tally.kept[name].item() * layer.weight.packed[0].nbytes
    achieved = tally.by_kind(model)
    assert list(achieved) == ["qkv", "all", "o", "gate+up", "down"]
    assert achieved["all"] == pytest.approx(1 - kept / seen)
    assert achieved["all"] == pytest.approx(0.4, abs=0.05)


def test_tally_leaves_dense_tokens_out_and_no_hooks_behind(tiny):
    model = load_model(tiny)
    with pytest.raises(RuntimeError), tally_kept(model) as tally:
        model.hidden(TOKENS)
        assert tally.by_kind(model) == {}
        raise RuntimeError
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(model).values())


def test_by_kind_weighs_by_bytes(tiny):
    model = load_model(tiny)
    sizes = {"wqkv": 64 * 128, "wo": 64 * 64, "w13": 64 * 344, "w2": 172 * 64}  # K x N
    rows = {"wqkv": 64, "wo": 64, "w13": 64, "w2": 172}
    share_kept = {"wqkv": 0.5, "wo": 1.0, "w13": 0.25, "w2": 0.75}
    tally = Tally()
    for name in sparse_layers(model):
        kind = name.rsplit(".", 1)[1]
        tally.seen[name] = rows[kind]
        tally.kept[name] = torch.tensor(int(rows[kind] * share_kept[kind]))
    achieved = tally.by_kind(model)
    for kind, label in KINDS.items():
        assert achieved[label] == pytest.approx(1 - share_kept[kind])
    kept = sum(size * share_kept[kind] for kind, size in sizes.items())
    assert achieved["all"] == pytest.approx(1 - kept / sum(sizes.values()))


@pytest.mark.parametrize("name", ["tiny", "biased"])
def test_bytes_per_token(name, request):
    folder = request.getfixturevalue(name)
    tensors = load_file(folder / WEIGHTS)
    sparse = sum(tensor.nbytes for key, tensor in tensors.items() if SPARSE_WEIGHT.fullmatch(key))
    rest = sum(tensor.nbytes for key, tensor in tensors.items() if not SPARSE_WEIGHT.fullmatch(key))
    if "output.weight" in tensors:  # of an embedding table that is not the output layer too, one row is read
        rest -= tensors["tok_embeddings.weight"].nbytes
    model = load_model(folder)
    assert bytes_per_token(model, 0) == sparse + rest
    assert bytes_per_token(model, 0.25) == round(0.75 * sparse) + rest


def test_bytes_per_token_count_what_a_sliding_window_holds():
    """Two layers, one of them with a window of 6: it reads 5 earlier tokens and the token itself."""
    model = random_model(TINY | {"model_type": "qwen2", "num_hidden_layers": 2}, "cpu", torch.float32)
    model.args = replace(model.args, sliding_windows=(None, 6))
    weights, token = bytes_per_token(model, 0), 2 * 2 * 32 * 4  # keys and values of a layer: 2 heads of 32, fp32
    assert bytes_per_token(model, 0, [0]) == weights
    assert [bytes_per_token(model, 0, [n]) - weights for n in (3, 5, 6, 1000)] == [
        token * (n + earlier) for n, earlier in ((3, 3), (5, 5), (6, 5), (1000, 5))
    ]
    assert bytes_per_token(model, 0, range(4, 8)) - weights == token * (4 + 5 + 6 + 7 + 4 + 5 + 5 + 5) / 4
    assert bytes_per_token(model, 0.5, [1000]) < weights + token * 1005  # rows that are skipped do not hide the cache


def test_calibration_round_trip(tmp_path, tiny, calibration):
    path = tmp_path / "new" / "calibration.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert (loaded.model, loaded.origin) == (calibration.model, calibration.origin)
    assert loaded.curves.keys() == calibration.curves.keys()
    assert all(torch.equal(loaded.curves[name], points) for name, points in calibration.curves.items())
    loaded.check(tiny)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, calibration):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        Calibration(calibration.curves, calibration.model, {"corpus": torch}).save(path)
    with pytest.raises(ValueError):
        Calibration({"a": torch.ones(2).to_sparse()}, {}, {}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_threshold_interpolates():
    points = torch.tensor([0.0, 1.0, 4.0, 4.0, 6.0])  # at 0, 25, 50, 75 and 100 %
    calibration = Calibration({"a": points}, {}, {})
    assert calibration.threshold("a", 0) == KEEP_ALL
    expected = {0.125: 0.5, 0.25: 1, 0.375: 2.5, 0.5: 4, 0.6: 4, 0.875: 5, 1: 6}
    for sparsity, threshold in expected.items():
        assert calibration.threshold("a", sparsity) == pytest.approx(threshold, rel=1e-6)
    for sparsity in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sparsity"):
            calibration.threshold("a", sparsity)


def test_threshold_is_monotone(calibration):
    for name in calibration.curves:
        thresholds = [calibration.threshold(name, sparsity / 1000) for sparsity in range(1000)]
        assert thresholds == sorted(thresholds)
        assert thresholds[-1] > thresholds[500] > thresholds[1] >= 0


def test_truncated_and_missing_calibration_files(tmp_path, calibration):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    whole = path.read_bytes()
    for content in (whole[:-5], whole[:200], b"", b"not a safetensors file" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            Calibration.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"calibration\.safetensors is missing"):
        Calibration.load(path)


def test_calibration_of_another_model_is_refused(tiny, biased, tmp_path, calibration):
    differing = r"architecture 'llama' \(checkpoint: 'qwen2'\), n_layers '2' \(checkpoint: '3'\)"
    with pytest.raises(ValueError, match=differing):
        calibration.check(biased)
    finetuned = tmp_path / "finetuned"
    shutil.copytree(tiny, finetuned)
    tensors = load_file(finetuned / WEIGHTS)
    tensors["layers.1.attention.wo.weight"][0] += 1
    save_file(tensors, finetuned / WEIGHTS, metadata={"format": "teal-fast"})
    with pytest.raises(
        ValueError,
        match=rf"has weights '\w+' \(checkpoint: '\w+'\); run `python calibrate\.py --checkpoint {finetuned}`",
    ):
        calibration.check(finetuned)


def test_calibration_of_other_layers_is_refused(tiny, calibration):
    for change, message in (
        ({"layers.2.attention.wo": torch.arange(3.0)}, r"has, unlike the model, layer 'layers\.2\.attention\.wo'"),
        ({"layers.0.attention.wqkv": None}, r"lacks layer 'layers\.0\.attention\.wqkv'"),
    ):
        quantiles = {name: points for name, points in (calibration.curves | change).items() if points is not None}
        with pytest.raises(ValueError, match=message):
            Calibration(quantiles, calibration.model, calibration.origin).check(tiny)


def test_a_missing_calibration_is_an_error_for_libraries(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "fresh")
    with pytest.raises(MissingCalibrationError, match=rf"run `python calibrate\.py --checkpoint {folder}`"):
        load_calibration(folder)


def test_load_calibration_takes_another_file(tiny, tmp_path, calibration):
    calibration.save(tmp_path / "mine.safetensors")
    assert load_calibration(tiny, tmp_path / "mine.safetensors").origin == {"corpus": "random"}
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors is missing"):
        load_calibration(tiny, tmp_path / "other.safetensors")


def test_unconverted_folder_is_refused(tiny_hf):
    with pytest.raises(ValueError, match=rf"{tiny_hf} is not converted yet: run .*convert_hf_checkpoint {tiny_hf}"):
        load_model(tiny_hf)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_load_model_computes_in_the_dtype_asked_for(tiny, dtype):
    model = load_model(tiny, "cpu", dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {layer.threshold.dtype for layer in sparse_layers(model).values()} == {torch.float32}
    assert model.output.weight is model.tok_embeddings.weight
    tokens = TOKENS[:, :6]
    logits, exact = run(model, tokens, 4).float(), run(load_model(tiny), tokens, 4)
    assert (logits - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_load_model_keeps_the_stored_dtype(demo):
    model = load_model(demo)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(sparse_layers(model)) == 4 * 30
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all((layer.threshold == KEEP_ALL).all() for layer in sparse_layers(model).values())


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "", "meta", "mps", "cuda:x", "cuda:-1"):
        with pytest.raises(ValueError, match=f"--device {name} is not known here, expected cpu, cuda or cuda:N"):
            pick_device(name)
    for name in ("cuda:99", "cuda:1000"):
        with pytest.raises(ValueError, match=rf"--device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA"):
            pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_pick_device_without_a_gpu():
    with pytest.raises(ValueError, match="sees 0 CUDA devices, use another or --device cpu"):
        pick_device("cuda")
