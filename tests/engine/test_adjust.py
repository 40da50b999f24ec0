"""Penalties against transformers', biases, constraints, prompts in chunks, scores, what steps skipped."""

from math import ceil

import pytest
import torch

from teal_fast.engine.adjust import Adjustment
from teal_fast.engine.engine import Engine
from teal_fast.engine.prefill import tokens_at_once
from teal_fast.engine.prefixes import PrefixStore
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.tests.engine.random_models import DEVICE, PROMPT, make
from teal_fast.tests.models import TINY

CPU = torch.device("cpu")


def fresh(context: int) -> Engine:
    """An engine of its own over the same random model, on the GPU where there is one."""
    model, _, calibration = make(TINY, torch.float32, 0)
    return Engine(model, calibration, context=context)


def adjusted(sampling: Sampling, said: list[int], prompt=(1, 2), vocab_size: int = 50):
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
    adjust = Adjustment(sampling, prompt, vocab_size, CPU)
    for token in said:
        adjust.add(torch.tensor([token]))
    return logits, adjust(logits)


def test_nothing_to_change_changes_nothing():
    logits, found = adjusted(Sampling(0.0), [3, 4])
    assert found is logits


def test_the_repetition_penalty_is_transformers_over_prompt_and_answer():
    logits, found = adjusted(Sampling(0.0, repetition_penalty=1.3), [3, 4, 4])
    processor = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([[1, 2, 3, 4, 4]]), logits[None].clone())[0]
    assert torch.equal(found, expected) and not torch.equal(found, logits)


def test_presence_and_frequency_count_the_answer_alone():
    logits, found = adjusted(Sampling(0.0, presence_penalty=0.5, frequency_penalty=0.25), [3, 4, 4])
    expected = logits.clone()
    expected[3] -= 0.75
    expected[4] -= 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_bias_comes_before_penalties():
    logits, found = adjusted(Sampling(0.0, repetition_penalty=2.0, logit_bias=((3, 10.0), (7, -100.0))), [3])
    assert found[3] == (logits[3] + 10) / 2 and found[7] == logits[7] - 100


@pytest.mark.parametrize(
    "wrong", [{"repetition_penalty": 0}, {"repetition_penalty": float("inf")}, {"presence_penalty": float("nan")}]
)
def test_unsound_penalties_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(0.0, **wrong)


class Alternating:
    """Even and odd ids in turn."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.taken = vocab_size, []

    def mask(self):
        return torch.arange(self.vocab_size) % 2 == len(self.taken) % 2

    def accept(self, id: int) -> None:
        self.taken.append(id)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.5, top_k=40), Sampling(1.0, top_p=0.5)])
def test_an_answer_keeps_to_its_constraint(sampling):
    engine = fresh(128)
    begun = []

    def constraint():
        begun.append(Alternating(engine.model.args.vocab_size))
        return begun[-1]

    request = Request(PROMPT, sampling, 0.5, 20, stop=(), seed=1, constraint=constraint)
    for _ in range(2):
        ids = [token.id for token in engine.stream(request)]
        assert [id % 2 for id in ids] == [0, 1] * 10 and begun[-1].taken == ids
    assert len(begun) == 2


@pytest.mark.parametrize("by_steps", [False, True])
def test_a_prompt_in_chunks_gives_the_same_answer_and_an_end_is_heard_between_layers_or_steps(by_steps):
    whole, parts = (fresh(256) for _ in range(2))
    parts.chunk = 30
    if by_steps and not parts.by_steps:
        pytest.skip("this device's step takes one token at a time")
    parts.by_steps = 30 if by_steps else 0
    layers = len(parts.model.layers)
    heard = ceil(25 / tokens_at_once()) if by_steps else layers  # for 25 tokens
    prompt, seen = [(7 * i) % 199 + 3 for i in range(100)], []
    request = Request(prompt, Sampling(0.0), 0.5, 12, stop=(), top_logprobs=3)
    expected = list(whole.stream(request))
    found = list(parts.stream(request, lambda: seen.append(len(parts.held.ids))))
    assert [token.id for token in found] == [token.id for token in expected]
    assert seen == [held for held in (0, 25, 50, 75) for _ in range(heard)]  # and none while it decodes

    def gone() -> None:
        calls.append(1)
        if len(calls) == ends:  # in the middle of the third chunk
            raise KeyboardInterrupt

    other, calls, ends = [9, *prompt], [], 2 * heard + min(heard, 2)
    with pytest.raises(KeyboardInterrupt):
        list(parts.stream(Request(other, Sampling(0.0), 0.5, 12, stop=()), gone))
    assert parts.held.ids == other[:50]  # the chunks before stay
    calls, ends = [], 2 * layers + 2  # scores are PyTorch's
    with pytest.raises(KeyboardInterrupt):
        parts.score(other, 0.5, len(other), between=gone)
    assert parts.held.ids == other[:50]
    assert [token.id for token in parts.stream(request, lambda: None)] == [token.id for token in expected]
    assert len(calls) == ends  # nobody is asked any more once a pass has ended


def test_likeliest_tokens_are_the_models_own():
    engine = fresh(128)
    sampling = Sampling(1.0, top_k=2, logit_bias=((5, 3.0),))
    for token in engine.stream(Request(PROMPT, sampling, 0.5, 6, stop=(), seed=2, top_logprobs=4)):
        logprobs = [value for _, value in token.top]
        assert len(token.top) == 4 and logprobs == sorted(logprobs, reverse=True)
        assert dict(token.top).get(token.id, token.logprob) == token.logprob


@pytest.mark.parametrize("sparse", [False, True])
def test_scores_are_those_of_one_pass(sparse):
    engine = fresh(256)
    text, dense = [(11 * i) % 199 + 3 for i in range(90)], 1 if sparse else 90
    whole = engine.score(text, 0.5, dense, 2)
    engine.chunk = 16
    found = engine.score(text, 0.5, dense, 2)
    assert [scored.id for scored in found] == text[1:]
    assert [scored.logprob for scored in found] == pytest.approx([scored.logprob for scored in whole], abs=1e-3)
    assert engine.held.ids == text and engine.held.dense == dense
    request = Request(text, Sampling(0.0), 0.5, 4, stop=(), sparse_prompt=sparse)
    answer = [token.id for token in engine.stream(request)]
    assert engine.reused == (0 if sparse else len(text) - 1)
    assert answer == [token.id for token in fresh(256).stream(request)]


def test_what_a_private_request_leaves_is_not_used():
    engine: Engine = fresh(128)
    request = Request(PROMPT, Sampling(0.0), 0.5, 6, stop=(), cache=False)
    first = [token.id for token in engine.stream(request)]
    assert engine.held.known([*PROMPT, 1], 0.5) == 0
    list(engine.stream(request))
    assert engine.reused == 0
    open_request = Request(PROMPT, Sampling(0.0), 0.5, 6, stop=())
    assert [token.id for token in engine.stream(open_request)] == first and engine.reused == 0
    list(engine.stream(open_request))
    assert engine.reused == len(PROMPT) - 1


def test_what_a_private_score_leaves_is_not_used():
    engine = fresh(128)
    engine.held.store = PrefixStore(10**7)
    engine.score(PROMPT, 0.0, len(PROMPT), cache=False)
    engine.held.keep()
    assert engine.held.known([*PROMPT, 1], 0.0) == engine.held.store.known([*PROMPT, 1], 0.0) == 0
    engine.score(PROMPT, 0.0, len(PROMPT))
    engine.held.keep()
    assert engine.held.known([*PROMPT, 1], 0.0) == engine.held.store.known([*PROMPT, 1], 0.0) == len(PROMPT)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's step does not count")
def test_each_token_says_what_its_step_skipped():
    engine = fresh(128)
    tokens = list(engine.stream(Request(PROMPT, Sampling(0.0), 0.5, 12, stop=())))
    assert tokens[0].achieved is None
    counted = sum(token.achieved for token in tokens[1:]) / 11
    assert counted == pytest.approx(engine.achieved_sparsity()["all"], abs=2e-3) and counted > 0.2
    dense = list(engine.stream(Request(PROMPT, Sampling(0.0), 0.0, 4, stop=())))
    assert [token.achieved for token in dense[1:]] == [0.0] * 3


def test_a_change_within_an_answer_is_counted_as_it_was():
    engine = fresh(128)
    stream = engine.stream(Request(PROMPT, Sampling(0.0), 0.0, 21, stop=()))
    tokens = [next(stream) for _ in range(11)]
    engine.set_sparsity(0.9)
    tokens += list(stream)
    dense = 12 if DEVICE == "cuda" else 11  # a GPU has one step more on its way by then
    assert [token.sparsity for token in tokens] == [0.0] * dense + [0.9] * (21 - dense)
    found = engine.achieved_sparsity()["all"]
    assert 0.35 < found < 0.5 and engine.sparsity == 0.9  # half of the tokens were dense
    if DEVICE == "cpu":
        assert found == pytest.approx(sum(token.achieved for token in tokens[1:]) / 20, abs=2e-3)
