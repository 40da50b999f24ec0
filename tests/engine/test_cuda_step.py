"""The fused CUDA step against the plain one (Triton's interpreter runs it without a GPU), and its capture."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from teal_fast.benchmarks.shapes import random_model
from teal_fast.engine.cuda_step import CapturedStep, can_fuse, fused_step, plain_step
from teal_fast.engine.engine import Engine
from teal_fast.engine.prefill import prefill
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.memory import OutOfMemoryError, memory_for
from teal_fast.kernels import compact_gemv, decode_attention, gate_up
from teal_fast.kernels.backend import INTERPRETED, triton
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.engine.random_models import DEVICE, MISTRAL, PROMPT, QWEN, follow, make
from teal_fast.tests.models import TINY
from teal_fast.weights.dense import DenseWeight
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output, output_weight


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one after another: fewer and larger ones here, those of use in tests/kernels."""
    if INTERPRETED:
        monkeypatch.setattr(decode_attention, "PROGRAMS", 8)
        for module in (compact_gemv, gate_up):
            for format in module.DEFAULTS:
                monkeypatch.setitem(module.DEFAULTS, format, (1, 128, 32, 1))


@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("config", [TINY, QWEN, MISTRAL], ids=["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_fused_step_equals_the_plain_one(config, sparsity):
    model, cache, _ = make(config, torch.float32, sparsity)
    plain, fused = follow(partial(plain_step, model, cache), 2), follow(partial(fused_step, model, cache), 2)
    assert plain.std() > 0.1
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-4)


@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 64)], ids=["int8", "int4"])
def test_fused_step_with_quantized_weights(format):
    model, cache, _ = make(TINY | {"intermediate_size": 256}, torch.float32, 0.5)
    for layer in sparse_layers(model).values():
        layer.weight = format.pack(layer.weight.dequantize())
    model.output = Int8Output.pack(model.output.weight)
    fused = follow(partial(fused_step, model, cache), 1)
    for layer in sparse_layers(model).values():  # the CPU's plain step in int4 rounds factors, which this one does not
        layer.weight = DenseWeight(layer.weight.dequantize())
    output = torch.nn.Linear(model.args.dim, model.args.vocab_size, bias=False)
    output.weight = torch.nn.Parameter(output_weight(model.output), requires_grad=False)
    model.output = output
    plain = follow(partial(plain_step, model, cache), 1)
    assert plain.std() > 0.1
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-3)  # products take 16 bits of what they are given


@pytest.mark.skipif(triton is None, reason="no Triton here")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.06)], ids=str)
def test_fused_step_in_half_precision(dtype, tolerance):
    model, cache, _ = make(TINY, dtype, 0)  # dense: on a threshold, the last bit of a rounding decides
    plain, fused = follow(partial(plain_step, model, cache), 2), follow(partial(fused_step, model, cache), 2)
    assert (fused - plain).norm() / plain.norm() < tolerance


def test_can_fuse():
    def answer(**changes):
        return can_fuse(random_model(TINY | changes, DEVICE, torch.float32))

    assert answer() and answer(model_type="qwen2") and answer(model_type="mistral")
    assert not answer(model_type="qwen3")  # normalises q and k
    assert not answer(mlp_bias=True) and not answer(attention_bias=True)
    assert not answer(head_dim=48) and not answer(head_dim=16)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TINY, QWEN, MISTRAL, TINY | {"model_type": "qwen3"}])
def test_captured_step_equals_eager_at_every_sparsity(config):
    model, cache, calibration = make(config, torch.bfloat16, 0)
    captured = CapturedStep(model, cache)
    eager = partial(fused_step if can_fuse(model) else plain_step, model, cache)
    prompt = torch.tensor([PROMPT], device=DEVICE)
    for sparsity in (0, 0.5, 0.25, 0):  # set between replays of one graph
        set_sparsity(model, calibration, sparsity)
        with torch.no_grad():
            prefill(model, cache, prompt)  # capturing has written the cache's first row
        assert torch.equal(follow(captured, 20), follow(eager, 20))


@pytest.mark.gpu
def test_a_thousand_steps_repeat():
    model, cache, calibration = make(TINY, torch.bfloat16, 0.5, length=1024)
    engine = Engine(model, calibration, context=cache.length)
    request = Request(PROMPT, Sampling(0.0), 0.5, 1000)
    runs = [[token.id for token in engine.stream(request)] for _ in range(2)]
    assert runs[0] == runs[1] and len(set(runs[0])) > 10


@pytest.mark.gpu
@torch.no_grad()
def test_decoding_ahead_of_the_host_gives_the_same_tokens():
    model, cache, calibration = make(TINY, torch.float32, 0.5)
    expected = [int(prefill(model, cache, torch.tensor([PROMPT], device=DEVICE)).argmax())]
    for position in range(len(PROMPT), len(PROMPT) + 11):
        token, place = torch.tensor([expected[-1:]], device=DEVICE), torch.tensor([position], device=DEVICE)
        expected.append(int(fused_step(model, cache, token, place).argmax()))
    engine = Engine(model, calibration, context=cache.length)
    for stop in ((), (expected[8],)):
        tokens = [token.id for token in engine.stream(Request(PROMPT, Sampling(0.0), 0.5, 12, stop))]
        assert tokens == (expected[: expected.index(expected[8]) + 1] if stop else expected)
        assert engine.held.ids == PROMPT + tokens[:-1]  # the step that ran ahead is not remembered


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.8, 50, 0.9)], ids=str)
def test_logits_of_nan_end_the_answer_and_not_the_process(sampling):
    """A step is on its way when they are seen. Its token is any, but an id, so that nothing asserts on the device."""
    model, cache, calibration = make(TINY, torch.float32, 0.5)
    engine = Engine(model, calibration, context=cache.length)
    request = Request(PROMPT, sampling, 0.5, 12, (), seed=1)
    expected, step = [token.id for token in engine.stream(request)], engine.step
    engine.step = lambda token, position: step(token, position) * torch.nan
    with pytest.raises(ValueError, match=f"the logits after {len(PROMPT) + 1} tokens hold NaN or inf"):
        list(engine.stream(request))
    torch.cuda.synchronize()
    engine.step = step
    assert [token.id for token in engine.stream(request)] == expected


@pytest.mark.gpu
def test_memory_that_a_gpu_refuses_is_one_line():
    model, _, calibration = make(TINY, torch.float32, 0.5)
    refused = r"^out of memory for it \(35,184\.4 GB more were refused\): ask for less$"
    with pytest.raises(OutOfMemoryError, match=refused), memory_for("it", "ask for less"):
        torch.empty(1 << 45, dtype=torch.uint8, device=DEVICE)
    model.args = replace(model.args, max_position=1 << 33)
    with pytest.raises(OutOfMemoryError, match=r"keys and values of 8,589,934,592 tokens \(.* GB asked for, cuda"):
        Engine(model, calibration, context=1 << 33)
    assert len(list(Engine(model, calibration, context=64).stream(Request(PROMPT, max_new_tokens=4)))) == 4
