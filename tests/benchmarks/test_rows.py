"""Rows, their rounds and ratios, with decodings whose rates are given."""

import itertools

import pytest

from teal_fast.benchmarks.rows import Row, first_token_ratios, measure, random_prompt, ratios


def make(
    rates: list[float],
    peer: str | None = None,
    sparsity: float = 0.0,
    prompt_tokens: int = 5,
    format: str = "bf16",
) -> Row:
    """A row that decodes at these rates, the warm-up's first."""
    about = {"peer": peer, "mode": "compiled", "sparsity": sparsity, "prompt_tokens": prompt_tokens, "format": format}
    details = dict if peer else lambda: {"bytes_per_token": 10}
    return Row(about, iter(rates).__next__, details)


def test_rows_take_turns_and_the_first_round_does_not_count():
    turns = []
    rows = [Row({}, lambda name=name: turns.append(name) or float(len(turns))) for name in "ab"]
    measure(rows, 2, lambda: 1.0)
    assert turns == list("ababab")
    assert [row.rates for row in rows] == [[3.0, 5.0], [4.0, 6.0]]


def test_prompts_are_read_after_all_have_decoded():
    turns, seconds = [], iter([9.0, 2.0, 4.0, 3.0])
    read = lambda: turns.append("read") or next(seconds)  # noqa: E731
    rows = [Row({}, lambda: turns.append("a") or 1.0), Row({}, lambda: turns.append("b") or 1.0, read=read)]
    measure(rows, 3, lambda: 1.0)
    assert turns == ["a", "b", "read"] * 4
    assert rows[1].record()["first_token_s"] == 3 and rows[1].record()["first_token_s_rounds"] == [2, 4, 3]
    assert "first_token_s" not in rows[0].record()


def test_first_tokens_are_compared_where_prompts_are_as_long():
    def record(peer: str | None, tokens: int, *seconds: float) -> dict:
        about = {"peer": peer, "mode": "compiled", "sparsity": 0, "prompt_tokens": tokens, "format": "Q4_K_M"}
        row = Row(about, float, rates=[1.0], bandwidths=[1.0], first_token_s=[*seconds])
        return row.record()

    records = [record(None, 12, 1, 2, 3), record("llama.cpp Q4_K_M", 12, 2, 2, 4), record("llama.cpp bf16", 500, 9)]
    assert first_token_ratios(records) == [
        "Q4_K_M, first token after 12: 1.00x (rounds 0.75x, best 0.50x) of llama.cpp Q4_K_M"
    ]


def test_a_record_has_the_median_the_extremes_and_the_share_of_the_bandwidth_around_each_decoding():
    row = make([1.0, 40.0, 10.0, 20.0])
    meter = iter([7e9, 100.0, 400.0, 200.0, 100.0])  # before all, then after each decoding
    measure([row], 3, meter.__next__)
    record = row.record()
    assert record["tokens_per_s"] == 20 and record["tokens_per_s_spread"] == [10, 40]
    assert row.bandwidths == [400, 400, 200]
    assert record["bandwidth_share"] == pytest.approx(1.0)  # of 40 / 400, 10 / 400 and 20 / 200, times 10 bytes
    assert "bandwidth_share" not in Row({}, float, rates=[1.0], bandwidths=[1.0]).record()


def test_ratios_compare_with_our_dense_row_with_peers_and_with_shorter_prompts():
    rows = [
        make([9, 10, 20, 30]),
        make([9, 20, 30, 40], sparsity=0.5),
        make([9, 15, 25, 35], sparsity=0.25),
        make([9, 5, 10, 20], peer="llama.cpp bf16"),
        make([9, 5, 15, 20], sparsity=0.5, prompt_tokens=100),
    ]
    measure(rows, 3, lambda: 1.0)
    assert ratios([row.record() for row in rows]) == [
        "bf16 50 % after 5: 1.50x (rounds 1.50x, best 1.33x) of bf16 0 %, "
        "3.00x (rounds 3.00x, best 2.00x) of llama.cpp bf16",
        "bf16 0 % after 5: 2.00x (rounds 2.00x, best 1.50x) of llama.cpp bf16",
        "bf16 50 % after 100: 0.50x (rounds 0.50x, best 0.50x) of after 5",
    ]
    assert ratios([rows[0].record()]) == []


def test_ratios_compare_forms_at_one_sparsity():
    rows = [
        make([9, 10, 20, 30]),
        make([9, 20, 30, 40], sparsity=0.5),
        make([9, 40, 60, 80], sparsity=0.5, format="int8"),
    ]
    measure(rows, 3, lambda: 1.0)
    assert (
        ratios([row.record() for row in rows])[1] == "int8 50 % after 5: 2.00x (rounds 2.00x, best 2.00x) of bf16 50 %"
    )


def test_a_longer_prompt_begins_with_a_shorter_one():
    prompts = [random_prompt(1000, tokens) for tokens in (5, 20, 100)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(prompts))
