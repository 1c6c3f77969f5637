"""Resize recipes and the conversion to the network's range."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm_ray.data.resizing import resize
from ddpm_ray.data.transforms import to_model_range


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


def test_the_model_range_is_minus_one_to_one() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 8, 16, 2)
    x = to_model_range(images)
    assert (x.shape, x.dtype) == ((1, 2, 8, 16), torch.float32)
    assert x.is_contiguous()
    assert (x.min().item(), x.max().item()) == (-1, 1)
    back = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(back, images)


@pytest.mark.parametrize("flip", [[False, True], [True, False]])
def test_only_the_chosen_images_are_mirrored(flip: list[bool]) -> None:
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    plain, flipped = to_model_range(images), to_model_range(images, torch.tensor(flip))
    for n, mirrored in enumerate(flip):
        columns = list(range(5))[:: -1 if mirrored else 1]
        assert torch.equal(flipped[n], plain[n][..., columns])
