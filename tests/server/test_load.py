"""A small load on the real server with a tiny model; what clients.py can see is tested on made outcomes."""

import pytest

from teal_fast.tests.server.clients import Load, Outcome, is_own, mixed_up
from teal_fast.tests.server.load import try_server

EXPECTED = [" 1003, 1004", " 1040, 1041", " 1077, 1078"]


def answered(*texts: str) -> list[Outcome]:
    return [Outcome("answered", text, f"id-{number}") for number, text in enumerate(texts)]


@pytest.mark.parametrize("exactly", [True, False])
def test_streams_that_are_mixed_up_are_seen(exactly):
    assert mixed_up(answered(*EXPECTED), EXPECTED, exactly) == []
    swapped = mixed_up(answered(EXPECTED[1], EXPECTED[0], EXPECTED[2]), EXPECTED, exactly)
    assert len(swapped) == 2 and "client 0 got ' 1040, 1041'" in swapped[0]
    assert len(mixed_up([Outcome("left", " 104", "a")], EXPECTED, exactly)) == 1


def test_a_token_of_another_stream_is_seen_where_answers_are_compared_exactly():
    assert len(mixed_up(answered(" 1003, 1041"), EXPECTED, exactly=True)) == 1


def test_two_answers_with_one_id_are_seen():
    outcomes = answered(*EXPECTED)
    outcomes[2].id = "id-0"
    assert mixed_up(outcomes, EXPECTED, exactly=True) == ["2 answers have the id id-0"]


def test_an_answer_belongs_to_whom_it_goes_along_with_the_farthest():
    texts = (" 1003, 9", " 1041", " 1077, 1078, 1", " 10", "")
    assert [[is_own(text, client, EXPECTED) for client in range(3)] for text in texts] == [
        [True, False, False], [False, True, False], [False, False, True], [True] * 3, [True] * 3
    ]  # fmt: skip


def test_who_stays_is_answered_and_the_server_is_as_before(calibrated):
    load = Load(calibrated, clients=20, requests=60, new_tokens=12, timeout=60)
    found, wrong = try_server(load, "--max_queue", "8")
    assert not wrong, found
    assert found["default_queue"]["stayed"]["refused"] > 0
