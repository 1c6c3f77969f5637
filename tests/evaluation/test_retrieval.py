"""Retrieval scores of embeddings whose neighbours are known by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.evaluation import retrieval
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
    assert retrieval_ranks(images, texts, pairs).tolist() == [1, 3, 1, 1]
    assert retrieval_ranks(texts, images, pairs.flip(1)).tolist() == [1, 4, 1]
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
    own = torch.eye(12).nonzero()
    assert retrieval_ranks(same, same, own).tolist() == [12] * 12
    assert zero_shot_metrics(same, same, torch.arange(12))["eval/zero_shot_accuracy"] == 0


@pytest.mark.parametrize("spoilt", [slice(None), slice(1), slice(1, 12)], ids=str)
def test_embeddings_that_are_not_finite_score_nothing(spoilt: slice) -> None:
    """Of all images, of the first one, or of the others."""
    images, texts = on_circle(*range(0, 120, 10)), on_circle(*range(0, 120, 10))
    images[spoilt], own = math.nan, torch.eye(12).nonzero()
    assert retrieval_ranks(images, texts, own)[spoilt].tolist() == [12] * len(images[spoilt])
    found = retrieval_metrics(images, texts, own)
    assert found["eval/image_to_text_r10"] == pytest.approx(1 - len(images[spoilt]) / 12)
    scores = zero_shot_metrics(images, texts, torch.arange(12))
    assert scores["eval/zero_shot_accuracy"] == pytest.approx(1 - len(images[spoilt]) / 12)


def test_more_queries_than_are_compared_at_once_keep_their_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    q, c = torch.randn(7, 3, generator=draw), torch.randn(5, 3, generator=draw)
    pairs = torch.tensor([[n, (3 * n) % 5] for n in range(7)] + [[6, 0], [0, 2]])
    wanted = retrieval_ranks(q, c, pairs)
    monkeypatch.setattr(retrieval, "ROWS", 3)
    assert torch.equal(retrieval_ranks(q, c, pairs), wanted)


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 99))
def test_ranks_are_those_of_a_sorted_list(queries: int, candidates: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, c = torch.randn(queries, 3, generator=draw), torch.randn(candidates, 3, generator=draw)
    right = torch.rand(queries, candidates, generator=draw) < 0.3
    right[:, 0] = True
    for row, rank in enumerate(retrieval_ranks(q, c, right.nonzero()).tolist()):
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
