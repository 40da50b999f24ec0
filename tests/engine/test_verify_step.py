"""The dense pass over a few tokens: against the plain model, its bits against themselves, and lossless text on CUDA."""

from functools import partial

import pytest
import torch

from teal_fast.benchmarks.shapes import calibrate_on_random_tokens, random_model
from teal_fast.engine.engine import Engine
from teal_fast.engine.prefill import prefill
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation.drafters import DraftModel
from teal_fast.engine.staged_step import StagedStep
from teal_fast.engine.verify_step import TOKENS, VerifyStep, check_verifiable, dense_tokens
from teal_fast.kernels.backend import triton
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.engine.random_models import DEVICE
from teal_fast.tests.engine.test_staged_step import BIASED, EVEN, INT4, INT8, MISTRAL, QWEN2, QWEN3, SMALL, WIDE, hopper
from teal_fast.weights.formats import Format
from teal_fast.weights.output import Int8Output

pytestmark = pytest.mark.skipif(triton is None, reason="no Triton here")
LENGTH = 1024


def model_of(config, dtype=torch.bfloat16, format=None, device=DEVICE):
    """A random model, perhaps quantized with its output layer."""
    model = random_model(config, device, dtype, std=config["hidden_size"] ** -0.5)
    if format is not None:
        for name, layer in sparse_layers(model).items():
            layer.weight = format.within(name).pack(layer.weight.dequantize())
        model.output = Int8Output.pack(model.output.weight)
    return model


def filled(model, length=LENGTH):
    """A cache full of random keys and values."""
    cache = model.new_cache(1, length)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()
    return cache


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def alone(step: VerifyStep, tokens: list[int], position: int) -> torch.Tensor:
    """Logits of passes over one token after another."""
    return torch.cat([step.dense([token], position + i).clone() for i, token in enumerate(tokens)])


CASES = {
    "llama": (EVEN, torch.bfloat16, None),
    "fp16": (EVEN, torch.float16, None),
    "window": (MISTRAL | {"sliding_window": 200}, torch.bfloat16, None),
    "short_window": (MISTRAL, torch.bfloat16, None),
    "qwen2": (QWEN2, torch.bfloat16, None),
    "qwen3": (QWEN3, torch.bfloat16, None),
    "biased": (BIASED, torch.bfloat16, None),
    "small": (SMALL, torch.bfloat16, None),
    "wide": (WIDE, torch.bfloat16, None),
    "int8": (EVEN, torch.bfloat16, INT8),
    "int8-window": (MISTRAL | {"sliding_window": 200}, torch.float16, INT8),
    "int4": (EVEN, torch.bfloat16, INT4),
    "int4-window": (MISTRAL, torch.bfloat16, INT4),
    "small-int4": (SMALL, torch.float16, INT4),
    "wide-int8": (WIDE, torch.bfloat16, INT8),
    "wide-int4": (WIDE, torch.bfloat16, Format("int4", 128)),
}


@torch.no_grad()
def test_equals_the_plain_model_everywhere():
    model, tokens = model_of(*CASES["short_window"]), torch.tensor([ids(138)], device=DEVICE)
    cache = model.new_cache(1, 200)
    prefill(model, cache, tokens[:, :130])
    for tensor in (*cache.k, *cache.v):
        tensor[:, :, 130:] = torch.nan
    found = dense_tokens(model, cache, tokens[0, 130:], torch.arange(130, 138, device=DEVICE))
    expected = model(tokens)[0, 130:].float()
    assert (found - expected).norm() < 0.02 * expected.norm()
    kept = model.new_cache(1, 200)
    prefill(model, kept, tokens)
    for mine, theirs in zip((*cache.k, *cache.v), (*kept.k, *kept.v), strict=True):
        mine, theirs = (tensor[:, :, 130:138].float() for tensor in (mine, theirs))
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_the_plain_model(case):
    model = model_of(*CASES[case])
    cache, text = model.new_cache(1, LENGTH), torch.tensor([ids(708)], device=DEVICE)
    step = VerifyStep(model, cache)
    prefill(model, cache, text[:, :700])
    expected = model(text)[0, 700:].float()
    found = step.dense(text[0, 700:].tolist(), 700, TOKENS)
    assert (found - expected).norm() < 0.03 * expected.norm()
    known, best = step.read()
    assert known == text[0, 700:].tolist()
    assert [int(token) for token, _ in best] == found.argmax(-1).tolist()
    assert [float(told[1]) for _, told in best] == found.amax(-1).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_several_tokens_have_the_bits_of_single_ones(case):
    model = model_of(*CASES[case])
    step = VerifyStep(model, cache := filled(model))
    tensors, tokens = (*cache.k, *cache.v), ids(20)
    for position in (0, 5, 120, 251, 700, LENGTH - 20):
        before = [tensor.clone() for tensor in tensors]
        expected = alone(step, tokens, position)
        written = [tensor.clone() for tensor in tensors]
        for count in (1, 2, 3, 4, 5, 6, 7, 8):
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
            assert torch.equal(step.dense(tokens[:count], position, count), expected[:count]), (position, count)
            end = position + count
            for tensor, old in zip(tensors, written, strict=True):
                assert torch.equal(tensor[:, :, :end], old[:, :, :end]), (position, count)
        on_device = [torch.tensor([token], device=DEVICE) for token in tokens[1:8]]
        assert torch.equal(step.dense([tokens[0], *on_device], position, 8), expected[:8])
        assert step.read()[0] == tokens[:8]
        assert torch.equal(step.dense(tokens, position, 3), expected[17:])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_row_counts_for_nothing_nor_what_others_hold(case):
    model = model_of(*CASES[case])
    cache, draw = filled(model), torch.Generator().manual_seed(0)
    graph = VerifyStep(model, cache)
    for position in (30, 600):
        place = torch.full((TOKENS,), position, device=DEVICE)
        expected = {token: graph.dense([token], position).clone()[0] for token in range(TOKENS)}
        for token in range(TOKENS):
            graph.inputs.copy_(torch.stack((torch.full_like(place, token), place)))
            graph.graph.replay()
            assert all(torch.equal(row, expected[token]) for row in graph.logits), "rows of one token differ"
        first = 100 + torch.randperm(300, generator=draw)[: TOKENS - 1]
        for row in range(TOKENS):  # the token in any row, others behind it in the text
            rows = [*first.tolist()[:row], 3, *first.tolist()[row:]]
            places = [position + 7] * TOKENS
            graph.inputs.copy_(torch.tensor([[3] * TOKENS, places]))
            graph.graph.replay()
            alone_ = graph.logits[0].clone()
            places = [position + 7 if i == row else position + 8 + i for i in range(TOKENS)]
            graph.inputs.copy_(torch.tensor([rows, places]))
            graph.graph.replay()
            assert torch.equal(graph.logits[row], alone_), (position, row)


@pytest.mark.gpu
@torch.no_grad()
def test_ties_go_to_the_lowest_id_and_nan_wins():
    model = model_of(EVEN)
    step = VerifyStep(model, filled(model))
    model.output.weight.zero_()
    step.dense([3, 4], 9, 2)
    assert [int(token) for token, _ in step.read()[1]] == [0] * TOKENS
    model.output.weight[[400, 77]] = torch.nan
    step.dense([3, 4], 9, 2)
    token, told = step.read()[1][0]
    assert int(token) == 77 and told[1].isnan().item()


def near(model, config, noise: float):
    """A random model's copy whose weights are a little off."""
    copy = random_model(config, DEVICE, torch.bfloat16, std=config["hidden_size"] ** -0.5)
    for layer in sparse_layers(copy).values():
        for weight in layer.weight.parameters():
            weight.data *= 1 + noise * torch.randn_like(weight)
    return copy


PROMPT = ids(35)
DRAFTS = {
    "self": {"draft": "self", "draft_sparsity": 0.3, "draft_tokens": 3},
    "int8": {"draft": "int8", "draft_sparsity": 0.0, "draft_tokens": 7},
    "int4": {"draft": "int4", "draft_sparsity": 0.3, "draft_tokens": 2},
    "other": {"draft": "other", "draft_tokens": 4},
    "ngram": {"draft": "ngram", "draft_tokens": 5},
    "auto": {},
}


def engine_over(config, context=160):
    model = model_of(config)
    calibration = calibrate_on_random_tokens(model, tokens=256)
    drafts = [DraftModel(name, model_of(config, format=format), calibration, True)
              for name, format in (("int8", INT8), ("int4", INT4))]  # fmt: skip
    drafts.append(DraftModel("other", near(model, config, 0.05), None, False))
    return Engine(model, calibration, context=context, drafts=drafts)


def answer(engine, sampling=Sampling(0.0), new_tokens=64, **more):  # noqa: B008  frozen
    request = Request(PROMPT, sampling, 0.0, new_tokens, stop=(), seed=3, lossless=True, **more)
    return [token.id for token in engine.stream(request)]


@torch.no_grad()
def dense(engine, new_tokens: int) -> list[int]:
    """Greedy text by passes over single tokens."""
    model, cache = engine.model, engine.model.new_cache(1, engine.context)
    step = VerifyStep(model, cache)
    found = [int(prefill(model, cache, torch.tensor([PROMPT], device=DEVICE)).argmax())]
    for position in range(len(PROMPT), len(PROMPT) + new_tokens - 1):
        found.append(int(step.dense([found[-1]], position).argmax()))
    return found


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("config", [EVEN, MISTRAL | {"sliding_window": 20}], ids=["llama", "window"])
def test_greedy_text_is_the_dense_one_whoever_drafts(config):
    engine = engine_over(config)
    assert isinstance(engine.step, StagedStep)
    expected = dense(engine, 160 - len(PROMPT))
    for name, how in DRAFTS.items():
        found = answer(engine, **how)
        assert found == expected[:64], name
        done = engine.lossless.statistics
        assert engine.held.ids == PROMPT + expected[:63]
        if name in ("self", "int8", "int4", "other"):
            assert sum(done.accepted.values()) > 5 and done.cycles < 64, (name, done)
        engine.forget()
    for name in ("int8", "ngram"):  # to the context's end, the prompt from the cache
        assert answer(engine, new_tokens=None, **DRAFTS[name]) == expected, name
    penalized = Sampling(0.0, repetition_penalty=1.3)
    texts = [answer(engine, penalized, **DRAFTS[name]) for name in ("self", "ngram")]
    assert texts[0] == texts[1] != expected[:64]


@pytest.mark.gpu
@hopper
def test_drawn_text():
    engine = engine_over(EVEN)
    for sampling in (Sampling(0.8), Sampling(1.0, top_k=20), Sampling(0.7, top_p=0.9, min_p=0.05)):
        for name in ("self", "int8", "ngram"):
            found = answer(engine, sampling, **DRAFTS[name])
            assert len(found) == 64
        assert answer(engine, Sampling(1.0, top_k=1), **DRAFTS["int8"]) == answer(engine, **DRAFTS["int8"])
    top = [token.top for token in engine.stream(
        Request(PROMPT, Sampling(0.0), 0.0, 9, (), top_logprobs=2, lossless=True, **DRAFTS["int8"])
    )]  # fmt: skip
    assert all(len(pairs) == 2 for pairs in top)


@pytest.mark.gpu
@hopper
def test_keys_of_other_dense_steps_are_not_gone_on_from():
    engine = engine_over(EVEN)
    plain = [token.id for token in engine.stream(Request(PROMPT, Sampling(0.0), 0.0, 20, ()))]
    again = Request(PROMPT + plain, Sampling(0.0), 0.0, 5, ())
    list(engine.stream(again))
    assert engine.reused == len(PROMPT) + 19
    list(engine.stream(Request(PROMPT + plain, Sampling(0.0), 0.0, 5, (), lossless=True)))
    assert engine.reused == len(PROMPT)


def test_models_that_it_does_not_serve():
    tiny = partial(random_model, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="lossless on CUDA does not serve fp32"):
        check_verifiable(random_model(EVEN, "cpu", torch.float32))
    with pytest.raises(ValueError, match="does not serve heads of 48"):
        check_verifiable(tiny(EVEN | {"head_dim": 48}))
    check_verifiable(tiny(EVEN))
