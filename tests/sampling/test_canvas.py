"""Unknown pixels have no effect on what an encoder sees; each takes a known pixel near it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.sampling.canvas import filled, known_cells, padded

sides, seeds = st.integers(1, 9), st.integers(0, 2**32 - 1)


@given(st.integers(1, 3), sides, sides, st.integers(1, 3), st.booleans(), seeds)
def test_an_unknown_pixel_becomes_the_nearest_known_one_of_its_row_and_column(
    count: int, height: int, width: int, channels: int, one_mask: bool, seed: int
) -> None:
    """Where these have none it becomes some known pixel; known ones stay, and nothing else acts."""
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 256, (count, height, width, channels), np.uint8)
    keep = rng.random((1 if one_mask else count, 1, height, width)) < rng.random()
    result = filled(images, keep)
    masks = np.broadcast_to(keep[:, 0], images.shape[:3])
    others = np.where(masks[..., None], images, rng.integers(0, 256, images.shape, np.uint8))
    np.testing.assert_array_equal(filled(others, keep), result)
    for image, mask, found in zip(images, masks, result, strict=True):
        known = [(int(i), int(j)) for i, j in np.argwhere(mask)]
        if not known:
            assert not found.any()
        for (i, j), pixel in ((at, found[at]) for at in np.ndindex(height, width) if known):
            near = [(abs(p - i) + abs(q - j), (p, q)) for p, q in known if p == i or q == j]
            least = min(near)[0] if near else 0
            of = [at for distance, at in near if distance == least] if near else known
            assert any((image[at] == pixel).all() for at in of)


def test_margins_are_filled_with_the_edge_and_corners_with_its_corners() -> None:
    """As numpy pads: an encoder sees no edge where the known part ends."""
    image = np.random.default_rng(0).integers(0, 256, (1, 5, 6, 3), np.uint8)
    margins = (0, 0), (2, 3), (4, 1), (0, 0)
    keep = np.pad(np.ones((1, 5, 6), bool), margins[:3])[:, None]
    canvas = np.pad(image, margins, constant_values=99)
    np.testing.assert_array_equal(filled(canvas, keep), np.pad(image, margins, mode="edge"))


@given(sides, sides, st.integers(1, 4), seeds)
def test_a_cell_is_known_where_all_its_pixels_are(
    height: int, width: int, factor: int, seed: int
) -> None:
    """Those beyond the edge repeat the last ones, as padding does."""
    rng = np.random.default_rng(seed)
    keep = rng.random((1, 1, height, width)) < 0.8
    whole = padded(keep[:, 0, :, :, None].astype(np.uint8), factor)[0, :, :, 0]
    cells = known_cells(keep, factor)[0, 0]
    assert tuple(factor * side for side in cells.shape) == whole.shape
    for i, j in np.ndindex(*cells.shape):
        part = whole[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
        assert bool(cells[i, j]) == part.all()
