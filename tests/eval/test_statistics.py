"""Intervals and tests against known values and against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dense2sparse.eval.statistics import (
    holm,
    mcnemar,
    paired_bootstrap,
    paired_ratio,
    unseen_share,
    wilson,
)


def test_wilson_interval_equals_the_published_example():
    interval = wilson(81, 263)  # Newcombe 1998, method 3
    assert interval.estimate == pytest.approx(0.30798, abs=1e-5)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_wilson_interval_keeps_its_ends_inside_zero_and_one():
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)


def test_mcnemar_equals_the_binomial_by_hand():
    first = [True] * 9 + [False] + [True] * 5
    second = [False] * 9 + [True] + [True] * 5
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10) / 2**10)


def test_mcnemar_of_equal_outcomes_is_one():
    assert mcnemar([True, False], [True, False]) == 1.0


def test_holm_equals_the_example_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one():
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_bootstrap_is_the_mean_over_strata_not_over_samples():
    interval = paired_bootstrap({"small": [10.0], "large": [0.0] * 99})
    assert interval.estimate == 5.0
    assert (interval.low, interval.high) == (5.0, 5.0)


def test_bootstrap_repeats_itself():
    values = {"a": np.arange(10.0), "b": np.arange(5.0)}
    assert paired_bootstrap(values) == paired_bootstrap(values)


@pytest.mark.parametrize("truth", [0.0, 0.01, 0.05])
def test_bootstrap_interval_covers_a_known_loss_at_its_nominal_rate(truth: float):
    random = np.random.default_rng(7)
    repeats, covered = 200, 0
    for _ in range(repeats):
        strata = {}
        for task in range(5):
            # 10 % of the prompts change; `truth` is the mean loss.
            share_lost = 0.05 + truth / 2
            draws = random.random(100)
            strata[str(task)] = np.where(draws < share_lost, 1.0, np.where(draws < 0.1, -1.0, 0.0))
        interval = paired_bootstrap(strata, draws=1000, seed=1)
        covered += interval.low <= truth <= interval.high
    # Three standard errors of a 95 % rate in 200 repeats are 4.6 %.
    assert covered / repeats == pytest.approx(0.95, abs=0.05)


def test_ratio_weighs_rows_by_their_tokens():
    interval = paired_ratio([1.0, 9.0], [10, 30])
    assert interval.estimate == 0.25
    assert interval.low == pytest.approx(0.1)
    assert interval.high == pytest.approx(0.3)


def test_unseen_share_solves_its_definition():
    share = unseen_share(20)
    assert (1 - share) ** 20 == pytest.approx(0.05)


@pytest.mark.parametrize("strata", [{}, {"empty": []}])
def test_bootstrap_of_nothing_is_refused(strata: dict):
    with pytest.raises(ValueError, match="at least one pair"):
        paired_bootstrap(strata)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="pairs"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="as many"):
        paired_ratio([1.0], [1.0, 2.0])
