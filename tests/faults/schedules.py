"""Kills drawn at random: at any marked point, step and worker."""

import random

from ddpm_ray.fault_injection import POINTS

OF_DENOISERS = [point for point in POINTS if point != "embeddings"]
# The main worker alone passes the others.
OF_ALL = {"batch", "gradient", "update", "reduce", "between", "snapshot"}


def kills(draw: random.Random, most: int, steps: int, workers: int) -> list[str]:
    """One to `most` of them, as DDPM_RAY_FAULTS spells them."""
    count = draw.randint(1, most)
    return [kill(draw, draw.randint(1, steps), workers) for _ in range(count)]


def kill(draw: random.Random, step: int, workers: int) -> str:
    """One at that step, or as soon after it as its point is passed."""
    point = draw.choice(sorted(OF_DENOISERS))
    rank = draw.randrange(workers) if point in OF_ALL else 0
    return f"kill@{point}:{step}/{rank}"
