"""Precision and recall by brute force, and on sets whose overlap is known; the score's two ends."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_ray.evaluation import precision_recall as manifold
from ddpm_ray.evaluation.precision_recall import inception_score, precision_recall


def drawn(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * scale + shift


def by_brute_force(data: Tensor, samples: Tensor, k: int) -> tuple[float, float]:
    """One pair at a time, in numpy."""

    def covered(balls: Tensor, points: Tensor) -> float:
        ball, point = balls.double().numpy(), points.double().numpy()
        radii = [sorted(np.linalg.norm(ball - b, axis=1))[k] for b in ball]
        inside = [
            any(np.linalg.norm(p - b) <= r for b, r in zip(ball, radii, strict=True)) for p in point
        ]
        return float(np.mean(inside))

    return covered(data, samples), covered(samples, data)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("k", [1, 3])
def test_it_is_what_brute_force_finds(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "CHUNK", chunk)
    data, samples = drawn(40, 3, 1), drawn(25, 3, 2, 1.5, 0.5)
    assert precision_recall(data, samples, k) == by_brute_force(data, samples, k)


def test_equal_sets_cover_each_other_and_distant_ones_nothing() -> None:
    data = drawn(50, 4, 3)
    assert precision_recall(data, data.clone()) == (1, 1)
    assert precision_recall(data, data + 100) == (0, 0)


def test_samples_of_one_spot_are_precise_and_recall_little() -> None:
    precision, recall = precision_recall(drawn(300, 2, 4), drawn(300, 2, 5, 0.05))
    assert precision > 0.95
    assert recall < 0.1


def test_a_set_without_neighbours_is_refused() -> None:
    with pytest.raises(
        ValueError, match="samples has 3 vectors; a radius to neighbour number 3 needs 4"
    ):
        precision_recall(drawn(9, 2, 6), drawn(3, 2, 7))


def test_sure_and_even_classes_score_their_number_and_a_constant_1() -> None:
    sure = torch.eye(7).repeat(20, 1)
    assert inception_score(sure, splits=4) == pytest.approx((7, 0))
    assert inception_score(torch.full((60, 7), 1 / 7)) == pytest.approx((1, 0))


def test_two_kinds_of_doubt_by_hand() -> None:
    """p = (0.9, 0.1) and (0.1, 0.9) in turn: log 2 minus the entropy of 0.9, exponentiated."""
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(30, 1)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert inception_score(p, splits=5)[0] == pytest.approx(math.exp(math.log(2) - entropy))
    with pytest.raises(ValueError, match="4 images for 5 splits; draw more"):
        inception_score(p[:4], splits=5)
