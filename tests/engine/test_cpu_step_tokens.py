"""The C++ step on several tokens: each has the bits of a dense step of its own, and so have its keys and values."""

import pytest
import torch
from torch import Tensor

from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.engine import Engine
from teal_fast.engine.prefill import prefill_by_steps
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.gguf_blocks import PARSERS
from teal_fast.model import Transformer
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.engine import test_cpu_step_blocks as in_blocks
from teal_fast.tests.engine.test_cpu_step import (
    FORMATS,
    LENGTH,
    caches,
    heads,
    made,
    make,
    make_step,  # noqa: F401  a fixture
    restore,
    run,
    widest,
)
from teal_fast.weights.blocks import BlockOutput

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Tokens and first position: all groups that registers hold, across the borders of chunks of 64 and of windows.
SPANS = ((1, 5), (2, 0), (3, 62), (4, 63), (5, 17), (6, 1), (7, 64), (8, 120), (11, 60), (16, LENGTH - 16), (21, 50))
IN_ROWS = ("llama", "ragged", "biases", "groups_of_7", "qwen3", "qwen2_window_on_a_layer", "mistral_small_window")


def ids(model: Transformer, count: int) -> list[int]:
    return [(7 * i + 3) % model.args.vocab_size for i in range(count)]


def one_by_one(model: Transformer, step: CpuStep, tokens: list[int], position: int) -> list[Tensor]:
    """Logits [tokens, vocab] of dense steps, and the caches that they leave."""
    set_sparsity(model, None, 0)
    logits = torch.stack([run(step, token, position + i) for i, token in enumerate(tokens)])
    return [logits, *(tensor.clone() for tensor in caches(model))]


def check(model: Transformer, step: CpuStep, set_threads, spans=SPANS) -> None:
    before = [tensor.clone() for tensor in caches(model)]
    for count, position in spans:
        if position + count > model.cache.length:
            continue
        tokens = ids(model, count)
        restore(model, before)
        set_threads(1)
        expected = one_by_one(model, step, tokens, position)
        for layer in sparse_layers(model).values():
            layer.threshold.fill_(0.1)  # which several tokens do not meet
        for threads in (1, 2, 3):
            set_threads(threads)
            for tensor, old in zip(caches(model), before, strict=True):
                tensor.copy_(old)
                tensor[:, :, position : position + count] = torch.nan  # written before they are read
            poison = step.dense([0] * count, model.cache.length - count) if position == 0 else None
            if poison is not None:  # leaves other tokens' sums in the step's own memory
                for tensor, old in zip(caches(model), before, strict=True):
                    tensor[:, :, -count:] = old[:, :, -count:]
            found = [step.dense(tokens, position, count), *caches(model)]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (count, position, threads)
    assert expected[0].std() > 0.01
    restore(model, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", IN_ROWS)
def test_bits_of_single_steps(make_step, case, dtype, set_threads):  # noqa: F811
    model = make(case, 0, dtype)
    check(model, make_step(model), set_threads)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", ["llama", "groups_of_7"])
def test_bits_of_single_steps_quantized(make_step, case, format, dtype, set_threads):  # noqa: F811
    model = make(case, 0, dtype, format=format)
    check(model, make_step(model), set_threads)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("case", in_blocks.CASES)
def test_bits_of_single_steps_in_blocks(make_step, case, dtype, set_threads):  # noqa: F811
    model = in_blocks.make(case, 0, dtype)
    check(model, make_step(model), set_threads)


@pytest.mark.parametrize("name", PARSERS)
def test_bits_of_single_steps_in_each_block_type(make_step, name, set_threads, monkeypatch):  # noqa: F811
    case = in_blocks.EVEN | heads(4, 2, 64) | {"vocab_size": 323, "num_hidden_layers": 1}
    monkeypatch.setitem(in_blocks.CASES, name, (case, (name,) * 3, (name,), (name,) * 2, (name,), name, name))
    model = in_blocks.make(name, 0, torch.bfloat16)
    assert isinstance(model.output, BlockOutput)
    check(model, make_step(model), set_threads, SPANS[3::2])


@widest
def test_logits_of_the_last_tokens_alone(make_step):  # noqa: F811
    model = make("llama", 0)
    step, tokens = make_step(model), ids(model, 9)
    every = step.dense(tokens, 20, 9)
    for wanted in (1, 2, 5):
        assert torch.equal(step.dense(tokens, 20, wanted), every[-wanted:])
    assert step.dense(tokens, 20, 0).shape == (0, 500)


@pytest.mark.parametrize("count", [1, 2, 17, 40, 70])
@widest
def test_a_prompt_through_the_engine_is_single_dense_steps(make_step, count):  # noqa: F811
    model = make("llama", 0, torch.bfloat16)
    calibration, prompt = made("llama", torch.bfloat16)[1], ids(model, count)
    expected = one_by_one(model, make_step(model), prompt, 0)
    engine = Engine(model, calibration, context=LENGTH, make_step=CpuStep)
    engine.by_steps = LENGTH
    logits = engine.step.dense(prompt, 0) if count <= 16 else prefill_by_steps(engine.step, prompt)[None]
    assert torch.equal(logits[0], expected[0][-1])
    engine.forget()
    (token,) = engine.stream(Request(prompt, Sampling(0.0), 0.5, 1))
    assert token.id == int(expected[0][-1].argmax())
    for mine, theirs in zip((*engine.cache.k, *engine.cache.v), expected[1:], strict=True):
        assert torch.equal(mine[:, :, :count], theirs[:, :, :count])


@pytest.mark.parametrize(
    "tokens, position, at", [([7, 500], 5, 6), ([7, 8, 9], LENGTH - 2, LENGTH), ([-1], 0, 0), ([7], -1, -1)]
)
@widest
def test_outside_vocabulary_or_cache_is_refused(make_step, tokens, position, at):  # noqa: F811
    model = make("llama", 0)
    with pytest.raises(ValueError, match=rf"token {tokens[-1]} at position {at} is outside"):
        make_step(model).dense(tokens, position)
