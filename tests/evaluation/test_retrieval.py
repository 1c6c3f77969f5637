"""Retrieval scores of embeddings whose neighbours are known by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.evaluation.retrieval import (
    retrieval_metrics,
    retrieval_ranks,
    zero_shot_metrics,
)


def on_circle(*degrees: float) -> Tensor:
    """Unit vectors [n, 2] at these angles."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_ranks_and_recall_of_a_case_by_hand() -> None:
    """Images at 0, 10, 90 and 5 degrees; captions a at 4, b at 12, c at 60.

    Images 0 and 3 have a, which is nearest; image 1 has c, which is third; image 2 has b and c,
    which is nearest. Caption a has images 0 and 3, b has image 2, the farthest of 4, and c has
    images 1 and 2, of which 2 is nearest.
    """
    images, texts = on_circle(0, 10, 90, 5), on_circle(4, 12, 60)
    pairs = torch.tensor([[0, 0], [1, 2], [2, 1], [2, 2], [3, 0]])
    right = torch.zeros(4, 3, dtype=torch.bool)
    right[pairs[:, 0], pairs[:, 1]] = True
    assert retrieval_ranks(images, texts, right).tolist() == [1, 3, 1, 1]
    assert retrieval_ranks(texts, images, right.T).tolist() == [1, 4, 1]
    found = retrieval_metrics(images, texts, pairs)
    assert found["eval/image_to_text_r1"] == 3 / 4
    assert found["eval/text_to_image_r1"] == pytest.approx(2 / 3)
    for way in ("image_to_text", "text_to_image"):
        assert (found[f"eval/{way}_r5"], found[f"eval/{way}_r10"]) == (1, 1)
    # The deviation of 10 ones and a zero is 0.301511, Student's quantile for 10 degrees 2.228139.
    labels = torch.tensor([0] * 10 + [1])
    hits = zero_shot_metrics(on_circle(*[0.0] * 11), on_circle(0, 90), labels)
    low = 10 / 11 - 2.228139 * 0.301511 / math.sqrt(11)
    assert hits["eval/zero_shot_accuracy_low"] == pytest.approx(low)
    assert hits["eval/zero_shot_accuracy_high"] == 1


def test_equal_embeddings_score_nothing() -> None:
    """A collapsed model ranks its right candidate last."""
    same = on_circle(*[30.0] * 12)
    ranks = retrieval_ranks(same, same, torch.eye(12, dtype=torch.bool))
    assert ranks.tolist() == [12] * 12


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 99))
def test_ranks_are_those_of_a_sorted_list(queries: int, candidates: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, c = torch.randn(queries, 3, generator=draw), torch.randn(candidates, 3, generator=draw)
    right = torch.rand(queries, candidates, generator=draw) < 0.3
    right[:, 0] = True
    for row, rank in enumerate(retrieval_ranks(q, c, right).tolist()):
        wrong = 0
        for at in sorted(range(candidates), key=lambda n: -float(q[row] @ c[n])):
            if right[row, at]:
                break
            wrong += 1
        assert rank == wrong + 1


def test_zero_shot_accuracy_leaves_out_images_without_a_label() -> None:
    images, names = on_circle(0, 40, 80, 85), on_circle(0, 90)
    found = zero_shot_metrics(images, names, torch.tensor([0, 1, 1, -1]))
    assert found["eval/zero_shot_accuracy"] == pytest.approx(2 / 3)
    assert zero_shot_metrics(images, names, torch.tensor([-1, 1, -1, -1])) == {}
