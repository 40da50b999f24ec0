"""What takes turns in a benchmark, above all its rows: configurations, ours and other programs' alike, that decode.

Each round decodes once in every row, so that what a shared machine does to one row it does to all of them. The read
bandwidth is measured between any two decodings; the greater of the rates before and after one belongs to it.
"""

import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Task:
    """What another program is to decode: greedily, `new_tokens` tokens after each of the prompts."""

    weights: Path | dict  # a GGUF file, or a config.json for random weights
    vocab_size: int
    prompts: list[list[int]]
    new_tokens: int
    device: torch.device
    format: str  # of our model


@dataclass
class Row:
    """One configuration and what it measured."""

    about: dict  # fields of its record that are known beforehand
    decode: Callable[[], float]  # decodes once; tokens a second
    details: Callable[[], dict] = dict  # further fields, known once it has decoded
    read: Callable[[], float] | None = None  # reads the prompt anew; seconds to the first token
    rates: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)  # bytes a second, one a rate

    def record(self) -> dict:
        """Its fields of a record. "bandwidth_share" is the median of the rounds' shares, each of its own bandwidth.

        A round's bandwidth is what the meter told, or what the row itself read then if that is more.
        """
        record = self.about | self.details()
        reads = [record.get("bytes_per_token", 0) * rate for rate in self.rates]
        bandwidths = list(map(max, reads, self.bandwidths))
        record |= {
            "tokens_per_s": statistics.median(self.rates),
            "tokens_per_s_spread": [min(self.rates), max(self.rates)],
            "tokens_per_s_rounds": self.rates,
            "read_gb_per_s": statistics.median(bandwidths) / 1e9,
        }
        if "bytes_per_token" in record:
            record["bandwidth_share"] = statistics.median(map(operator.truediv, reads, bandwidths))
        if self.first_token_s:
            record["first_token_s"] = statistics.median(self.first_token_s)
            record["first_token_s_rounds"] = self.first_token_s
        return record


def take_turns(
    measures: list[Callable[[], float]], rounds: int, meter: Callable[[], float], doing: str
) -> list[tuple[list[float], list[float]]]:
    """What each measure gives in each round, and the read bandwidths beside it, which `meter` tells.

    A first round that does not count warms up.
    """
    results: list[tuple[list[float], list[float]]] = [([], []) for _ in measures]
    before = meter()
    for number in tqdm(range(rounds + 1), desc=doing, unit="round"):
        for measured, (values, bandwidths) in zip(measures, results, strict=True):
            value, after = measured(), meter()
            if number:
                values.append(value)
                bandwidths.append(max(before, after))
            before = after
    return results


def measure(rows: list[Row], rounds: int, meter: Callable[[], float]) -> None:
    """Fills the rows' rates, bandwidths and, of those that read prompts, times to the first token."""
    readers = [row for row in rows if row.read]
    measures = [row.decode for row in rows] + [row.read for row in readers]
    results = take_turns(measures, rounds, meter, "decoding")
    for row, (rates, bandwidths) in zip(rows, results, strict=False):
        row.rates, row.bandwidths = rates, bandwidths
    for row, (seconds, _) in zip(readers, results[len(rows) :], strict=True):
        row.first_token_s = seconds


def random_prompt(vocab_size: int, tokens: int) -> list[int]:
    """The same for every row: speed does not depend on what the tokens say."""
    return torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()


def ratios(records: list[dict]) -> list[str]:
    """Lines that compare our rows at 0 and 50 % with the others of one model.

    Medians first; then the median of the rounds' ratios, which a machine's slow moments touch least; then best rounds.
    """
    lines = []
    ours = [r for r in records if _is_ours(r) and r["sparsity"] in (0, 0.5)]
    for mine in sorted(ours, key=lambda r: (r["prompt_tokens"], -r["sparsity"])):
        others = [r for r in records if r["prompt_tokens"] == mine["prompt_tokens"] and _is_baseline(r, mine)]
        if others:
            compared = ", ".join(f"{_ratio(mine, other)} of {_name(other)}" for other in others)
            lines.append(f"{_name(mine)} after {mine['prompt_tokens']}: {compared}")
    for name in dict.fromkeys(map(_name, ours)):
        *shorter, longest = sorted((r for r in ours if _name(r) == name), key=lambda r: r["prompt_tokens"])
        if shorter:
            compared = ", ".join(f"{_ratio(longest, other)} of after {other['prompt_tokens']}" for other in shorter)
            lines.append(f"{name} after {longest['prompt_tokens']}: {compared}")
    return lines


def first_token_ratios(records: list[dict]) -> list[str]:
    """Lines that compare how long our prompts take with other programs': median, the rounds' ratios, best."""
    timed = [record for record in records if "first_token_s" in record]
    lines = []
    for mine in filter(_is_ours, timed):
        others = [r for r in timed if not _is_ours(r) and r["prompt_tokens"] == mine["prompt_tokens"]]
        if others:
            compared = ", ".join(f"{_first_token_ratio(mine, other)} of {_name(other)}" for other in others)
            lines.append(f"{mine['format']}, first token after {mine['prompt_tokens']}: {compared}")
    return lines


def _first_token_ratio(record: dict, other: dict) -> str:
    mine, theirs = record["first_token_s_rounds"], other["first_token_s_rounds"]
    paired = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    median = record["first_token_s"] / other["first_token_s"]
    return f"{median:.2f}x (rounds {paired:.2f}x, best {min(mine) / min(theirs):.2f}x)"


def _is_ours(record: dict) -> bool:
    return not record["peer"] and not record["mode"].startswith("captured ")  # by cuBLAS, by Triton


def _name(record: dict) -> str:
    if not _is_ours(record):
        return record["peer"] or f"{record['mode']} {record['sparsity'] * 100:g} %"
    return f"{record['format']} {record['sparsity'] * 100:g} %"


def _is_baseline(record: dict, mine: dict) -> bool:
    """Other programs, other steps of ours, our own dense row, and the same sparsity in another format."""
    same = record["format"] == mine["format"], record["sparsity"] == mine["sparsity"]
    return not _is_ours(record) or (
        record is not mine and (same == (False, True) or (same[0] and not record["sparsity"]))
    )


def _ratio(record: dict, other: dict) -> str:
    median = record["tokens_per_s"] / other["tokens_per_s"]
    rounds = zip(record["tokens_per_s_rounds"], other["tokens_per_s_rounds"], strict=True)
    paired = statistics.median(mine / theirs for mine, theirs in rounds)
    best = record["tokens_per_s_spread"][1] / other["tokens_per_s_spread"][1]
    return f"{median:.2f}x (rounds {paired:.2f}x, best {best:.2f}x)"
