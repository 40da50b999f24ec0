"""The step in three stages against plain PyTorch, and its bits against themselves, on Hopper and later GPUs."""

from functools import partial

import pytest
import torch

from teal_fast.benchmarks.shapes import random_model
from teal_fast.engine import staged_step
from teal_fast.engine.engine import Engine
from teal_fast.engine.fixed_text import EVEN as EVEN_IDS
from teal_fast.engine.grids import measure_grids
from teal_fast.engine.prefill import prefill
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.staged_step import StagedStep, addends, build_stages, stage_shape
from teal_fast.files.calibration import set_sparsity
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.engine.random_models import DEVICE, PROMPT, make
from teal_fast.tests.engine.staged_reference import staged_reference
from teal_fast.tests.models import TINY
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs compute capability 9.0"
)
EVEN = TINY | {"intermediate_size": 320, "max_position_embeddings": 4096}
QWEN2 = EVEN | {"model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = EVEN | {"model_type": "qwen3", "head_dim": 64}
BIASED = EVEN | {"attention_bias": True, "mlp_bias": True}
MISTRAL = EVEN | {"model_type": "mistral", "sliding_window": 6}
SMALL = EVEN | {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
WIDE = EVEN | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
WIDEST = WIDE | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 1}
INT8, INT4 = Format("int8"), Format("int4", 64)


def staged(config, dtype=torch.bfloat16, format=None, half=True, length=64, change=None, **how):
    """A random model, perhaps quantized, a cache full of random keys and values, and the step over them.

    half: of each layer's inputs a random half is dropped, so that no rounding decides which.
    """
    model = random_model(config, DEVICE, dtype, std=config["hidden_size"] ** -0.5)
    for name, layer in sparse_layers(model).items():
        if format is not None:
            layer.weight = format.within(name).pack(layer.weight.dequantize())
        if half:
            layer.threshold.masked_fill_(torch.rand_like(layer.threshold) < 0.5, torch.inf)
    if format is not None:
        model.output = Int8Output.pack(model.output.weight)
    if change is not None:
        with torch.no_grad():
            change(model)
    cache = model.new_cache(1, length)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()
    return model, cache, StagedStep(model, cache, build_stages(model, **how))


def call(step, token: int, position: int) -> torch.Tensor:
    return step(torch.tensor([[token]], device=DEVICE), torch.tensor([position])).clone()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def check(model, cache, step, positions, tolerance=0.02):
    """Logits, the last layer's update, and the keys and values that are kept, against the reference."""
    grids = measure_grids(model, addends(step.stages))
    for position in positions:
        expected, _, update = staged_reference(model, cache, grids, 7, position)
        rows = [tensor[0, :, position].clone() for tensor in (*cache.k, *cache.v)]
        found = call(step, 7, position)
        errors = {"logits": error(found, expected), "update": error(step.mlp_update, update)}
        for number, (tensor, row) in enumerate(zip((*cache.k, *cache.v), rows, strict=True)):
            errors[f"row {number}"] = error(tensor[0, :, position], row.float())
        assert max(errors.values()) < tolerance, (position, errors)


CASES = {
    "llama": (EVEN, torch.bfloat16, None),
    "fp16": (EVEN, torch.float16, None),
    "qwen2": (QWEN2, torch.bfloat16, None),
    "qwen3": (QWEN3, torch.bfloat16, None),
    "biased": (BIASED, torch.bfloat16, None),
    "mistral": (MISTRAL, torch.bfloat16, None),
    "small": (SMALL, torch.bfloat16, None),
    "wide": (WIDE, torch.bfloat16, None),
    "int8": (EVEN, torch.bfloat16, INT8),
    "int4": (EVEN, torch.bfloat16, INT4),
    "small-int4": (SMALL, torch.float16, INT4),
    "wide-int8": (WIDE, torch.bfloat16, INT8),
    "wide-int4": (WIDE, torch.bfloat16, Format("int4", 128)),
    "widest-int8": (WIDEST, torch.bfloat16, INT8),
}


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("half", [False, True], ids=["dense", "half"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case, half):
    check(*staged(*CASES[case], half), [9, 0, 40])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("config", [EVEN, SMALL, QWEN3 | {"num_attention_heads": 8, "num_key_value_heads": 1}])
def test_long_contexts(config):
    check(*staged(config, length=3072), [510, 511, 512, 600, 767, 768, 2047, 2048, 3071])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("window", [300, 1000])
def test_windows(window):
    check(*staged(MISTRAL | {"sliding_window": window}, length=3072), [200, 400, 511, 1023, 1400, 2600])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("format", [None, INT8, INT4], ids=["bf16", "int8", "int4"])
def test_the_same_bits_a_thousand_times(format):
    _, _, step = staged(SMALL, format=format, length=1024)
    for position in (9, 700):
        expected = call(step, 7, position)
        different = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        for _ in range(1000):
            different += (call(step, 7, position) != expected).any()
        assert different.item() == 0 and step.beyond.item() == 0


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("how", [{"dependent": False}, {"delay": 20}], ids=str)
@pytest.mark.parametrize("format", [None, INT4], ids=["bf16", "int4"])
def test_the_same_bits_however_it_is_launched(format, how):
    model, cache, step = staged(SMALL, format=format, length=1024)
    other = StagedStep(model, cache, build_stages(model, **how))
    for position in (9, 700, 10, 701):
        assert torch.equal(call(step, 7, position), call(other, 7, position))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("format", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("size", [300, 5000])
@pytest.mark.parametrize("alone", [True, False], ids=["others", "own"])
def test_massive_activations_cost_the_others_nothing(format, size, alone):
    """A channel that is `size` times the rest. alone: its weights are zero, so that the others' products show."""

    def change(model):
        for layer in model.layers:
            for norm, part, k in (("attention_norm", "attention.wqkv", 33), ("ffn_norm", "feed_forward.w13", 700)):
                weight = layer.get_submodule(part).weight
                getattr(layer, norm).weight[k] = size
                if weight.format == "int8":
                    weight.packed[k] = 0 if alone else weight.packed[k].sign()
                elif alone:
                    weight.packed[k, : weight.out_features // 2] = 0x88  # eight in both halves stands for zero

    # Its own products are far larger for some tokens than for this one, and so are their columns' grids.
    tolerance = 0.02 if alone else 0.1
    check(*staged(EVEN | {"hidden_size": 1024}, torch.bfloat16, format, False, change=change), [9], tolerance)


@pytest.mark.gpu
@hopper
def test_what_leaves_its_grid_is_counted(monkeypatch):
    usual = measure_grids
    monkeypatch.setattr(
        staged_step, "measure_grids", lambda *given: [type(g)(*(grid / 64 for grid in g)) for g in usual(*given)]
    )
    _, _, step = staged(EVEN)
    call(step, 7, 9)
    assert step.beyond.item() > 0 and 0 < step.beyond_grids <= 1


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("format", [None, INT8, INT4], ids=["bf16", "int8", "int4"])
@pytest.mark.parametrize("half", [False, True], ids=["dense", "half"])
def test_nothing_leaves_its_grid_on_the_text_that_grids_are_of(format, half):
    model, _, step = staged(SMALL, format=format, half=half)
    vocab, (sequences, tokens) = model.args.vocab_size, EVEN_IDS
    for number in range(sequences * tokens):
        call(step, number * vocab // (sequences * tokens), number % tokens)
    assert step.calls == sequences * tokens and step.beyond_grids == 0


@pytest.mark.gpu
@hopper
def test_the_likeliest_token():
    model, _, step = staged(EVEN)

    def told() -> tuple[int, float]:
        token, (same, logit) = step.best
        torch.cuda.synchronize()
        assert token.item() == same.item()
        return same.item(), logit.item()

    call(step, 7, 9)
    for position in range(10, 40):  # each step goes on from the token that the one before found
        logits = step(step.best[0].view(1, 1), torch.tensor([position]))
        largest = logits.max()
        assert told() == ((logits == largest).nonzero()[0].item(), largest.item())
    with torch.no_grad():
        model.output.weight.zero_()
    assert call(step, 7, 20).abs().max() == 0 and told() == (0, 0)  # of equal ones the first
    with torch.no_grad():
        model.output.weight[300] = torch.nan
    call(step, 7, 20)
    assert told()[0] == 300 and step.best[1][1].isnan().item()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("format", [None, INT8, INT4], ids=["bf16", "int8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_travel_on(format, value):
    model, _, step = staged(EVEN, format=format, half=False)
    with torch.no_grad():
        model.tok_embeddings.weight[9, 5] = value
    assert not call(step, 7, 20).isnan().any() and call(step, 9, 21).isnan().all()
    assert not call(step, 7, 20).isnan().any()


@pytest.mark.gpu
@hopper
@torch.no_grad()
def test_the_engine_decodes_by_it():
    model, cache, calibration = make(EVEN, torch.bfloat16, 0.5, length=1024)
    engine = Engine(model, calibration, context=cache.length)
    assert isinstance(engine.step, StagedStep)
    step = StagedStep(model, cache, build_stages(model))
    for sparsity in (0.5, 0):
        set_sparsity(model, calibration, sparsity)
        expected = [int(prefill(model, cache, torch.tensor([PROMPT], device=DEVICE)).argmax())]
        for position in range(len(PROMPT), len(PROMPT) + 99):
            expected.append(int(call(step, expected[-1], position).argmax()))
        for sampling in (Sampling(0.0), Sampling(1.0, top_k=1)):  # in the graph, and after it
            request = Request(PROMPT, sampling, sparsity, 100, ())
            assert [token.id for token in engine.stream(request)] == expected


def test_models_that_it_does_not_serve():
    tiny = partial(random_model, device="cpu")
    with pytest.raises(ValueError, match="no kernels for fp32"):
        stage_shape(tiny(EVEN, dtype=torch.float32))
    with pytest.raises(ValueError, match="no kernels for an MLP of 300"):
        stage_shape(tiny(TINY, dtype=torch.bfloat16)).check()
    with pytest.raises(ValueError, match="no kernels for heads of 48"):
        stage_shape(tiny(EVEN | {"head_dim": 48}, dtype=torch.bfloat16)).check()
    stage_shape(tiny(EVEN, dtype=torch.bfloat16)).check()
