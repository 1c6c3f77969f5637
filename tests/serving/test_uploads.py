"""Uploads in OpenAI's convention: alpha 0 is painted, a larger canvas extends the image."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.uploads import read_canvas

MOST = 10_000


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def coloured(height: int, width: int, alpha: int = 255) -> np.ndarray:
    rng = np.random.default_rng(height * 100 + width)
    pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 3] = alpha
    return pixels


def test_an_opaque_image_is_a_canvas_without_a_mark() -> None:
    pixels = coloured(5, 7)[..., :3]
    canvas = read_canvas(png(pixels), None, 3, MOST)
    assert np.array_equal(canvas.pixels, pixels)
    assert canvas.known is None
    assert read_canvas(png(pixels), None, 1, MOST).pixels.shape == (5, 7, 1)


@pytest.mark.parametrize("own", [True, False])
def test_alpha_0_is_painted_and_the_rest_is_known(own: bool) -> None:
    """Of the image itself or of the mask; a pixel of alpha 1 is kept, as in OpenAI's API."""
    marked = coloured(6, 4)
    marked[1:3, 2:, 3] = 0
    marked[5, 0, 3] = 1
    image = png(marked) if own else png(coloured(6, 4))
    known = read_canvas(image, None if own else png(marked), 3, MOST).known
    assert known is not None
    wanted = np.ones((6, 4), bool)
    wanted[1:3, 2:] = False
    assert np.array_equal(known, wanted)


def test_the_mask_is_taken_before_the_alpha_of_the_image() -> None:
    image, mask = coloured(4, 4), coloured(4, 4)
    image[0, 0, 3] = mask[3, 3, 3] = 0
    known = read_canvas(png(image), png(mask), 3, MOST).known
    assert known is not None
    assert known.sum() == 15
    assert not known[3, 3]


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    more=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    marked=st.booleans(),
)
def test_a_larger_canvas_has_the_image_in_its_middle(
    height: int, width: int, more: tuple[int, int], marked: bool
) -> None:
    image = coloured(height, width)
    if marked:
        image[0, 0, 3] = 0
    size = height + more[0], width + more[1]
    canvas = read_canvas(png(image), None, 3, MOST, size)
    assert canvas.pixels.shape == (*size, 3)
    inside = np.zeros(size, bool)
    top, left = more[0] // 2, more[1] // 2
    inside[top : top + height, left : left + width] = image[..., 3] > 0
    if not any(more) and not marked:
        assert canvas.known is None
    else:
        assert canvas.known is not None
        assert np.array_equal(canvas.known, inside)
    opaque = image[..., 3] > 0
    middle = canvas.pixels[top : top + height, left : left + width]
    assert np.array_equal(middle[opaque], image[..., :3][opaque])


@pytest.mark.parametrize(
    "image, mask, size, param, says",
    [
        (b"no image", None, None, "image", "image: not a readable image"),
        (png(coloured(3, 3))[:60], None, None, "image", "image: not a readable image"),
        (png(coloured(200, 200)), None, None, "image", "40000|40,000|pixels"),
        (png(coloured(3, 4)), png(coloured(4, 3, 0)), None, "mask", "mask is 3 x 4 .*image 4 x 3"),
        (png(coloured(3, 4)), png(coloured(3, 4)), None, "mask", "mask has no transparent pixel"),
        (png(coloured(3, 4)), png(coloured(3, 4)[..., :3]), None, "mask", "no transparent pixel"),
        (png(coloured(3, 4)), b"\x89PNG", None, "mask", "mask: not a readable image"),
        (png(coloured(3, 4)), None, (101, 100), "size", "size is 100x101; .* at most 10000 pixels"),
        (png(coloured(3, 4)), None, (2, 9), "size", r"size is 9x2, and image 4 x 3 \(width x hei"),
    ],
)
def test_what_cannot_be_edited_names_its_field(
    image: bytes, mask: bytes | None, size: tuple[int, int] | None, param: str, says: str
) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        read_canvas(image, mask, 3, MOST, size)
    error = refused.value.body()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert "\n" not in error["message"]
