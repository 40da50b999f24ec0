"""Drawn tokens that were drafted are distributed as dense ones: chi-square, with filters of draft and target apart."""

import pytest
import torch
from torch import Tensor

from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation.accept import accept
from teal_fast.engine.speculation.drafters import Draft

VOCAB = 12
DRAWS = 20_000  # of each case; 100,000, a minute a case, pass as well
TARGET = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 1.5
GUESS = TARGET + torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
FILTERS = {
    "temperature": (Sampling(0.8), Sampling(0.8)),
    "top_k": (Sampling(1.0, top_k=5), Sampling(1.0, top_k=5)),
    "top_p": (Sampling(1.0, top_p=0.8), Sampling(1.0, top_p=0.8)),
    "min_p": (Sampling(1.2, min_p=0.1), Sampling(1.2, min_p=0.1)),
    "all": (Sampling(0.7, 8, 0.9, 0.05), Sampling(0.7, 8, 0.9, 0.05)),
    "other_filters": (Sampling(1.0, top_k=4), Sampling(0.5, top_p=0.7)),
    "target_wider": (Sampling(1.5), Sampling(0.0)),  # a draft that was not drawn
}


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Normal deviates by which counts [n] are off probabilities [n] (Wilson and Hilferty); inf where none may be."""
    if counts[expected == 0].sum():
        return float("inf")
    counts, expected = counts[expected > 0], expected[expected > 0] * counts.sum()
    free = max(1, len(counts) - 1)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / (2 / (9 * free)) ** 0.5


def drawn(target: Sampling, guess: Sampling, generator: torch.Generator, take=accept) -> tuple[Tensor, float]:
    """How often each token came out, and the share of drafts that stood."""
    counts, stood = torch.zeros(VOCAB), 0
    for _ in range(DRAWS):
        if guess.greedy:
            draft = Draft(int(guess.draw(GUESS, generator)[0]))
        else:
            token, chances = guess.draw_known(GUESS, generator)
            draft = Draft(int(token), chances)
        token = int(take(target, TARGET, draft, generator)[0])
        counts[token] += 1
        stood += token == draft.id
    return counts, stood / DRAWS


@pytest.mark.parametrize("case", FILTERS)
def test_tokens_are_distributed_as_the_target_has_them(case):
    target, guess = FILTERS[case]
    expected = target.probabilities(TARGET)
    counts, stood = drawn(target, guess, torch.Generator().manual_seed(5))
    assert chi_square(counts, expected) < 4
    if not guess.greedy:  # as many stand as two distributions have in common
        common = torch.minimum(expected, guess.probabilities(GUESS)).sum().item()
        assert common < 0.99 and stood > common - 0.02
        assert chi_square(counts, guess.probabilities(GUESS)) > 20  # the test would notice


def test_the_test_notices_a_residual_that_is_left_out():
    def careless(sampling: Sampling, logits: Tensor, draft: Draft, generator: torch.Generator):
        p = sampling.probabilities(logits)
        if torch.rand((), generator=generator) * draft.chances[draft.id] < p[draft.id]:
            return torch.tensor([draft.id]), None
        return sampling.draw(logits, generator)

    counts, _ = drawn(*FILTERS["top_k"], torch.Generator().manual_seed(5), take=careless)
    assert chi_square(counts, FILTERS["top_k"][0].probabilities(TARGET)) > 6


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.0, top_k=3), Sampling(0.6, 5, 0.9, 0.1)])
def test_probabilities_are_what_draw_draws_from(sampling):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(VOCAB)
    for _ in range(5000):
        counts[sampling.draw(TARGET, generator)[0]] += 1
    probabilities = sampling.probabilities(TARGET)
    assert chi_square(counts, probabilities) < 4 and probabilities.sum().item() == pytest.approx(1)
    same, chances = sampling.draw_known(TARGET, torch.Generator().manual_seed(7))
    assert same == sampling.draw(TARGET, torch.Generator().manual_seed(7))[0] and torch.equal(chances, probabilities)


def test_equal_distributions_always_stand():
    generator, sampling = torch.Generator().manual_seed(0), Sampling(1.0)
    for _ in range(200):
        token, chances = sampling.draw_known(TARGET, generator)
        assert accept(sampling, TARGET, Draft(int(token), chances), generator)[0] == token


def test_nan_is_seen_by_the_largest_logit():
    logits = TARGET.clone()
    logits[3] = torch.nan
    draft = Draft(2, torch.full((VOCAB,), 1 / VOCAB))
    assert not accept(Sampling(1.0), logits, draft, torch.Generator())[1].isfinite()
