"""How far a score would move if other samples were drawn from the same model: a 95 % interval."""

import math
from collections.abc import Sequence

GROUPS = 10  # sample i is in group i % GROUPS
T_OF_NINE = 2.2621571628  # Student's 97.5 % quantile for GROUPS - 1 degrees of freedom


def jackknife_interval(score: float, without: Sequence[float]) -> tuple[float, float]:
    """Low and high end around `score`, from the scores `without` one of GROUPS groups each.

    The delete-a-group jackknife (Kott 2001, "The delete-a-group jackknife"): for a smooth function
    of means, as the Frechet distance is of moments, it needs no resampling and no second set. It
    covers the drawing of the samples, neither the training's seed nor that the distance of fewer
    samples is larger. A distance has no end below 0.
    """
    mean = sum(without) / GROUPS
    variance = (GROUPS - 1) / GROUPS * sum((value - mean) ** 2 for value in without)
    half = T_OF_NINE * math.sqrt(variance)
    return max(0.0, score - half), score + half
