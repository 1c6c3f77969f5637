"""Resize recipes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm_ray.config.jobs.pack import Resize
from ddpm_ray.data.resizing import resize

CROP: Resize = "centre-crop-box-bicubic"
SHORTER_SIDE: Resize = "shorter-side-box-bicubic"

sides, targets = st.integers(1, 200), st.integers(1, 32)


@given(sides, sides, targets, targets)
def test_every_image_becomes_the_crop_that_was_asked_for(w: int, h: int, ch: int, cw: int) -> None:
    image = Image.new("RGB", (w, h), (10, 200, 30))
    fitted = resize(image, CROP, ch, cw)
    assert fitted.size == (cw, ch)
    assert np.unique(np.asarray(fitted).reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]


@given(sides, sides, targets)
def test_without_a_width_the_crop_is_square(w: int, h: int, size: int) -> None:
    image = Image.radial_gradient("L").resize((w, h))
    assert resize(image, CROP, size) == resize(image, CROP, size, size)


def test_the_centre_is_kept_and_averages_are_exact() -> None:
    """64 x 32 of 4 x 4 blocks to 8 x 8: the middle 32 columns, each block its own average."""
    fitted = np.asarray(resize(blocks_of_4(), CROP, 8))
    assert np.array_equal(fitted, BLOCKS[:, 4:12] + 50)


def test_a_wide_crop_keeps_more_columns() -> None:
    fitted = np.asarray(resize(blocks_of_4(), CROP, 8, 12))
    assert np.array_equal(fitted, BLOCKS[:, 2:14] + 50)


def test_the_shorter_side_becomes_the_size_and_nothing_is_cropped() -> None:
    fitted = np.asarray(resize(blocks_of_4(), SHORTER_SIDE, 8))
    assert np.array_equal(fitted, BLOCKS + 50)


@given(sides, sides, targets)
def test_the_aspect_ratio_is_kept(w: int, h: int, size: int) -> None:
    fitted = resize(Image.new("L", (w, h), 77), SHORTER_SIDE, size)
    assert min(fitted.size) == size
    longer = size * max(w, h) / min(w, h)
    # Halving an odd side drops half a pixel: 1/2, 1/4, ... of 1 / size before each halving.
    assert max(fitted.size) == pytest.approx(longer, rel=1 / size, abs=1)
    assert np.unique(np.asarray(fitted)).tolist() == [77]


@pytest.mark.parametrize("recipe", [CROP, SHORTER_SIDE])
def test_images_of_the_wanted_size_are_unchanged(recipe: Resize) -> None:
    image = Image.radial_gradient("L").resize((12, 8))
    assert resize(image, recipe, 8, 12) == image


def test_none_leaves_the_image_alone() -> None:
    image = Image.new("L", (5, 3))
    assert resize(image, "none", 0) is image


BLOCKS = np.arange(8 * 16, dtype=np.uint8).reshape(8, 16)


def blocks_of_4() -> Image.Image:
    """BLOCKS + 50, each as 4 x 4 pixels of this average."""
    noise = np.tile(np.array([[-1, 1], [1, -1]]), (16, 32))
    return Image.fromarray((np.kron(BLOCKS, np.ones((4, 4))) + 50 + noise).astype(np.uint8))
