import pytest
import torch
from torch import Tensor

from teal_fast.engine.sampling import Sampling

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
MANY = torch.tensor([0.04, 0.2, 0.01, 0.3, 0.06, 0.15, 0.02, 0.1, 0.05, 0.07]).log()  # the likeliest are not the first


def frequencies(sampling: Sampling, draws: int = 4000, logits: Tensor = LOGITS) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([sampling.draw(logits, generator) for _ in range(draws)])
    assert tokens.dtype == torch.int64
    return (torch.bincount(tokens, minlength=len(logits)) / draws).tolist()


def distribution(sampling: Sampling, logits: Tensor) -> list[float]:
    """The probability of every token, by the words of the fields: one filter after the other, over plain lists."""
    weights = (logits.double() / sampling.temperature).exp().tolist()
    left = sorted(range(len(weights)), key=lambda token: -weights[token])[: sampling.top_k]
    if sampling.top_p is not None:
        total, before, kept = sum(weights[token] for token in left), 0.0, []
        for token in left:
            if before < sampling.top_p or not kept:
                kept.append(token)
            before += weights[token] / total
        left = kept
    if sampling.min_p is not None:
        left = [token for token in left if weights[token] >= sampling.min_p * weights[left[0]]]
    total = sum(weights[token] for token in left)
    return [weights[token] / total if token in left else 0.0 for token in range(len(weights))]


def close(found: list[float], expected: list[float], tolerance: float = 0.03) -> bool:
    return all(abs(a - b) < tolerance and (b > 0 or a == 0) for a, b in zip(found, expected, strict=True))


def test_temperature():
    assert close(frequencies(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05])
    squared = LOGITS.exp().square()
    assert close(frequencies(Sampling(0.5)), (squared / squared.sum()).tolist())
    assert frequencies(Sampling(0.0), 10) == [1, 0, 0, 0]


def test_top_k():
    assert close(frequencies(Sampling(1.0, top_k=2)), [0.625, 0.375, 0, 0])
    assert close(frequencies(Sampling(1.0, top_k=100)), [0.5, 0.3, 0.15, 0.05])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert close(frequencies(Sampling(1.0, top_p=0.75)), [0.625, 0.375, 0, 0])
    assert close(frequencies(Sampling(1.0, top_p=0.9)), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert frequencies(Sampling(1.0, top_p=0.0), 10) == [1, 0, 0, 0]  # the likeliest always stays


def test_min_p_is_relative_to_the_likeliest():
    assert close(frequencies(Sampling(1.0, min_p=0.5)), [0.625, 0.375, 0, 0])
    assert close(frequencies(Sampling(1.0, min_p=1.0)), [1, 0, 0, 0])


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("min_p", [None, 0.25])
@pytest.mark.parametrize("top_p", [None, 0.55, 0.8])
@pytest.mark.parametrize("top_k", [None, 4, 9, 50])
def test_filters_together(temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    assert close(frequencies(sampling, 2000, MANY), distribution(sampling, MANY), 0.045)  # 4 standard deviations


def test_the_filters_of_that_test_all_matter():
    kept = [
        sum(share > 0 for share in distribution(Sampling(1.0, *filters), MANY))
        for filters in ((None, None, None), (9, None, None), (9, 0.8, None), (9, 0.8, 0.25), (4, 0.8, None))
    ]
    assert kept == [10, 9, 5, 4, 3]


def test_a_seed_repeats():
    draws = [
        [int(Sampling(1.0).draw(LOGITS, generator)) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (7, 7, 8))
    ]
    assert draws[0] == draws[1] != draws[2]
