"""The C++ step on weights in blocks against the plain one, and against the weights that the blocks stand for."""

import copy
import functools

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from teal_fast.benchmarks.shapes import calibrate_on_random_tokens, random_model
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.steps import PlainStep, fast_step
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.files.gguf_blocks import to_blocks
from teal_fast.model import Transformer
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.engine.test_cpu_step import (
    POSITIONS,
    caches,
    clear_of_thresholds,
    errors,
    heads,
    make_step,  # noqa: F401  a fixture
    one_thread,  # noqa: F401  a fixture
    restore,
    run,
)
from teal_fast.tests.gguf_models import rounded
from teal_fast.tests.models import TINY
from teal_fast.weights.blocks import BlockEmbedding, BlockOutput, BlockPart, BlockWeight
from teal_fast.weights.dense import DenseWeight

EVEN = {"hidden_size": 256, "intermediate_size": 512}
RAGGED = {"hidden_size": 192, "intermediate_size": 224, "vocab_size": 499}  # no whole strips, nor wholes of 256
# Types of q, k and v; o; gate and up; down; embeddings; output. None: in the model's own dtype; the output tied.
MIXED = ("Q4_K", "Q4_K", "Q6_K"), ("Q4_K",), ("Q4_K", "Q4_K"), ("Q6_K",), "Q8_0", "Q6_K"
CASES = {
    "mixed": (EVEN | heads(4, 2, 64) | {"attention_bias": True}, *MIXED),
    "tied": (EVEN | heads(4, 2, 64) | {"model_type": "qwen2"}, ("Q5_K", "Q5_K", "Q5_K"), *MIXED[1:4], "Q6_K", None),
    "some": (EVEN | heads(4, 1, 64), ("IQ4_XS",) * 3, (None,), ("Q4_K", "IQ4_XS"), ("Q5_K",), None, "Q4_0"),
    "ragged": (
        RAGGED | heads(6, 3, 32),
        ("Q4_1", "Q5_0", "Q8_0"),
        ("IQ4_NL",),
        ("Q5_1",) * 2,
        ("Q4_1",),
        "Q4_1",
        "Q8_0",
    ),
}
# Off the plain step, whose products have the same bits: where a norm or an activation rounds otherwise, a whole number
# of x may.
TOLERANCE = 1e-3
# Off the weights: x is rounded by up to 1/254 of the largest of 32, about 0.5 % of a product, and random bytes of
# K-quants have offsets, of which much cancels. A wrong row or scale is off by far more than half the norm.
TOLERANCE_WEIGHTS = 0.08


def blocks_of(weight: Tensor, name: str, N: int, K: int) -> BlockPart:
    """A weight [K, N] near this one in a type."""
    packed = torch.from_numpy(rounded(weight.t().float().contiguous().numpy(), Type[name]))
    return BlockPart(to_blocks(packed, name, K), N)


def in_types(weight: Tensor, names: tuple[str | None, ...], sizes: list[int]) -> nn.Module:
    """A weight [K, N] in parts of these outputs and types."""
    if names[0] is None:
        return DenseWeight(weight)
    each = zip(weight.split(sizes, 1), names, sizes, strict=True)
    return BlockWeight([blocks_of(part, name, N, len(weight)) for part, name, N in each])


@functools.cache
def made(case: str, dtype: torch.dtype) -> tuple[Transformer, Calibration]:
    sizes, qkv, o, gate_up, down, embeddings, output = CASES[case]
    model = random_model(TINY | sizes, "cpu", dtype, std=0.08)
    args = model.args
    widths = {"wqkv": list(model.layers[0].attention.sizes), "w13": [args.ffn_dim] * 2}
    names = {"wqkv": qkv, "wo": o, "w13": gate_up, "w2": down}
    for name, layer in sparse_layers(model).items():
        last = name.rsplit(".", 1)[1]
        layer.weight = in_types(layer.weight.packed, names[last], widths.get(last, [args.dim]))
    table = model.tok_embeddings.weight
    if embeddings:
        model.tok_embeddings = BlockEmbedding(in_types(table.t(), (embeddings,), [args.vocab_size]), dtype)
    if output:
        model.output = BlockOutput(in_types(model.output.weight.t(), (output,), [args.vocab_size]))
    else:
        model.output = BlockOutput(model.tok_embeddings.weight)
    return model, calibrate_on_random_tokens(model, tokens=64)


def make(case: str, sparsity: float, dtype: torch.dtype = torch.float32) -> Transformer:
    model, calibration = made(case, dtype)
    set_sparsity(model, calibration, sparsity)
    model.cache = model.new_cache(1, POSITIONS[-1] + 1)
    generator = torch.Generator().manual_seed(2)
    for tensor in caches(model):
        tensor.normal_(generator=generator)
    return model


def widened(model: Transformer) -> Transformer:
    """The model with the weights that its blocks stand for, in fp32."""
    wide = copy.deepcopy(model)
    for layer in sparse_layers(wide).values():
        layer.weight = DenseWeight(layer.weight.dequantize())
    if isinstance(wide.tok_embeddings, BlockEmbedding):
        table = wide.tok_embeddings.weight.dequantize().t()
        wide.tok_embeddings = nn.Embedding.from_pretrained(table.to(model.tok_embeddings.dtype))
    output = nn.Linear(model.args.dim, model.args.vocab_size, bias=False)
    output.weight = nn.Parameter(model.output.weight.dequantize().t().contiguous(), requires_grad=False)
    wide.output = output
    wide.float()
    for cached in (wide.cache.k, wide.cache.v):
        cached[:] = [tensor.float() for tensor in cached]
    return wide


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_step_and_the_weights_it_stands_for(make_step, case, sparsity):  # noqa: F811
    model = make(case, sparsity)
    step = make_step(model)
    off = errors(model, step, model)
    assert off.median() < TOLERANCE and off.max() < TOLERANCE_WEIGHTS
    assert sparsity or errors(model, step, widened(model)).max() < TOLERANCE_WEIGHTS


@pytest.mark.parametrize("case", CASES)
def test_bf16(make_step, case):  # noqa: F811
    model = make(case, 0, torch.bfloat16)
    assert errors(model, make_step(model), widened(model)).max() < TOLERANCE_WEIGHTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["mixed", "ragged"])
def test_same_bits_for_any_number_of_threads(make_step, case, dtype, set_threads):  # noqa: F811
    model, found = make(case, 0.5, dtype), []
    before, step = [tensor.clone() for tensor in caches(model)], make_step(model)
    for threads in (1, 2, 3, 4, 8):
        set_threads(threads)
        restore(model, before)
        logits = [run(step, 7, position) for position in (0, 63, 64, POSITIONS[-1])]
        found.append([*logits, *(tensor.float() for tensor in caches(model))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nan_travels_and_dropped_rows_are_not_read(make_step):  # noqa: F811
    model = copy.deepcopy(make("mixed", 0.5))
    step, token = make_step(model), clear_of_thresholds(model, 5)
    expected = run(step, token, 5)
    layer = model.layers[0].attention.wo
    layer.threshold[:] = torch.inf
    nothing = run(step, token, 5)
    layer.weight.parts[0].super_scale.fill_(torch.nan)
    assert torch.equal(run(step, token, 5), nothing) and not torch.equal(nothing, expected)
    layer.threshold[:] = -1
    assert run(step, token, 5).isnan().all()


def test_achieved_is_the_share_of_codes_and_the_step_is_the_usual_one(make_step):  # noqa: F811
    model = make("mixed", 0.5)
    step, layers = make_step(model), list(sparse_layers(model).values())
    run(step, 7, 5)
    held = sum(layer.weight.row_bytes * layer.weight.in_features for layer in layers)
    read = sum(kept * layer.weight.row_bytes for layer, kept in zip(layers, step.kept.tolist(), strict=True))
    assert step.achieved == pytest.approx(1 - read / held)
    assert 0.3 < step.achieved < 0.7
    assert isinstance(fast_step(model, model.cache), (CpuStep, PlainStep))
