"""The nearest vectors by scipy's tree, and by place where they are as near."""

import pytest
import torch
from scipy.spatial import cKDTree

from ddpm_ray.evaluation import nearest_neighbours
from ddpm_ray.evaluation.nearest_neighbours import first_by, nearest_squares


@pytest.mark.parametrize("block", [1, 40, 1 << 23])
@pytest.mark.parametrize("k", [1, 6, 90])
def test_they_are_what_a_tree_finds(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of one vector, of some, of all; of 60 vectors no more than 60 are near."""
    monkeypatch.setattr(nearest_neighbours, "_BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(9, 4, generator=generator)
    others = torch.randn(60, 4, generator=generator)
    distance, place = cKDTree(others.double()).query(
        vectors.double(), k=list(range(1, 1 + min(k, 60)))
    )
    squares, places = nearest_squares(vectors, others, k)
    torch.testing.assert_close(squares.sqrt(), torch.from_numpy(distance))
    assert (places.numpy() == place).all()


def test_pixels_have_exact_distances_and_equal_ones_the_order_of_their_places() -> None:
    """Two images of 2^16 pixels that differ in one of them, by one; copies of both."""
    image = torch.randint(0, 255, (1, 1 << 16), generator=torch.Generator().manual_seed(4)).byte()
    other = image.clone()
    other[0, 77] += 1
    squares, places = nearest_squares(image, torch.cat([other, image, other, image]), 4)
    assert squares.tolist() == [[0, 0, 1, 1]]
    assert places.tolist() == [[1, 3, 0, 2]]


def test_the_first_by_distance_then_by_place() -> None:
    squares = torch.tensor([[2.0, 1, 1, 0, torch.inf]])
    places = torch.tensor([[0, 8, 5, 9, -1]])
    assert places.gather(1, first_by(squares, places, 4)).tolist() == [[9, 5, 8, 0]]


def test_of_equals_the_first_are_taken() -> None:
    """Sixty copies of one vector among others: the first four of them, in their order."""
    vector = torch.randn(1, 6, generator=torch.Generator().manual_seed(8))
    others = torch.cat([vector + 9, vector.expand(60, -1), vector - 9])
    squares, places = nearest_squares(vector, others, 4)
    assert places.tolist() == [[1, 2, 3, 4]]
    assert not squares.any()
