"""Intervals and tests for paired comparisons; numpy only. docs/statistics.md says how to read them.

Every comparison is paired: the same prompts or rows in both arms. Tasks are strata, so a mean over tasks is
resampled within each task. A plain bootstrap of few pairs, none of which changed, has no width at all, so
one loss and one gain that were not seen take part; `unseen_share` says what such a result can still hide,
and `verdict` does not go below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided confidence interval."""

    estimate: float
    low: float
    high: float
    samples: int
    confidence: float = 0.95

    def record(self) -> dict[str, float]:
        """As stored in result files."""
        return asdict(self)


def paired_bootstrap(
    differences: Mapping[str, ArrayLike],
    *,
    unseen: float = 100.0,
    draws: int = DRAWS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over strata of the mean paired difference within each, with a percentile interval.

    Args:
        differences: per stratum (task) the paired differences of its samples.
        unseen: size of the one loss and the one gain that are added to what is drawn from, shared between
            the strata (Bonett and Price 2012 add them to a paired table); the estimate stays as it is.
            0 is the plain bootstrap.

    Raises:
        ValueError: no stratum, or an empty one.
    """
    strata = [np.asarray(values, dtype=np.float64) for values in differences.values()]
    if not strata or any(len(values) == 0 for values in strata):
        raise ValueError("a paired bootstrap needs at least one pair in every stratum")
    random = np.random.default_rng(seed)
    means = np.zeros(draws)
    for values in strata:
        means += _resampled_means(values, draws, random, unseen, 1 / len(strata))
    low, high = _percentiles(means / len(strata), confidence)
    estimate = float(np.mean([values.mean() for values in strata]))
    return Interval(estimate, low, high, sum(map(len, strata)), confidence)


def paired_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    draws: int = DRAWS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """sum(numerators) / sum(denominators) over rows, rows resampled together.

    For perplexity: numerators = difference of the rows' summed losses, denominators = their tokens.
    """
    top, bottom = (np.asarray(values, dtype=np.float64) for values in (numerators, denominators))
    if len(top) == 0 or len(top) != len(bottom):
        raise ValueError("a paired ratio needs as many numerators as denominators, at least one")
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(top), size=(draws, len(top)))
    low, high = _percentiles(top[picks].sum(1) / bottom[picks].sum(1), confidence)
    return Interval(float(top.sum() / bottom.sum()), low, high, len(top), confidence)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that `first` and `second` succeed equally often on the same samples."""
    if len(first) != len(second):
        raise ValueError(
            f"McNemar's test needs pairs: {len(first)} and {len(second)} outcomes given"
        )
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    won = sum(b and not a for a, b in zip(first, second, strict=True))
    changed = lost + won
    if changed == 0:
        return 1.0
    tail = sum(math.comb(changed, count) for count in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**changed)


def changed_p(differences: Sequence[float]) -> float:
    """Exact two-sided sign test that a change is as often a loss as a gain.

    For scores that are all right or all wrong this is McNemar's exact test; it also serves scores in
    between (a share of references, F1), of which only the direction counts.
    """
    return mcnemar([one > 0 for one in differences if one], [one < 0 for one in differences if one])


def verdict(lost: Interval, margin: float, *, pairs: int) -> str:
    """What an interval of the points lost says about a margin.

    `non-inferior`: less than the margin is lost at the interval's confidence. `inferior`: more than the
    margin is lost. `undecided`: neither is shown.

    A bootstrap of few losses ends too low, and of none at zero. So no interval is taken to end below the
    exact one of as many whole losses as make up the estimate, with no gain among them
    (`unseen_share`): of all changes of right and wrong answers with that sum it varies least.

    Args:
        lost: points lost, 0 to 100.
        margin: points that may be lost, above 0.
        pairs: number of pairs behind the interval.

    Raises:
        ValueError: a margin that is not a number above 0.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"margin={margin}: use points above 0, for example 1")
    if lost.low > margin:
        return "inferior"
    whole = math.ceil(max(0.0, lost.estimate) / 100 * pairs - 1e-9)
    floor = 100 * unseen_share(pairs, whole, confidence=(1 + lost.confidence) / 2)
    return "non-inferior" if max(lost.high, floor) < margin else "undecided"


def wilson(successes: int, samples: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share; ValueError unless 0 <= successes <= samples and samples > 0."""
    if samples <= 0 or not 0 <= successes <= samples:
        raise ValueError(f"{successes} successes in {samples} samples is no share")
    z = _normal_quantile(0.5 + confidence / 2)
    share = successes / samples
    scale = 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == samples else middle + half
    return Interval(share, low, high, samples, confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for step, place in enumerate(order):
        running = max(running, (len(p_values) - step) * p_values[place])
        adjusted[place] = min(1.0, running)
    return adjusted


def unseen_share(samples: int, changed: int = 0, *, confidence: float = 0.95) -> float:
    """Largest share of changed samples that `changed` ones in `samples` pairs leave possible.

    One-sided, exact (Clopper and Pearson 1934). With none changed: 1 - (1 - confidence) ** (1 / samples).
    """
    if changed >= samples:
        return 1.0
    counts = np.arange(1, changed + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((samples - counts + 1) / counts))])
    counts = np.arange(changed + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        chance = ways + counts * math.log(share) + (samples - counts) * math.log1p(-share)
        if np.exp(chance).sum() > 1 - confidence:
            low = share
        else:
            high = share
    return (low + high) / 2


def _resampled_means(
    values: NDArray[np.float64],
    draws: int,
    random: np.random.Generator,
    unseen: float,
    weight: float,
) -> NDArray[np.float64]:
    """(draws,) means of bootstrap samples; a distinct-value count makes it quick for 0/1 scores.

    `weight` of a sample is given to each of +unseen and -unseen.
    """
    kinds, counts = np.unique(values, return_counts=True)
    if unseen:
        kinds = np.concatenate([kinds, [unseen, -unseen]])
        counts = np.concatenate([counts, [weight, weight]])
    picked = random.multinomial(len(values), counts / counts.sum(), size=draws)
    return picked @ kinds / len(values)


def _percentiles(means: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    edge = 50 * (1 - confidence)
    low, high = np.percentile(means, [edge, 100 - edge])
    return float(low), float(high)


def _normal_quantile(probability: float) -> float:
    """Inverse of the standard normal distribution function, by bisection of erf."""
    low, high = -10.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2
