"""What kernels/csrc/stages_draw.cuh computes, in plain NumPy and fp64."""

import numpy as np

from teal_fast.engine.sampling import Sampling

WORD, LONG = 2**32, 2**64


def mixed(h: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer, of uint64 that hold 32 bits."""
    h = (h ^ h >> 16) * 0x85EBCA6B % WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 % WORD
    return h ^ h >> 16


def split_mix(h: int) -> int:
    """SplitMix64, of 64 bits."""
    h = (h + 0x9E3779B97F4A7C15) % LONG
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % LONG
    h = (h ^ h >> 27) * 0x94D049BB133111EB % LONG
    return h ^ h >> 31


def noise(count: int, seed: int, position: int, round: int) -> np.ndarray:
    """From an exponential distribution, fp64 [count]."""
    key = split_mix(split_mix(split_mix(seed % LONG) + position) + round)
    words = mixed((mixed(np.arange(count, dtype=np.uint64) ^ np.uint64(key % WORD)) + key // WORD) % WORD)
    uniform = ((words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64)
    with np.errstate(divide="ignore"):  # one that is rounded to 1 gives inf
        return -np.log1p(-uniform)


def drawn(logits: np.ndarray, sampling: Sampling, seed: int, position: int) -> tuple[int, int]:
    """The token after `position`, from logits [vocab], and how many had to be drawn for it."""
    logits = logits.astype(np.float64)
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.lexsort((np.arange(len(logits)), -logits))  # the likeliest first, of equal ones the first
    before = np.cumsum(weights[order]) - weights[order]
    kept = np.arange(len(logits)) < (sampling.top_k or len(logits))
    if sampling.top_p is not None and sampling.top_p < 1:
        kept &= before < sampling.top_p * weights[order][kept].sum()
    left, allowed = len(order), weights >= (sampling.min_p or 0)
    for round in range(len(order)):
        among = np.zeros(len(logits), bool)
        among[order[:left]] = True
        scores = np.where(among & allowed, weights / noise(len(logits), seed, position, round), -1)
        left = order.tolist().index(token := int(scores.argmax()))
        if left == 0 or kept[left]:
            return token, round + 1
    raise AssertionError("the likeliest always stays")
