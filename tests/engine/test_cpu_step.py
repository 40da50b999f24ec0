"""The C++ step against the plain one, on random models of every kind: same logits, same cache, up to rounding."""

import copy
import ctypes
import functools
import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teal_fast.benchmarks.shapes import calibrate_on_random_tokens, random_model
from teal_fast.engine import cpu_step
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.steps import PlainStep
from teal_fast.files.calibration import Calibration, set_sparsity
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import sparse_layers, watch_inputs
from teal_fast.tests.cpp import RUNNABLE, compiled
from teal_fast.tests.models import TINY
from teal_fast.weights.dense import DenseWeight
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output, output_weight

LENGTH = 260
POSITIONS = (0, 1, 62, 63, 64, 65, 127, 128, 200, LENGTH - 1)  # a chunk is 64 positions


def heads(query: int, key: int, size: int) -> dict:
    return {"num_attention_heads": query, "num_key_value_heads": key, "head_dim": size}


WINDOW = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}
CASES = {
    "llama": {},
    "groups_of_1": heads(3, 3, 16),
    "groups_of_3": heads(6, 2, 48),
    "groups_of_4": heads(4, 1, 16),
    "groups_of_5": heads(5, 1, 64),
    "groups_of_7": heads(14, 2, 16),
    "groups_of_8": heads(8, 1, 128),
    "ragged": heads(6, 3, 10) | {"hidden_size": 101, "intermediate_size": 77, "vocab_size": 499},
    "below_a_vector": heads(1, 1, 2) | {"hidden_size": 3, "intermediate_size": 5, "vocab_size": 7},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window_on_a_layer": WINDOW,
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "mistral_small_window": {"model_type": "mistral", "sliding_window": 6},
    "mistral_window_of_a_chunk": {"model_type": "mistral", "sliding_window": 64},
}
EVEN = {"intermediate_size": 256}  # int4 wants groups of 64 outputs
QUANTIZED = {
    "llama": EVEN,
    "groups_of_7": EVEN | heads(14, 2, 64),
    "biases": EVEN | {"attention_bias": True, "mlp_bias": True},
    "qwen2_tied": EVEN | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": EVEN | {"model_type": "qwen3"},
}
FORMATS = {"int8": Format("int8"), "int4": Format("int4", 64), "int4_128": Format("int4", 128)}
TOLERANCE = 2e-5  # fp32, logits of size 1: another order of summation, another exp, sin and cos
# Off the plain step of the same weights in fp32, as a share of the logits' norm: the inputs of each product, keys and
# values are rounded. The plain step in half precision rounds more: it is off by up to 0.0023 and 0.021 itself.
TOLERANCE_INT8 = 2e-4  # the output layer's input is rounded to 16 bits: to 1/65534 of its largest entry, and norms grow
# The factors of int4's rows are rounded to 8 bits: by up to 1/254 of the largest of eight, about 0.5 % of a product's
# norm, in eight products whose errors add up to 2 %.
TOLERANCE_INT4 = 0.04
TOLERANCE_HALF = {torch.float16: 0.002, torch.bfloat16: 0.015}


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """On a busy machine threads wait for one another, and most of these tests need but one."""
    set_threads(1)


# One instruction set, for what the others can't do differently.
widest = pytest.mark.parametrize("make_step", RUNNABLE[-1:], indirect=True)


@pytest.fixture(params=RUNNABLE)
def make_step(request, monkeypatch):
    """CpuStep, with the kernels of an instruction set."""
    native = compiled(request.param)
    monkeypatch.setattr(cpu_step, "library", lambda: native)
    return lambda model: CpuStep(model, model.cache)


@functools.cache
def made(case: str, dtype: torch.dtype, format: str | None = None) -> tuple[Transformer, Calibration]:
    model = random_model(TINY | (QUANTIZED if format else CASES)[case], "cpu", dtype, std=0.1)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
    if format:
        model.output = Int8Output.pack(model.output.weight)
        for layer in sparse_layers(model).values():
            layer.weight = FORMATS[format].pack(layer.weight.dequantize())
    return model, calibrate_on_random_tokens(model, tokens=64)


def make(
    case: str, sparsity: float, dtype: torch.dtype = torch.float32, length: int = LENGTH, format: str | None = None
) -> Transformer:
    """A random model with random keys and values in its cache."""
    model, calibration = made(case, dtype, format)
    set_sparsity(model, calibration, sparsity)
    model.cache = model.new_cache(1, length)  # these tests' models carry theirs along
    generator = torch.Generator().manual_seed(2)
    for tensor in caches(model):
        tensor.normal_(generator=generator)
    return model


def caches(model: Transformer) -> list[Tensor]:
    return [*model.cache.k, *model.cache.v]


def restore(model: Transformer, before: list[Tensor]) -> None:
    for tensor, old in zip(caches(model), before, strict=True):
        tensor.copy_(old)


@torch.no_grad()
def run(step, token: int, position: int) -> Tensor:
    return step(torch.tensor([[token]]), torch.tensor([position])).float().clone()


def margin(model: Transformer, token: int, position: int) -> float:
    """How near an activation of the plain step comes to its threshold."""
    nearest, before = [], [tensor.clone() for tensor in caches(model)]
    with watch_inputs(model, lambda _, layer, x, phase: nearest.append((x.abs() - layer.threshold).abs().min().item())):
        run(PlainStep(model, model.cache), token, position)
    restore(model, before)
    return min(nearest)


def clear_of_thresholds(model: Transformer, position: int) -> int:
    """A token for which it does not depend on rounding which channels are kept."""
    return next(token for token in range(model.args.vocab_size) if margin(model, token, position) > 1e-5)


def poison(model: Transformer, step: CpuStep) -> None:
    """Fills the step's own memory with NaN, so that what is read before it is written shows."""
    embedding, before = model.tok_embeddings.weight[0].clone(), [tensor.clone() for tensor in caches(model)]
    model.tok_embeddings.weight[0] = torch.nan
    assert run(step, 0, model.cache.length - 1).isnan().all()
    model.tok_embeddings.weight[0] = embedding
    restore(model, before)


def check(model: Transformer, step: CpuStep, token: int, position: int) -> None:
    """Both steps give the same logits and write the same keys and values, and nothing else, into the cache."""
    before = [tensor.clone() for tensor in caches(model)]
    expected = run(PlainStep(model, model.cache), token, position)
    assert expected.std() > 0.05
    written = [tensor[:, :, position].clone() for tensor in caches(model)]
    restore(model, before)
    torch.testing.assert_close(run(step, token, position), expected, rtol=0, atol=TOLERANCE)
    for tensor, old, new in zip(caches(model), before, written, strict=True):
        torch.testing.assert_close(tensor[:, :, position], new, rtol=0, atol=TOLERANCE)
        tensor[:, :, position] = old[:, :, position]
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_step(make_step, case, sparsity):
    model = make(case, sparsity)
    step = make_step(model)
    poison(model, step)
    for position in POSITIONS:
        check(model, step, clear_of_thresholds(model, position), position)


@pytest.mark.parametrize("case", ["llama", "mistral_window_of_a_chunk"])
def test_saturated_softmax_and_silu(make_step, case):
    """Scores and gates of hundreds: weights that underflow, in a chunk and between chunks, exp out of its range."""
    model = copy.deepcopy(make(case, 0))
    for keys, layer in zip(model.cache.k, model.layers, strict=True):
        keys *= 100
        layer.feed_forward.w13.weight.packed *= 100
    step = make_step(model)
    poison(model, step)
    for position in POSITIONS:
        expected, found = run(PlainStep(model, model.cache), 5, position), run(step, 5, position)
        assert found.isfinite().all() and (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE_HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_half_precision(make_step, case, dtype):
    model = make(case, 0, dtype)  # dense: on a threshold, the last bit of a rounding decides
    wide, step = copy.deepcopy(model).float(), make_step(model)
    wide.cache = KVCache([k.float() for k in model.cache.k], [v.float() for v in model.cache.v], model.frequencies)
    poison(model, step)
    for position in POSITIONS:
        expected, found = run(PlainStep(wide, wide.cache), 5, position), run(step, 5, position)
        assert (found - expected).norm() < TOLERANCE_HALF[dtype] * expected.norm()


def test_thresholds_change_between_two_tokens(make_step):
    model, calibration = make("llama", 0), made("llama", torch.float32)[1]
    step, found = make_step(model), []
    for sparsity in (0, 0.5, 0.25, 0):
        set_sparsity(model, calibration, sparsity)
        check(model, step, clear_of_thresholds(model, 70), 70)
        found.append(run(step, 9, 70))
    assert torch.equal(found[0], found[3])
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(found[:3], 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["llama", "ragged", "groups_of_8"])
def test_same_bits_for_any_number_of_threads(make_step, case, dtype, set_threads):
    model, found = make(case, 0.5, dtype), []
    before, step = [tensor.clone() for tensor in caches(model)], make_step(model)
    for threads in (1, 2, 3, 4, 8):
        set_threads(threads)
        restore(model, before)
        logits = [run(step, 7, position) for position in (0, 63, 64, LENGTH - 1)]
        found.append([*logits, *(tensor.float() for tensor in caches(model))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def widened(model: Transformer) -> Transformer:
    """The model with the weights that its quantized ones stand for, in fp32."""
    wide = copy.deepcopy(model)
    for layer in sparse_layers(wide).values():
        layer.weight = DenseWeight(layer.weight.dequantize())
    wide.output = torch.nn.Linear(model.args.dim, model.args.vocab_size, bias=False)
    wide.output.weight = torch.nn.Parameter(output_weight(model.output), requires_grad=False)
    return wide


def errors(model: Transformer, step, other: Transformer) -> Tensor:
    """How far the step is off the other model's plain one, as a share of the logits' norm, at each position."""
    found = []
    for position in POSITIONS:
        token, before = clear_of_thresholds(model, position), [tensor.clone() for tensor in caches(model)]
        logits = run(step, token, position)
        for changed, old in zip(caches(model), before, strict=True):  # nothing else in the cache was written to
            changed[:, :, position] = old[:, :, position]
            assert torch.equal(changed, old)
        restore(other, before)
        expected = run(PlainStep(other, other.cache), token, position)
        restore(other, before)
        found.append((logits - expected).norm() / expected.norm())
    return torch.stack(found)


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("case", QUANTIZED)
def test_int8_equals_the_plain_step_and_the_weights_it_stands_for(make_step, case, sparsity):
    model = make(case, sparsity, format="int8")
    step = make_step(model)
    poison(model, step)
    for other in (model, widened(model)):
        assert errors(model, step, other).max() < TOLERANCE_INT8


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("format", ["int4", "int4_128"])
@pytest.mark.parametrize("case", QUANTIZED)
def test_int4_equals_the_plain_step(make_step, case, format, sparsity):
    model = make(case, sparsity, format=format)
    step = make_step(model)
    poison(model, step)
    off = errors(model, step, model)
    assert off.median() < TOLERANCE_INT8  # of whole numbers one may be rounded the other way, which may drop a channel
    if sparsity == 0:
        assert off.max() < TOLERANCE_INT4
        assert errors(model, step, widened(model)).max() < TOLERANCE_INT4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", ["llama", "groups_of_7"])
def test_quantized_same_bits_for_any_number_of_threads(make_step, case, format, dtype, set_threads):
    model, found = make(case, 0.5, dtype, format=format), []
    before, step = [tensor.clone() for tensor in caches(model)], make_step(model)
    for threads in (1, 2, 4):
        set_threads(threads)
        restore(model, before)
        logits = [run(step, 7, position) for position in (0, 63, 64, LENGTH - 1)]
        found.append([*logits, *(tensor.float() for tensor in caches(model))])
    restore(model, before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def greedy(model: Transformer, make_step, prompt: list[int], tokens: int) -> list[int]:
    calibration = made("llama", model.norm.weight.dtype)[1]
    engine = Engine(model, calibration, context=model.cache.length, make_step=make_step)
    return [token.id for token in engine.stream(Request(prompt, Sampling(0.0), 0.5, tokens))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompt", [1, 7, 30])
@widest
def test_same_tokens_for_any_number_of_threads(make_step, dtype, prompt, set_threads):
    if dtype == torch.bfloat16 and prompt > 16 and "amx" in RUNNABLE:
        pytest.skip("a longer prompt's products are oneDNN's, whose bits depend on threads where it has AMX")
    model, found = make("llama", 0.5, dtype), []
    for threads in (1, 2, 4):
        set_threads(threads)
        logits = []

        def keeping(model, cache, logits=logits):
            step = CpuStep(model, cache)

            def kept(*arguments):
                logits.append(step(*arguments).clone())
                return logits[-1]

            return kept

        found.append((greedy(model, keeping, list(range(5, 5 + prompt)), 40), torch.stack(logits)))
    for tokens, logits in found[1:]:
        assert tokens == found[0][0] and torch.equal(logits, found[0][1])
    assert len(set(found[0][0])) > 5


@widest
def test_a_thousand_steps_repeat(make_step, set_threads):
    model, runs = make("llama", 0.5, torch.bfloat16, length=1024), []
    for _ in range(2):
        runs.append(greedy(model, CpuStep, [5, 6, 7], 1000))
        set_threads(2)
    assert runs[0] == runs[1] and len(set(runs[0])) > 10


def test_nan_travels_as_in_the_plain_step(make_step):
    model = make("llama", 0.5)
    step, embeddings, output = make_step(model), model.tok_embeddings.weight, model.output.weight
    for tensor, row in ((embeddings, 7), (output, 3)):
        before = tensor[row].clone()
        tensor[row, 20] = torch.nan
        expected, found = run(PlainStep(model, model.cache), 7, 5), run(step, 7, 5)
        tensor[row] = before
        assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().sum() in (1, 500)


def test_dropped_rows_are_not_read(make_step):
    model = copy.deepcopy(make("biases", 0.5))
    step, token, dropped = make_step(model), clear_of_thresholds(model, 5), {}
    with watch_inputs(model, lambda _, layer, x, phase: dropped.update({layer: layer.dropped(x[0, 0])})):
        run(PlainStep(model, model.cache), token, 5)
    expected = run(step, token, 5)
    for layer, rows in dropped.items():
        assert rows.sum() > 10
        layer.weight.packed[rows] = torch.nan
    assert torch.equal(run(step, token, 5), expected)


@pytest.mark.parametrize("token, position", [(-1, 5), (500, 5), (7, -1), (7, LENGTH)])
@widest
def test_outside_vocabulary_or_cache_is_refused(make_step, token, position):
    model = make("llama", 0)
    before = [tensor.clone() for tensor in caches(model)]
    with pytest.raises(ValueError, match=f"token {token} at position {position} is outside"):
        run(make_step(model), token, position)
    assert all(torch.equal(tensor, old) for tensor, old in zip(caches(model), before, strict=True))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@widest
def test_memory_does_not_grow(make_step):
    model = make("llama", 0.5)
    step = make_step(model)

    def resident(steps: int) -> int:
        for i in range(steps):
            run(step, 7, i % LENGTH)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident(300)
    assert resident(2000) - before < 2**20


def test_structures_of_other_sizes_are_refused():
    """A library built of sources whose fields are not those of cpu_step.py."""

    class Library:
        def teal_struct_sizes(self, sizes):
            sizes[0], sizes[1] = ctypes.sizeof(cpu_step.CpuLayer) + 8, ctypes.sizeof(cpu_step.CpuModel)

    with pytest.raises(ValueError, match=r"Layer and Model have 344 and 288 bytes, cpu_step\.py's 336 and 288"):
        cpu_step.native_steps(Library())


@pytest.mark.parametrize("instructions", RUNNABLE)
def test_structures_have_the_sizes_of_the_compiled_ones(instructions):
    assert cpu_step.native_steps(compiled(instructions))
