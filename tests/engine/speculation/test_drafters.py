"""Drafters: what an n-gram finds, and that a model with a cache of its own follows the text."""

import pytest

from teal_fast.engine.speculation.drafters import NGram


def proposed(text: list[int], count: int = 4) -> list[int]:
    return [draft.id for draft in NGram().propose(text, count, None)]


def test_it_goes_on_as_the_text_did():
    assert proposed([1, 2, 3, 4, 5, 6, 9, 2, 3]) == [4, 5, 6, 9]
    assert proposed([1, 2, 3, 4]) == [] and proposed([3]) == [] and proposed([3, 3]) == []


def test_the_longest_match_counts_and_of_these_the_latest():
    assert proposed([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3], 1) == [7]
    assert proposed([2, 3, 7, 0, 2, 3, 8, 5, 2, 3], 1) == [8]
    assert NGram().match([1, 2, 3, 7, 0, 1, 2, 3])[0] == 3


def test_it_repeats_what_has_a_period():
    assert proposed([5, 6, 5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]


@pytest.mark.parametrize("cut", [3, 6, 8])
def test_a_text_may_grow_or_be_another_one(cut):
    text = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    grown = NGram()
    grown.match(text[:cut])
    assert grown.match(text) == NGram().match(text) == (4, 6)
    assert grown.match([9, 8, 7, 9, 8]) == (2, 2)
