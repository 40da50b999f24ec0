"""The controller, on times that are made up: what it picks, what it loses where drafting never pays, retries."""

import random

import pytest

from teal_fast.engine.speculation.controller import Arm, Controller
from teal_fast.engine.speculation.statistics import Statistics, describe_drafts

DENSE_S = 0.02
COSTS = {1: 1.0, 2: 1.1, 3: 1.25, 4: 1.35, 5: 1.5, 6: 1.65, 7: 1.8, 8: 2.0}  # of verifying, in dense steps


def spike(draw: random.Random, noise: float) -> float:
    """What other work on the machine makes of a time."""
    return draw.choice((1, 1, 1 + noise))


def decode(
    stands: dict[str, float], costs: dict[str, float], tokens: int, forced: int | None = None, seed=0, noise=0.0
):
    """Tokens a dense step's time, cycles by drafter, and the controller, for drafts that stand so often.

    noise: what every third time is longer by, which is not counted.
    """
    draw, controller, cycles, clock = random.Random(seed), Controller(), {}, 0.0
    arms = [Arm(name, 0.9, 0.5) for name in stands]
    controller.begin()
    given = 0
    while given < tokens:
        arm, count = controller.choose([(arm, 7) for arm in arms], forced)
        stood = 0
        while stood < count and draw.random() < stands[arm.name]:
            stood += 1
        draft_s = count * costs[arm.name] * DENSE_S if count else 0.0
        verify_s = COSTS[count + 1] * DENSE_S
        controller.learn(arm, count, stood, draft_s * spike(draw, noise), verify_s * spike(draw, noise))
        clock, given = clock + draft_s + verify_s, given + stood + 1
        name = arm.name if arm else "none"
        cycles[name] = cycles.get(name, 0) + 1
    return given * DENSE_S / clock, cycles, controller


@pytest.mark.parametrize("noise", [0, 3])
@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_drafter_that_pays(seed, noise):
    rate, cycles, _ = decode({"good": 0.95, "bad": 0.2}, {"good": 0.4, "bad": 0.4}, 512, seed=seed, noise=noise)
    assert rate > 1.35 and cycles["good"] > 10 * cycles.get("bad", 0)


@pytest.mark.parametrize("arms", [1, 12])
@pytest.mark.parametrize("seed", range(5))
def test_where_drafting_never_pays_it_loses_at_most_three_percent(arms, seed):
    names = [str(i) for i in range(arms)]
    rate, cycles, _ = decode(dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.6), 512, seed=seed)
    assert 0.97 < rate < 1 and cycles["none"] > 480


FAILING = {  # how often drafts stand, by the controller's credit and the tokens so far
    "never": lambda credit, given: 0.0,
    "seldom": lambda credit, given: 0.3,
    "as soon as there is credit": lambda credit, given: 0.0 if credit > 4 else 0.95,
    "after a good start": lambda credit, given: 1.0 if given < 60 else 0.0,
    "in turns": lambda credit, given: 1.0 if given // 40 % 3 == 0 else 0.0,
}


@pytest.mark.parametrize("dearer", [1, 1.5])  # than is thought at first
@pytest.mark.parametrize("fails", FAILING)
def test_whatever_drafts_do_it_loses_no_more_than_its_credit(fails, dearer):
    draw, controller, clock, given, last = random.Random(0), Controller(), 0.0, 0, None
    arms = [Arm("ngram", 0.5, 0.0), *(Arm(str(i), 0.99 - 0.05 * i, 0.8 - 0.05 * i) for i in range(12))]
    takes = {arm.name: arm.cost * dearer for arm in arms}
    controller.begin()
    while given < 512:
        offers = [(arm, min(7, 511 - given)) for arm in arms if arm.name != "ngram" or draw.random() < 0.5]
        arm, count = controller.choose(offers)
        stood, stands = 0, FAILING[fails](controller.credit, given)
        while stood < count and draw.random() < stands:
            stood += 1
        draft = count * takes[arm.name] + 0.15 * (arm is not last) if count else 0.0  # other thresholds are set
        verify = 1 + (COSTS[count + 1] - 1) * dearer
        controller.learn(arm, count, stood, draft * DENSE_S, verify * DENSE_S)
        for one, _ in offers:
            if one is not arm:
                one.fade()
        clock, given, last = clock + draft + verify, given + stood + 1, arm or last
    assert clock < 1.03 * given


def test_what_failed_is_tried_again_and_found_to_pay():
    controller, arm = Controller(), Arm("one", 0.9, 0.5)
    for _ in range(3):
        controller.learn(None, 0, 0, 0.0, DENSE_S)
    while controller.choose([(arm, 7)])[1]:
        controller.learn(arm, 3, 0, 3 * 0.5 * DENSE_S, 1.35 * DENSE_S)
    waited = 0
    while not controller.choose([(arm, 7)])[1]:
        controller.learn(None, 0, 0, 0.0, DENSE_S)
        arm.fade()
        waited += 1
        assert waited < 1000
    assert waited > 50


def test_a_forced_length_is_kept_and_no_longer_than_there_is_room():
    _, cycles, controller = decode({"bad": 0.0}, {"bad": 1.0}, 50, forced=3)
    assert cycles == {"none": 3, "bad": 47}  # the first ones measure dense steps
    arm = Arm("one", 0.1, 1.0)
    assert controller.choose([(arm, 2)], 3) == (arm, 2) and controller.choose([(arm, 0)], 3) == (None, 0)


def test_statistics_count_by_position_and_merge():
    first, second = Statistics(), Statistics()
    first.add("self at 40%", 3, 1, 2.5)
    first.add("none", 0, 0, 1.0)
    second.add("self at 40%", 2, 2, 2.0)
    record = Statistics.over([first, second]).record()
    assert record["cycles"] == 3 and record["tokens_per_cycle"] == 2 and record["lengths"] == {"0": 1, "2": 1, "3": 1}
    assert record["acceptance"] == [1.0, 0.5]  # the third draft was never reached
    assert record["drafters"]["self at 40%"] == {"cycles": 2, "proposed": 5, "accepted": 3}
    assert record["speedup"] == pytest.approx(6 / 5.5)
    assert "2.00 tokens a cycle" in describe_drafts(record) and "self at 40% 2" in describe_drafts(record)
    assert Statistics.over([]) is None and describe_drafts(Statistics().record()) == "lossless: nothing to draft"
