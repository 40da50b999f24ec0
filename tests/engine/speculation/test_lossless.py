"""Lossless answers: the dense model's greedy text whoever drafts, what is left in the cache, limits, and refusals."""

import functools

import pytest
import torch

from teal_fast.benchmarks.shapes import calibrate_on_random_tokens, random_model
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.engine import Engine
from teal_fast.engine.prefixes import PrefixStore
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation import lossless
from teal_fast.engine.speculation.drafters import DraftModel
from teal_fast.engine.steps import PlainStep, fast_step
from teal_fast.files.calibration import Calibration
from teal_fast.kernels.native import library
from teal_fast.model import Transformer
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.models import TINY

pytestmark = [
    pytest.mark.skipif(library() is None, reason="needs the C++ step"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's; CUDA's is in test_verify_step.py"),
]
PROMPT = list(range(5, 40))
LENGTH = 160
SMALL = TINY | {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 1, "max_position_embeddings": 90}
LAYOUTS = {"llama": TINY, "window": TINY | {"model_type": "mistral", "sliding_window": 20}}
DRAFTS = {
    "auto": {},
    "ngram": {"draft": "ngram", "draft_tokens": 5},
    "self": {"draft": "self", "draft_sparsity": 0.3, "draft_tokens": 3},
    "copy": {"draft": "copy", "draft_sparsity": 0.0, "draft_tokens": 4},
    "sparse_copy": {"draft": "copy", "draft_sparsity": 0.2, "draft_tokens": 15},
    "other": {"draft": "other", "draft_tokens": 2},
}


def near(model: Transformer, config: dict, dtype: torch.dtype, noise: float) -> Transformer:
    """A copy of a random model whose weights are a little off, as rounding leaves them."""
    copy = random_model(config, "cpu", dtype, std=0.1)
    generator = torch.Generator().manual_seed(0)
    for layer in sparse_layers(copy).values():
        for weight in layer.weight.parameters():
            weight.data *= 1 + noise * torch.randn(weight.shape, generator=generator)
    return copy


@functools.cache
def models(layout: str, dtype: torch.dtype) -> tuple[Transformer, Calibration, tuple[DraftModel, ...]]:
    """A random model and what may draft for it. Shared by tests, which change nothing."""
    config = LAYOUTS[layout]
    model = random_model(config, "cpu", dtype, std=0.1)
    calibration = calibrate_on_random_tokens(model, tokens=256)
    copy = DraftModel("copy", near(model, config, dtype, 0.1), calibration, shared=True)
    other = DraftModel("other", random_model(SMALL, "cpu", torch.float32, std=0.1), None, shared=False)
    return model, calibration, (copy, other)


def engine_over(layout: str = "llama", dtype: torch.dtype = torch.bfloat16, make_step=fast_step, **more) -> Engine:
    model, calibration, drafts = models(layout, dtype)
    return Engine(model, calibration, context=LENGTH, make_step=make_step, drafts=drafts, **more)


def ask(prompt=PROMPT, new_tokens=60, sampling=Sampling(0.0), **more) -> Request:  # noqa: B008  frozen
    return Request(prompt, sampling, 0.0, new_tokens, **{"stop": (), "seed": 3} | more)


def answer(engine: Engine, **more) -> list[int]:
    return [token.id for token in engine.stream(ask(**more))]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_text_keys_and_values_are_the_dense_ones(layout, draft):
    engine = engine_over(layout)
    expected = answer(engine, new_tokens=100)
    caches = [*engine.cache.k, *engine.cache.v]
    dense = [tensor.clone() for tensor in caches]
    engine.forget()
    for tensor in caches:
        tensor.fill_(torch.nan)
    found = list(engine.stream(ask(new_tokens=100, lossless=True, **DRAFTS[draft])))
    assert [token.id for token in found] == expected and {token.sparsity for token in found} == {0.0}
    held = len(engine.held.ids)
    assert held == len(PROMPT) + 99 and engine.held.dense == held
    assert all(torch.equal(a[:, :, :held], b[:, :, :held]) for a, b in zip(caches, dense, strict=True))
    done = engine.lossless.statistics
    assert done.tokens == 99
    if draft in ("self", "copy", "sparse_copy"):  # the others know next to nothing of a random model
        assert done.cycles < 99 and 0 < sum(done.accepted.values()) < sum(done.proposed.values())
    assert done.proposed or draft in ("auto", "ngram")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_greedy_text_in_other_types(dtype):
    engine = engine_over(dtype=dtype)
    assert answer(engine, lossless=True, **DRAFTS["self"]) == answer(engine)
    assert engine.lossless.statistics.accepted


def test_a_stop_token_in_an_accepted_run_is_the_last_and_what_follows_is_forgotten():
    engine = engine_over()
    expected = answer(engine)
    like = DRAFTS["copy"] | {"draft": "copy", "lossless": True}
    at = next(i for i in range(20, 60) if expected[i] not in expected[:i])
    found = list(engine.stream(ask(**like | {"stop": {expected[at]}})))
    assert [token.id for token in found] == expected[: at + 1] and found[-1].finish_reason == "stop"
    assert engine.held.ids == PROMPT + expected[:at]
    again = PROMPT + expected[:at] + [7, 8, 9]  # its keys and values come from the cache but for the last ones
    reused = answer(engine, prompt=again, new_tokens=20)
    assert engine.reused == len(PROMPT) + at
    assert reused == answer(engine, prompt=again, new_tokens=20, lossless=True, **DRAFTS["self"])


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 7])
def test_no_more_tokens_than_asked_for(new_tokens):
    engine = engine_over()
    found = list(engine.stream(ask(new_tokens=new_tokens, lossless=True, **DRAFTS["sparse_copy"])))
    assert [token.id for token in found] == answer(engine, new_tokens=new_tokens)
    assert [token.finish_reason for token in found] == [None] * (new_tokens - 1) + ["length"]


@pytest.mark.parametrize("draft", ["self", "sparse_copy", "ngram", "other"])
def test_it_fills_the_context_to_its_end(draft):
    engine = engine_over()
    found = answer(engine, new_tokens=None, lossless=True, **DRAFTS[draft])
    assert len(found) == LENGTH - len(PROMPT) and found == answer(engine, new_tokens=None)


def test_a_closed_stream_leaves_only_what_is_certain():
    engine = engine_over()
    expected = answer(engine)
    stream = engine.stream(ask(lossless=True, **DRAFTS["copy"]))
    taken = [next(stream).id for _ in range(8)]
    stream.close()
    assert taken == expected[:8] and engine.held.ids == PROMPT + expected[:7]
    assert answer(engine, prompt=PROMPT + expected[:7]) == answer(engine_over(), prompt=PROMPT + expected[:7])


def test_sparse_keys_are_not_reused():
    found = []
    for more in ({}, {"lossless": True} | DRAFTS["self"]):
        engine = engine_over(prefixes=PrefixStore(10**8))
        sparse = [token.id for token in engine.stream(Request(PROMPT, Sampling(0.0), 0.6, 40, stop=()))]
        found.append(answer(engine, prompt=PROMPT + sparse, new_tokens=30, **more))
        assert engine.reused == len(PROMPT)  # the prompt's alone were made densely
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.0, repetition_penalty=1.3),
        Sampling(0.0, presence_penalty=1.0, frequency_penalty=0.05, logit_bias=((7, 9.0), (9, 8.5), (12, 9.5))),
    ],
)
@pytest.mark.parametrize("draft", ["self", "ngram", "copy"])
def test_penalties_count_the_tokens_that_stand(sampling, draft):
    engine = engine_over()
    like = {"sampling": sampling, "cache": False}  # a prompt of which the cache has a part may round otherwise
    expected = answer(engine, **like)
    assert expected != answer(engine)
    assert answer(engine, **like, lossless=True, **DRAFTS[draft]) == expected
    done = engine.lossless.statistics
    if sampling.logit_bias or draft != "ngram":  # else nothing repeats
        assert 0 < sum(done.accepted.values()) < sum(done.proposed.values())


class Thirds:
    """Ids by their remainder, in turn."""

    def __init__(self, taken=()):
        self.taken = list(taken)

    def mask(self):
        return torch.arange(TINY["vocab_size"]) % 3 == len(self.taken) % 3

    def accept(self, id: int) -> None:
        self.taken.append(id)

    def fork(self) -> "Thirds":
        return Thirds(self.taken)


@pytest.mark.parametrize("draft", ["self", "ngram", "copy"])
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, top_k=20)], ids=["greedy", "drawn"])
def test_a_constraint_hears_of_each_token_once(draft, sampling):
    begun = []

    def constraint():
        begun.append(Thirds())
        return begun[-1]

    engine = engine_over()
    like = {"sampling": sampling, "constraint": constraint, "cache": False}
    found = answer(engine, **like, lossless=True, **DRAFTS[draft])
    assert [id % 3 for id in found] == [0, 1, 2] * 20 and begun[0].taken == found
    done = engine.lossless.statistics
    assert draft == "ngram" or sum(done.accepted.values()) > 0.4 * sum(done.proposed.values())  # 0.3 unguided
    if sampling.greedy:
        assert found == answer(engine, **like)


def test_log_probabilities_are_those_of_dense_steps():
    engine = engine_over()
    like = {"top_logprobs": 3, "cache": False}
    expected = [(token.id, token.logprob, token.top) for token in engine.stream(ask(**like))]
    found = engine.stream(ask(**like, lossless=True, **DRAFTS["copy"]))
    assert [(token.id, token.logprob, token.top) for token in found] == expected


def test_nan_ends_the_answer_in_one_line():
    engine = engine_over()
    stream = engine.stream(ask(lossless=True, **DRAFTS["self"]))
    next(stream)
    weight, before = engine.model.norm.weight.data, engine.model.norm.weight[3].item()
    weight[3] = torch.nan
    try:
        with pytest.raises(ValueError, match="hold NaN or inf"):
            list(stream)
    finally:
        weight[3] = before
    assert engine.held.ids == []


def test_ties_go_to_the_lowest_id():
    logits = torch.zeros(50_000)
    logits[[40_000, 777, 12_345]] = 2.5
    token, _ = Sampling(0.0).draw(logits, torch.Generator())
    assert token == 777
    for row in logits.expand(3, -1).clone():
        assert Sampling(0.0).draw(row, torch.Generator())[0] == 777


@pytest.mark.parametrize("prompt", [PROMPT, [(977 * i) % 499 for i in range(64)]], ids=["rising", "random"])
def test_auto_loses_at_most_three_percent_where_drafts_seldom_stand(monkeypatch, prompt):
    """By a clock that only steps move on; the models that draft know next to nothing of this one."""
    model, calibration, _ = models("llama", torch.bfloat16)
    strange = DraftModel("copy", near(model, LAYOUTS["llama"], torch.bfloat16, 3.0), calibration, shared=True)
    engine = Engine(model, calibration, context=700, drafts=(strange,))
    clock, step, dense = [0.0], CpuStep.__call__, CpuStep.dense

    def drafted(self, token, position):
        clock[0] += 0.9
        return step(self, token, position)

    def verified(self, tokens, position, wanted=1):
        clock[0] += 1 + 0.2 * (len(tokens) - 1)
        return dense(self, tokens, position, wanted)

    monkeypatch.setattr(CpuStep, "__call__", drafted)
    monkeypatch.setattr(CpuStep, "dense", verified)
    monkeypatch.setattr(lossless, "mark", lambda device: clock[0])
    stream = engine.stream(ask(prompt, 512, Sampling(1.0), lossless=True))
    next(stream)
    clock[0] = 0.0
    assert len(list(stream)) == 511 and engine.lossless.statistics.proposed[0] > 5
    assert clock[0] < 1.03 * 511


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"draft": "nobody"}, "draft 'nobody' is not known here, expected auto or ngram or self or copy or other"),
        ({"draft_tokens": 0}, "draft_tokens 0: expected a whole number from 1 to 15"),
        ({"draft_tokens": 16}, "draft_tokens 16"),
        ({"draft": "ngram", "draft_sparsity": 0.5}, "ngram reads no weights"),
        ({"draft": "self", "draft_sparsity": 0.0}, "at 0 self is the dense model"),
        ({"draft": "other", "draft_sparsity": 0.5}, "a sparse draft by other needs a calibration"),
        ({"draft_sparsity": 1.5}, "draft_sparsity 1.5"),
        ({"sparse_prompt": True}, "lossless text is the dense model's"),
    ],
)
def test_what_is_refused(wrong, said):
    engine = engine_over()
    with pytest.raises(ValueError, match=said):
        engine.stream(ask(lossless=True, **wrong))


def test_lossless_beside_sparsity_is_refused():
    with pytest.raises(ValueError, match="give draft_sparsity"):
        Request(PROMPT, sparsity=0.5, lossless=True)


def test_without_calibration_the_dense_copy_and_ngrams_draft():
    engine = engine_over()
    bare = Engine(engine.model, None, context=LENGTH)
    with pytest.raises(ValueError, match="a sparse draft by self needs a calibration"):
        bare.stream(ask(lossless=True, draft="self"))
    assert answer(bare, lossless=True) == answer(engine)


def test_a_step_of_single_tokens_is_refused():
    engine = engine_over(make_step=PlainStep)
    with pytest.raises(ValueError, match="lossless verifies several tokens at once"):
        engine.stream(ask(lossless=True))
