"""The step in three stages against plain PyTorch, and its bits against themselves, on a GPU with clusters."""

from functools import partial

import pytest
import torch

from teal_fast.benchmarks.shapes import random_model
from teal_fast.engine import staged_step
from teal_fast.engine.engine import Engine
from teal_fast.engine.grids import measure_grids
from teal_fast.engine.prefill import prefill
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.staged_step import StagedStep, build_stages, stage_shape
from teal_fast.files.calibration import set_sparsity
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.engine.random_models import DEVICE, PROMPT, make
from teal_fast.tests.engine.staged_reference import staged_reference
from teal_fast.tests.models import TINY
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output

clusters = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs a GPU with clusters"
)
EVEN = TINY | {"intermediate_size": 320}
QWEN2 = EVEN | {"model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = EVEN | {"model_type": "qwen3", "head_dim": 64}
BIASED = EVEN | {"attention_bias": True, "mlp_bias": True}
MISTRAL = EVEN | {"model_type": "mistral", "sliding_window": 6}
SMALL = EVEN | {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
WIDE = EVEN | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
WIDEST = WIDE | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 1}
INT8, INT4 = Format("int8"), Format("int4", 64)


def staged(config, dtype=torch.bfloat16, format=None, sparsity=0.5, length=64, **how):
    """A model, perhaps quantized, with PROMPT in its cache, its calibration, and the step over it."""
    model, cache, calibration = make(config, dtype, sparsity, length)
    if format is not None:
        for name, layer in sparse_layers(model).items():
            layer.weight = format.within(name).pack(layer.weight.dequantize())
        model.output = Int8Output.pack(model.output.weight)
    return model, cache, calibration, StagedStep(model, cache, build_stages(model, **how))


def call(step, token: int, position: int) -> torch.Tensor:
    return step(torch.tensor([[token]], device=DEVICE), torch.tensor([position])).clone()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def check(model, cache, step, positions, tolerance):
    grids = measure_grids(model)
    for position in positions:
        expected = staged_reference(model, cache, grids, 7, position)
        rows = [[tensor[0, :, position].clone() for tensor in side] for side in (cache.k, cache.v)]
        found = call(step, 7, position)
        assert error(found, expected) < tolerance, (position, error(found, expected))
        for side, expected_rows in zip((cache.k, cache.v), rows, strict=True):
            for tensor, row in zip(side, expected_rows, strict=True):
                assert error(tensor[0, :, position], row.float()) < tolerance
    assert step.beyond.item() == 0


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
@clusters
@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case, sparsity):
    config, dtype, format = CASES[case]
    model, cache, _, step = staged(config, dtype, format, sparsity)
    check(model, cache, step, [len(PROMPT), 0, 40], 0.01)


@pytest.mark.gpu
@clusters
@pytest.mark.parametrize("config", [EVEN, SMALL, QWEN3 | {"num_attention_heads": 8, "num_key_value_heads": 1}])
def test_long_contexts(config):
    model, cache, _, step = staged(config, length=2048)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_(0, 1)
    check(model, cache, step, [511, 512, 600, 767, 768, 2047], 0.01)


@pytest.mark.gpu
@clusters
@pytest.mark.parametrize("window", [300, 1000])
def test_windows_that_end_in_a_chunk(window):
    model, cache, _, step = staged(MISTRAL | {"sliding_window": window}, length=2048)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_(0, 1)
    check(model, cache, step, [200, 400, 511, 1023, 1400], 0.01)


@pytest.mark.gpu
@clusters
@pytest.mark.parametrize("format", [None, INT8, INT4], ids=["bf16", "int8", "int4"])
def test_the_same_bits_a_thousand_times(format):
    _, _, _, step = staged(SMALL, format=format, length=1024)
    for position in (len(PROMPT), 700):
        expected = call(step, 7, position)
        different = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        for _ in range(1000):
            different += (call(step, 7, position) != expected).any()
        assert different.item() == 0 and step.beyond.item() == 0


@pytest.mark.gpu
@clusters
@pytest.mark.parametrize("how", [{"dependent": False}, {"delay": 20}, {"cluster": 4}], ids=str)
@pytest.mark.parametrize("format", [None, INT4], ids=["bf16", "int4"])
def test_the_same_bits_however_it_is_launched(format, how):
    """Clusters of another size round other partial sums, so that its bits differ, but hardly."""
    model, cache, _, step = staged(SMALL, format=format, length=1024)
    other = StagedStep(model, cache, build_stages(model, **how))
    for position in (len(PROMPT), 700):
        expected, found = call(step, 7, position), call(other, 7, position)
        assert torch.equal(found, expected) if "cluster" not in how else error(found, expected) < 0.01


@pytest.mark.gpu
@clusters
@pytest.mark.parametrize("format", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("size", [300, 5000])
def test_massive_activations_cost_the_others_nothing(format, size):
    model, cache, _, step = staged(EVEN | {"hidden_size": 1024}, format=format, sparsity=0)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention_norm.weight[33] = layer.ffn_norm.weight[700] = size
    check(model, cache, step, [len(PROMPT)], 0.01)


@pytest.mark.gpu
@clusters
def test_what_leaves_its_grid_is_counted(monkeypatch):
    fine = [type(grids)(*(grid / 4096 for grid in grids)) for grids in measure_grids(staged(EVEN)[0])]
    monkeypatch.setattr(staged_step, "measure_grids", lambda model: fine)
    *_, step = staged(EVEN)
    call(step, 7, len(PROMPT))
    assert step.beyond.item() > 0


@pytest.mark.gpu
@clusters
def test_the_likeliest_token():
    model, _, _, step = staged(EVEN, sparsity=0)
    call(step, 7, len(PROMPT))
    for position in range(len(PROMPT) + 1, 40):  # each step goes on from the token that the one before found
        logits = step(step.best[0].view(1, 1), torch.tensor([position]))
        largest = logits.max()
        assert step.best[1].item() == largest.item()
        assert step.best[0].item() == (logits == largest).nonzero()[0].item()
    with torch.no_grad():
        model.output.weight.zero_()
    assert call(step, 7, 20).abs().max() == 0 and step.best[0].item() == 0  # of equal ones the first
    with torch.no_grad():
        model.output.weight[300] = torch.nan
    call(step, 7, 20)
    assert step.best[0].item() == 300 and step.best[1].isnan().item()


@pytest.mark.gpu
@clusters
@pytest.mark.parametrize("format", [None, INT8, INT4], ids=["bf16", "int8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_travel_on(format, value):
    model, _, _, step = staged(EVEN, format=format)
    with torch.no_grad():
        model.tok_embeddings.weight[9, 5] = value
    assert not call(step, 7, 20).isnan().any() and call(step, 9, 20).isnan().all()


@pytest.mark.gpu
@clusters
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
