import pytest
import torch
from torch import Tensor

from teal_fast.engine.sampling import Sampling

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
MANY = torch.tensor([0.04, 0.2, 0.01, 0.3, 0.06, 0.15, 0.02, 0.1, 0.05, 0.07]).log()  # the likeliest are not the first


def frequencies(sampling: Sampling, draws: int = 4000, logits: Tensor = LOGITS) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([sampling.draw(logits, generator)[0] for _ in range(draws)])
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
        [int(Sampling(1.0).draw(LOGITS, generator)[0]) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (7, 7, 8))
    ]
    assert draws[0] == draws[1] != draws[2]


def drawn(sampling: Sampling, logits: Tensor) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [int(sampling.draw(logits, generator)[0]) for _ in range(50)]


@pytest.mark.parametrize("off", [{"top_k": 0}, {"top_p": 1}, {"top_p": 1.0}, {"min_p": 0}, {"min_p": 0.0}], ids=str)
@pytest.mark.parametrize("others", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05}], ids=str)
def test_values_that_switch_a_filter_off(off, others):
    """Shares of 50,000 sorted tokens add up to 1 in fp32 long before the last one: top_p 1 must not cut there."""
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    name = next(iter(off))
    assert drawn(Sampling(1.0, **others | off), logits) == drawn(Sampling(1.0, **others | {name: None}), logits)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-45, 1.1e-38, 1.2e-38, 1e-30, 1e-10])
@pytest.mark.parametrize("filters", [(), (50,), (50, 0.9), (0, 1, 0.5)], ids=str)
def test_the_smallest_temperatures_are_greedy(temperature, filters):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(2)) * 30
    assert set(drawn(Sampling(temperature, *filters), logits)) == {int(logits.argmax())}


def test_a_huge_temperature_draws_evenly():
    assert close(frequencies(Sampling(1e300)), [0.25] * 4)


def test_logits_may_forbid_tokens():
    forbidden = torch.tensor([-torch.inf, 1.0, -torch.inf, 1.0])
    for filters in ((), (3,), (3, 0.99), (None, 0.99, 0.1)):
        assert close(frequencies(Sampling(0.7, *filters), 1000, forbidden), [0, 0.5, 0, 0.5], 0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "sampling", [Sampling(0), Sampling(1.0), Sampling(0.8, 5), Sampling(0.8, 5, 0.9, 0.1)], ids=str
)
def test_unsound_logits_show_in_the_largest(sampling, bad, dtype):
    """NaN and inf anywhere, or nothing but -inf; the token is an id all the same, since a GPU decodes on."""
    logits = torch.zeros(20, dtype=dtype)
    logits[[7] if bad > 0 or bad != bad else slice(None)] = bad
    token, largest = sampling.draw(logits, torch.Generator())
    assert not largest.isfinite() and 0 <= token < 20
    assert sampling.draw(torch.zeros(20, dtype=dtype), torch.Generator())[1] == 0


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"top_k": -1}, "top_k -1: expected a whole number of at least 0"),
        ({"top_k": 2.5}, r"top_k 2\.5: expected a whole number"),
        ({"top_p": 1.01}, r"top_p 1\.01: expected a number from 0 to 1 \(1 or None: off\)"),
        ({"min_p": float("nan")}, r"min_p nan: expected a number from 0 to 1 \(0 or None: off\)"),
        ({"temperature": -0.1}, "temperature -0.1: expected a number of at least 0"),
    ],
)
def test_what_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**fields)
