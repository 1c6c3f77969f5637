"""Time of the Frechet distance, relative to scipy.linalg.sqrtm, and the difference of the two.

    python benchmarks/frechet.py

Two Gaussians of width 2048 from 5,000 vectors each, and from 1,000 (fewer than features, by the
factors of the samples). CPU seconds of one thread, interleaved rounds, medians; about 45 s. At
1,000 vectors the difference is sqrtm's: its argument is singular.
"""

import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from ddpm_ray.evaluation.frechet import Moments, frechet_distance, frechet_distance_of_features

WIDTH = 2048
ROUNDS = 2


def by_scipy(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    root = scipy.linalg.sqrtm((cov_1 @ cov_2).numpy())
    shift = float((mean_1 - mean_2).square().sum())
    return shift + float((cov_1 + cov_2).trace()) - 2 * float(np.trace(root).real)


def features(count: int, seed: int) -> Tensor:
    """Features like Inception's: not negative, correlated, with variances over several decades."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(count, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    return (latent @ mix / math.sqrt(WIDTH) + 0.01 * seed).relu()


def gaussian(vectors: Tensor) -> tuple[Tensor, Tensor]:
    moments = Moments.zeros(WIDTH)
    moments.update(vectors)
    return moments.mean(), moments.covariance()


def timed(distance: Callable[[], float], cpu_s: list[float]) -> float:
    start = time.process_time()
    value = distance()
    cpu_s.append(time.process_time() - start)
    return value


def compare(count: int, rounds: int) -> None:
    one, other = features(count, 1), features(count, 2)
    gaussians = *gaussian(one), *gaussian(other)
    scipy_cpu_s: list[float] = []
    our_cpu_s: list[float] = []
    for _ in range(rounds):
        reference = timed(lambda: by_scipy(*gaussians), scipy_cpu_s)
        if count > WIDTH:
            found = timed(lambda: frechet_distance(*gaussians), our_cpu_s)
        else:
            found = timed(lambda: frechet_distance_of_features(one, other), our_cpu_s)
    theirs, ours = statistics.median(scipy_cpu_s), statistics.median(our_cpu_s)
    apart = abs(found - reference) / reference
    print(f"{count:7,}  {theirs:9.2f} s  {ours:7.2f} s  {theirs / ours:6.1f} x  {apart:11.1e}")


def main() -> None:
    torch.set_num_threads(1)
    print(f"vectors  {'sqrtm':>11}  {'ours':>9}  {'ratio':>8}  {'difference':>11}")
    with threadpool_limits(limits=1):
        compare(5000, ROUNDS)
        compare(1000, 1)


if __name__ == "__main__":
    main()
