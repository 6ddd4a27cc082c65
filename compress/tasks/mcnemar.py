"""McNemar's exact test for paired right-or-wrong answers."""

from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Paired:
    """Two systems on the same n questions.

    Attributes:
        lost: questions that only the first answered right.
        gained: questions that only the second answered right.
        points: accuracy of the second minus that of the first, in percentage points.
        points_se: its standard error; None for fewer than two questions.
        p: two-sided, of the hypothesis that both are equally likely to be the only one that is right.
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
    """McNemar's test (Psychometrika 12, 1947) in its exact form: given the number of questions on which the two differ,
    each is equally likely to go either way, so `lost` is binomial with probability 1/2.

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
