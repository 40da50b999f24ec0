import torch

from sampling import Sampling

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def frequencies(sampling: Sampling, draws: int = 4000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([sampling.draw(LOGITS, generator) for _ in range(draws)])
    return (torch.bincount(tokens, minlength=4) / draws).tolist()


def close(found: list[float], expected: list[float]) -> bool:
    return all(abs(a - b) < 0.03 and (b > 0 or a == 0) for a, b in zip(found, expected, strict=True))


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


def test_a_seed_repeats():
    draws = [
        [int(Sampling(1.0).draw(LOGITS, generator)) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (7, 7, 8))
    ]
    assert draws[0] == draws[1] != draws[2]
