"""Budgets are met at one price, interpolation, and corrections of costs."""

import pytest
import torch

from teal_fast.calibration.allocation import (
    CORRECTION_EXPONENT,
    MAX_CORRECTION,
    Costs,
    Sizes,
    Spread,
    allocate,
    correct_costs,
    curves,
    interpolate,
    thresholds,
)
from teal_fast.weights.dense import DenseWeight

SIZES = Sizes.of([DenseWeight(torch.zeros(*size)) for size in ((10, 4), (30, 4), (10, 12))])  # bytes: 160, 480, 480


def spread(sparsity=0.0, scale=(1.0, 1.0, 1.0)):
    """|x| uniform from 0 to each layer's scale."""
    return Spread(sparsity, torch.linspace(0, 1, 11).double() * torch.tensor(scale).double()[:, None])


def per_layer(*values):
    return torch.tensor(values).double()


def saved(found, threshold):
    return ((found.dropped(threshold) * SIZES.weight).sum() / SIZES.weight.sum()).item()


def test_sizes():
    assert SIZES.weight.tolist() == [160, 480, 480]
    assert SIZES.row.tolist() == [16, 16, 48]


def test_dropped_and_threshold_are_inverse():
    found = spread(scale=(1.0, 2.0, 0.5))
    for share in (0.0, 0.03, 0.5, 0.77, 1.0):
        at = found.threshold(torch.full((3,), share, dtype=torch.float64))
        torch.testing.assert_close(at, torch.tensor([1.0, 2.0, 0.5]).double() * share)
        torch.testing.assert_close(found.dropped(at), torch.full((3,), share).double())
    assert found.dropped(torch.tensor([5.0, 5.0, 5.0]).double()).tolist() == [1, 1, 1]
    constant = Spread(0.0, torch.full((3, 11), 2.0).double())
    assert constant.dropped(torch.tensor([1.9, 2.0, 2.1]).double()).tolist() == [0, 1, 1]


@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.8, 0.99])
def test_the_budget_is_spent_at_one_price(target):
    found, cost = spread(scale=(9.0, 9.0, 9.0)), per_layer(1.0, 4.0, 3.0)
    at = allocate(found, SIZES, cost, target)
    assert saved(found, at) == pytest.approx(target, abs=1e-6)
    price = at**2 * cost / SIZES.row
    inside = at < 9.0
    assert price[inside].max() == pytest.approx(price[inside].min().item())


def test_costly_layers_are_dropped_less_and_wide_rows_more():
    even = allocate(spread(), SIZES, per_layer(1.0, 1.0, 1.0), 0.4)
    assert even[0] == pytest.approx(even[1].item())
    assert even[2] == pytest.approx(even[0].item() * 3**0.5)  # its rows hold three times the bytes
    dear = allocate(spread(), SIZES, per_layer(1.0, 9.0, 1.0), 0.4)
    assert dear[1] == pytest.approx(dear[0].item() / 3)


def test_all_is_dropped_at_last():
    assert saved(spread(), allocate(spread(), SIZES, per_layer(1.0, 100.0, 1e-3), 1.0)) == pytest.approx(1)


def test_interpolation_holds_the_last():
    spreads = [spread(0.0), spread(0.5, scale=(3.0, 1.0, 1.0))]
    assert interpolate(spreads, 0.25).quantiles[:, -1].tolist() == pytest.approx([2, 1, 1])
    for target in (0.5, 0.9):
        assert interpolate(spreads, target).quantiles[:, -1].tolist() == pytest.approx([3, 1, 1])
    assert interpolate(spreads[:1], 0.3).quantiles[:, -1].tolist() == [1, 1, 1]


def test_costs_lie_between_those_found():
    costs = Costs({0.3: per_layer(1.0, 1.0, 2.0), 0.5: per_layer(4.0, 1.0, 2.0), 0.9: per_layer(4.0, 9.0, 2.0)})
    for sparsity, expected in (
        (0.0, [1, 1, 2]),
        (0.3, [1, 1, 2]),
        (0.4, [2, 1, 2]),
        (0.7, [4, 3, 2]),
        (1.0, [4, 9, 2]),
    ):
        assert costs.at(sparsity).tolist() == pytest.approx(expected)
    assert Costs({0.5: per_layer(3.0)}).at(0.9).tolist() == pytest.approx([3])


COSTS = Costs({0.2: per_layer(1.0, 1.0, 1.0), 0.5: per_layer(4.0, 1.0, 1.0), 0.9: per_layer(1.0, 2.0, 1.0)})


@pytest.mark.parametrize("rule", [COSTS, torch.tensor([[0.0, 1.0]] * 3).double()])
def test_curves_ascend_and_hit_their_targets(rule):
    spreads = [spread(0.0), spread(0.5, scale=(2.0, 1.0, 0.7)), spread(0.9)]
    found = curves(spreads, SIZES, rule, 21)
    assert found.shape == (3, 21)
    assert (found.diff(dim=1) >= 0).all()
    for point in (2, 10, 13):
        target = point / 20
        at = thresholds(interpolate(spreads, target), SIZES, rule, target)
        assert saved(interpolate(spreads, target), at) == pytest.approx(target, abs=1e-6)
        assert (found[:, point] >= at - 1e-12).all()


def test_given_shares_are_taken():
    shares = torch.tensor([[0.0, 0.2, 1.0], [0.0, 0.6, 1.0], [0.0, 0.5, 1.0]]).double()
    at = thresholds(spread(), SIZES, shares, 0.25)
    assert at.tolist() == pytest.approx([0.1, 0.3, 0.25])


def test_correct_moves_costs_towards_what_was_measured():
    cost = torch.tensor([1.0, 2.0, 3.0]).double()
    torch.testing.assert_close(correct_costs(cost, 7 * cost), cost)  # a common factor changes nothing
    found = correct_costs(cost, cost * torch.tensor([1.0, 3.0, -1.0]).double()) / cost
    assert found.tolist() == pytest.approx([1, 3**CORRECTION_EXPONENT, MAX_CORRECTION**-CORRECTION_EXPONENT])
