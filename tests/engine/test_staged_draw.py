"""How the step in three stages draws tokens: its reference against the filters, on Hopper and later its kernel too."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.staged_step import StagedStep
from teal_fast.tests.engine.draw_reference import drawn
from teal_fast.tests.engine.random_models import DEVICE, PROMPT, make
from teal_fast.tests.engine.test_staged_step import EVEN, hopper, staged

WAYS = {
    "temperature": Sampling(0.7),
    "top_k": Sampling(1.0, top_k=5),
    "top_p": Sampling(1.3, top_p=0.6),
    "min_p": Sampling(1.0, min_p=0.2),
    "all": Sampling(0.9, top_k=12, top_p=0.8, min_p=0.1),
    "likeliest": Sampling(2.0, top_p=0.0),
    "cold": Sampling(1e-30, top_k=3, top_p=0.9),
}


def spread(vocab: int, seed: int = 0) -> torch.Tensor:
    """Logits as models have them, some of them equal."""
    return (2 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))).mul_(8).round_().div_(8)


def surprise(tokens: list[int], chances: torch.Tensor) -> float:
    """How many standard deviations chi-squared is above what draws from these chances give; inf for impossible ones."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(chances)).double()
    expected = chances.double() * len(tokens)
    if counts[expected == 0].any():
        return float("inf")
    common = expected >= 5
    pairs = [(counts[common], expected[common]), (counts[~common].sum(0, True), expected[~common].sum(0, True))]
    terms = torch.cat([(found - wanted).square() / wanted.clamp(min=1e-9) for found, wanted in pairs if wanted.sum()])
    return ((terms.sum() - len(terms) + 1) / max(2 * (len(terms) - 1), 1) ** 0.5).item()


@pytest.mark.parametrize("way", ["top_k", "top_p", "all"])
def test_the_reference_draws_from_the_distribution_of_sampling(way):
    logits = spread(60)
    # Of equal logits PyTorch's top-k takes any, so that these differ.
    logits += torch.linspace(1e-3, 0, len(logits))
    found = [drawn(logits.numpy(), WAYS[way], 1234 + i % 7, i // 7) for i in range(1000)]
    assert surprise([token for token, _ in found], WAYS[way].probabilities(logits)) < 5
    assert max(rounds for _, rounds in found) > 1


def on_gpu(step: StagedStep, logits: torch.Tensor, sampling: Sampling, seed: int, positions: range) -> list[int]:
    step.logits.copy_(logits)
    step.largest.copy_(logits.max())
    step.draw(sampling, seed)
    found = []
    for position in positions:
        step.input_pos.fill_(position + 1)  # as the launch before leaves it
        step.stages.draw(step.step)
        found.append(step.token.flatten().clone())
    return torch.cat(found).tolist()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("vocab", [512, 50257, 262144])
def test_draws_as_the_reference_does(vocab):
    _, _, step = staged(EVEN | {"vocab_size": vocab, "num_hidden_layers": 1})
    logits = spread(vocab, 1)
    logits[7] = -torch.inf
    ways = [*WAYS.values(), Sampling(0.8, top_k=200), Sampling(1.0, top_k=300, top_p=0.95), Sampling(0.6, top_p=0.9)]
    for sampling in ways:
        for seed in (0, -1, 2**63 + 5):
            expected = [drawn(logits.numpy(), sampling, seed, position)[0] for position in range(12)]
            found = on_gpu(step, logits, sampling, seed, range(12))
            # Rounding may exchange two tokens that are as good as equally likely to be drawn.
            assert np.mean(np.array(found) != expected) <= 1 / 12, (sampling, seed, found, expected)
    logits.fill_(0.25)  # equal ones go by their numbers
    assert max(on_gpu(step, logits, Sampling(1.0, top_k=9, top_p=0.99), 0, range(50))) == 8
    assert set(on_gpu(step, logits, Sampling(1.0, top_p=2.5 / vocab), 0, range(50))) == {0, 1, 2}


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("way", WAYS)
def test_draws_from_the_distribution_of_sampling(way):
    _, _, step = staged(EVEN | {"num_hidden_layers": 1})
    logits = spread(step.logits.numel()) + torch.linspace(1e-3, 0, step.logits.numel())
    found = on_gpu(step, logits, WAYS[way], 1234, range(10000))
    assert surprise(found, WAYS[way].probabilities(logits)) < 5


@pytest.mark.gpu
@hopper
@torch.no_grad()
def test_the_engine_draws_in_the_step():
    model, cache, calibration = make(EVEN, torch.bfloat16, 0.5, length=1024)
    engine = Engine(model, calibration, context=cache.length)
    request = Request(PROMPT, Sampling(1.5, top_k=50, top_p=0.9), 0.5, 600, (), seed=5)  # short and long contexts

    def answer(request: Request) -> list[int]:
        return [token.id for token in engine.stream(request)]

    first = answer(request)
    assert engine.step.drawn and answer(request) == first != answer(replace(request, seed=6))
    # Each token is what the reference draws from its logits; the first is drawn from the prompt's.
    ids, wrong = [*PROMPT, *first], 0
    for position in range(len(PROMPT), len(PROMPT) + 40):
        logits = engine.step(torch.tensor([[ids[position]]], device=DEVICE), torch.tensor([position])).cpu()
        wrong += drawn(logits.numpy(), request.sampling, 6, position)[0] == ids[position + 1]
        assert drawn(logits.numpy(), request.sampling, 5, position)[0] == ids[position + 1]
    assert wrong < 20
    for sampling in (Sampling(0.0), replace(request.sampling, presence_penalty=0.5)):
        answer(replace(request, sampling=sampling, max_new_tokens=5))
        assert not engine.step.drawn
