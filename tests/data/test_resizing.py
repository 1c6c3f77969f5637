"""Resize recipes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm_ray.data.resizing import resize


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 32))
def test_every_shape_becomes_the_square_that_was_asked_for(w: int, h: int, size: int) -> None:
    image = Image.new("RGB", (w, h), (10, 200, 30))
    fitted = resize(image, "centre-crop-box-bicubic", size)
    assert fitted.size == (size, size)
    assert np.unique(np.asarray(fitted).reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]


def test_the_centre_is_kept_and_averages_are_exact() -> None:
    """64 x 32 of 4 x 4 blocks to 8 x 8: the middle 32 columns, each block its own average."""
    blocks = np.arange(8 * 16, dtype=np.uint8).reshape(8, 16)
    noise = np.tile(np.array([[-1, 1], [1, -1]]), (16, 32))
    pixels = (np.kron(blocks, np.ones((4, 4))) + 50 + noise).astype(np.uint8)
    fitted = np.asarray(resize(Image.fromarray(pixels), "centre-crop-box-bicubic", 8))
    assert np.array_equal(fitted, blocks[:, 4:12] + 50)


def test_none_leaves_the_image_alone() -> None:
    image = Image.new("L", (5, 3))
    assert resize(image, "none", 0) is image
