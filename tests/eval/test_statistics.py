"""Intervals and tests against known values and against simulation.

`python tests/eval/test_statistics.py` prints the coverage table of docs/statistics.md.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from dense2sparse.eval.statistics import (
    Interval,
    changed_p,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_ratio,
    unseen_share,
    verdict,
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
    interval = paired_bootstrap({"small": [10.0], "large": [0.0] * 99}, unseen=0)
    assert interval.estimate == 5.0
    assert (interval.low, interval.high) == (5.0, 5.0)
    assert paired_bootstrap({"small": [10.0], "large": [0.0] * 99}).estimate == 5.0


def test_bootstrap_repeats_itself():
    values = {"a": np.arange(10.0), "b": np.arange(5.0)}
    assert paired_bootstrap(values) == paired_bootstrap(values)


def simulated(
    random: np.random.Generator, lost: float, *, tasks: int, samples: int, mended: float = 0.02
) -> dict[str, np.ndarray]:
    """Paired differences (points) of two arms whose means differ by `lost` points in expectation.

    Training or selection breaks some right answers and mends a share `mended` of all, as where the first
    arm is right in 90 % and 20 % of its errors are mended; 0 makes losses only.
    """
    broken = mended + lost / 100
    draws = random.random((tasks, samples))
    gaps = np.where(draws < broken, 100.0, np.where(draws < broken + mended, -100.0, 0.0))
    return {str(task): row for task, row in enumerate(gaps)}


def misses(
    lost: float,
    *,
    tasks: int,
    samples: int,
    repeats: int,
    seed: int = 7,
    unseen: float = 100.0,
    mended: float = 0.02,
) -> tuple[float, float, float]:
    """Shares of repeats whose interval lies below the truth, above it; and that are called non-inferior
    at a margin of exactly the truth. `unseen=0` is the plain bootstrap, `mended=0` makes losses only."""
    random = np.random.default_rng(seed)
    below = above = passed = 0
    for _ in range(repeats):
        gaps = simulated(random, lost, tasks=tasks, samples=samples, mended=mended)
        drawn = int(random.integers(1 << 30))
        interval = paired_bootstrap(gaps, draws=1000, seed=drawn, unseen=unseen)
        below += interval.high < lost
        above += interval.low > lost
        if lost:
            passed += verdict(interval, lost, pairs=tasks * samples) == "non-inferior"
    return below / repeats, above / repeats, passed / repeats


@pytest.mark.parametrize("lost", [0.0, 1.0, 5.0])
def test_interval_covers_a_known_loss_at_its_nominal_rate(lost: float):
    """13 tasks of 50 prompts. With 1,000 repeats a rate of 2.5 % has a standard error of 0.5 %, one of
    95 % of 0.7 %; four of them are allowed."""
    below, above, passed = misses(lost, tasks=13, samples=50, repeats=1000)
    assert below + above == pytest.approx(0.05, abs=0.028)
    assert max(below, above) <= 0.025 + 0.02
    assert passed <= 0.025 + 0.02, "a loss of the whole margin was called non-inferior too often"


@pytest.mark.parametrize("pairs", [368, 650, 1300])
def test_a_loss_of_the_margin_without_gains_is_called_non_inferior_in_at_most_one_of_40(pairs):
    """Exact: the binomial probability of all counts of losses that are called non-inferior at 1 point.
    The bootstrap alone takes in one count more of 650 and 1,300, which makes 4 %."""
    said = 0.0
    for count in range(12):
        gaps = np.zeros(pairs)
        gaps[:count] = 100.0
        if verdict(paired_bootstrap({"a": gaps}), 1.0, pairs=pairs) == "non-inferior":
            said += math.comb(pairs, count) * 0.01**count * 0.99 ** (pairs - count)
    assert 0 < said <= 0.025


@pytest.mark.parametrize(("tasks", "samples"), [(1, 20), (3, 8), (13, 5)])
@pytest.mark.parametrize("lost", [0.0, 1.0, 5.0])
def test_interval_of_few_prompts_is_rather_too_wide_than_too_narrow(lost, tasks, samples):
    """500 repeats: four standard errors of 95 % are 3.9 %. The plain bootstrap covers 1 point in 46 % to
    81 % of such cases."""
    below, above, _ = misses(lost, tasks=tasks, samples=samples, repeats=500)
    assert below + above <= 0.05 + 0.039


def test_too_narrow_an_interval_would_be_noticed():
    """So that the test above can fail: an 80 % interval in its place."""
    random = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        gaps = simulated(random, 1.0, tasks=13, samples=50)
        interval = paired_bootstrap(gaps, draws=1000, confidence=0.8)
        covered += interval.low <= 1.0 <= interval.high
    assert abs(covered / 300 - 0.95) > 0.028


def test_few_prompts_without_a_change_show_no_non_inferiority():
    """Where nothing changed the plain bootstrap has no width; what it cannot have seen decides."""
    strata = {"a": [0.0] * 5, "b": [0.0] * 5}
    nothing = paired_bootstrap(strata, unseen=0)
    assert (nothing.low, nothing.high) == (0.0, 0.0)
    assert verdict(nothing, 1.0, pairs=10) == "undecided"
    honest = paired_bootstrap(strata)
    assert honest.estimate == 0 and honest.low < -10 and honest.high > 10
    assert verdict(nothing, 1.0, pairs=367) == "undecided"  # 1 - 0.025 ** (1/n) is 1 % at 367.04
    assert verdict(nothing, 1.0, pairs=368) == "non-inferior"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.5, 0.9, "non-inferior"),
        (-0.5, 1.0, "undecided"),
        (0.2, 3.0, "undecided"),
        (1.1, 3.0, "inferior"),
    ],
)
def test_verdict_is_about_the_interval_and_the_margin(low: float, high: float, said: str):
    interval = Interval((low + high) / 2, low, high, 10_000)
    assert verdict(interval, 1.0, pairs=10_000) == said
    with pytest.raises(ValueError, match="margin=0"):
        verdict(interval, 0, pairs=10_000)
    with pytest.raises(ValueError, match="margin=nan"):
        verdict(interval, float("nan"), pairs=10_000)


def test_sign_test_is_mcnemar_where_answers_are_right_or_wrong():
    random = np.random.default_rng(0)
    for _ in range(20):
        first, second = random.random((2, 30)) < [[0.8], [0.6]]
        gaps = 100.0 * first - 100.0 * second
        assert changed_p(list(gaps)) == pytest.approx(mcnemar(list(first), list(second)))
    assert changed_p([30.0, 70.0, 10.0, 0.0]) == pytest.approx(2 / 2**3)


def test_ratio_weighs_rows_by_their_tokens():
    interval = paired_ratio([1.0, 9.0], [10, 30])
    assert interval.estimate == 0.25
    assert interval.low == pytest.approx(0.1)
    assert interval.high == pytest.approx(0.3)


def test_unseen_share_solves_its_definition():
    share = unseen_share(20)
    assert (1 - share) ** 20 == pytest.approx(0.05)


def test_unseen_share_is_the_exact_binomial_bound():
    """Published: 95 % two-sided of 0, 2 and 10 in 20 (Clopper and Pearson) end at these shares."""
    for changed, share in ((0, 0.1684), (2, 0.3170), (10, 0.7280)):
        assert unseen_share(20, changed, confidence=0.975) == pytest.approx(share, abs=5e-5)
    assert unseen_share(20, 20) == 1.0


@pytest.mark.parametrize("strata", [{}, {"empty": []}])
def test_bootstrap_of_nothing_is_refused(strata: dict):
    with pytest.raises(ValueError, match="at least one pair"):
        paired_bootstrap(strata)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="pairs"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="as many"):
        paired_ratio([1.0], [1.0, 2.0])


_SIZES = ((1, 20), (1, 100), (3, 8), (13, 5), (13, 50), (13, 500))


def coverage_table(repeats: int = 2000) -> str:
    """Markdown: how often the interval misses a known loss and how often a loss of the whole margin is
    called non-inferior, by size of the benchmark; then how often the plain bootstrap covers a loss of 1
    point with few prompts."""
    lines = ["| tasks x prompts | loss | below | above | covered | called non-inferior |"]
    lines.append("|---|---|---|---|---|---|")
    mixed = [(*size, lost, 0.02, "") for size in _SIZES for lost in (0.0, 1.0, 5.0)]
    few = ((1, 800), (13, 50), (13, 75), (13, 100), (13, 500))
    only = [(*size, lost, 0.0, ", losses only") for size in few for lost in (1.0, 5.0)]
    for tasks, samples, lost, mended, words in [*mixed, *only]:
        below, above, passed = misses(
            lost, tasks=tasks, samples=samples, repeats=repeats, mended=mended
        )
        said = f"{passed:.1%}" if lost else ""
        lines.append(
            f"| {tasks} x {samples} | {lost:g}{words} | {below:.1%} | {above:.1%} | "
            f"{1 - below - above:.1%} | {said} |"
        )
    for tasks, samples in ((1, 20), (3, 8), (13, 5)):
        below, above, _ = misses(1.0, tasks=tasks, samples=samples, repeats=repeats, unseen=0.0)
        lines.append(f"plain, loss 1, {tasks} x {samples}: {1 - below - above:.1%} covered")
    return "\n".join(lines)


if __name__ == "__main__":
    print(coverage_table())
