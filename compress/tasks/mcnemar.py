"""Tests for paired right-or-wrong answers: McNemar's exact one, and one for several answers to a
question."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, permutation_test

RESAMPLES = 9999


@dataclass(frozen=True)
class Paired:
    """Two systems on the same n questions.

    Attributes:
        n: pairs of answers.
        lost: pairs in which only the first is right.
        gained: pairs in which only the second is right.
        points: accuracy of the second minus that of the first, in percentage points.
        points_se: its standard error over questions; None for fewer than two.
        p: two-sided, of the hypothesis that both are equally likely to be the only one that is
            right.
    """

    n: int
    accuracy_first: float
    accuracy: float
    lost: int
    gained: int
    points: float
    points_se: float | None
    p: float


def compare(first: list[bool], second: list[bool]) -> Paired:
    """McNemar's test (Psychometrika 12, 1947) in its exact form: given the number of questions on
    which the two differ, each is equally likely to go either way, so `lost` is binomial with
    probability 1/2.

    The standard error is that of the mean of the n differences −1, 0, 1.

    Raises:
        ValueError: no questions, or not as many answers as questions.
    """
    n = len(first)
    if n == 0 or n != len(second):
        raise ValueError(f"{n} and {len(second)} answers are no pairs")
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    mean = (gained - lost) / n
    variance = (gained + lost - n * mean**2) / (n - 1) if n > 1 else None
    return Paired(
        n=n,
        accuracy_first=sum(first) / n,
        accuracy=sum(second) / n,
        lost=lost,
        gained=gained,
        points=100 * mean,
        points_se=None if variance is None else 100 * (max(variance, 0.0) / n) ** 0.5,
        p=float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0,
    )


def compare_draws(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> Paired:
    """As `compare`, of several drawn answers to each question.

    Answers to one question are not independent, so a question counts as the difference of its
    shares of right answers; p is of a permutation test that flips the signs of those (RESAMPLES of
    them, seeded).

    Args:
        first, second: answers of each question, as many of one as of the other.
    """
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(first, second, strict=True)]
    flat = [pair for question in pairs for pair in question]
    whole = compare([a for a, _ in flat], [b for _, b in flat])
    shares = np.array([sum(b - a for a, b in question) / len(question) for question in pairs])
    test = permutation_test(
        (shares,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=0
    )
    return Paired(
        n=whole.n,
        accuracy_first=float(np.mean([sum(a) / len(a) for a in first])),
        accuracy=float(np.mean([sum(b) / len(b) for b in second])),
        lost=whole.lost,
        gained=whole.gained,
        points=100 * float(shares.mean()),
        points_se=100 * float(shares.std(ddof=1)) / len(shares) ** 0.5 if len(shares) > 1 else None,
        p=float(test.pvalue) if len(shares) > 1 else 1.0,
    )
