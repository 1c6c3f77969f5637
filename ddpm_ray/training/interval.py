"""How far a score would move if other samples were drawn from the same model: a 95 % interval."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GROUPS = 10
T_OF_NINE = 2.2621571628  # Student's 97.5 % quantile for GROUPS - 1 degrees of freedom


def groups_of(count: int, cycle: int) -> Tensor:
    """The group 0..GROUPS-1, int64 [count], of each sample; their labels recur every `cycle`.

    Samples are dealt out label by label, so that groups are as large as each other to 1, and hold
    each label as often to 1. By index % GROUPS those of a model of 10 classes would hold a class
    each: a distance of 0.33 +- 0.05 had the interval 0 to 6.4.
    """
    index = torch.arange(count)
    label, earlier = index % cycle, index // cycle
    of_lower_labels = label * (count // cycle) + label.clamp(max=count % cycle)
    return (of_lower_labels + earlier) % GROUPS


def jackknife_interval(score: float, without: Sequence[float]) -> tuple[float, float]:
    """Low and high end around `score`, from the scores `without` one of GROUPS groups each.

    The delete-a-group jackknife (Kott 2001, "The delete-a-group jackknife"): for a smooth function
    of means, as the Frechet distance is of moments, it needs no resampling and no second set. It
    covers the drawing of the samples, neither the training's seed nor that the distance of fewer
    samples is larger. A distance has no end below 0.

    Not a bootstrap: a drawing with repeats is farther from the data. For samples of N(0.2, 1.2^2)
    beside data of N(0, 1), 95 % percentiles of 100 of them held the mean distance of fresh samples
    169 and 0 times in 200 (8 features of 300 samples, 32 of 400), and this interval 187 and 195
    times; for samples of N(0, 1) percentiles 6 and 0, this interval 198 and 199 times.
    """
    mean = sum(without) / GROUPS
    variance = (GROUPS - 1) / GROUPS * sum((value - mean) ** 2 for value in without)
    half = T_OF_NINE * math.sqrt(variance)
    return max(0.0, score - half), score + half
