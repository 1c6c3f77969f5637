"""Bad images, made by Pillow itself: each gets one line with file, reason and remedy."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.data.image_files import BadImageError, decoded, encoded, open_image, pixels

REMEDY = "on_bad_image=skip"


def saved(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


FRAMES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
GOOD_PNG, GOOD_JPEG = saved(NOISE), saved(NOISE, "jpeg")
BAD = {
    "empty": (b"", "not a readable image"),
    "text": (b"<html>404</html>", r"not a readable image \(it is none of PNG, JPEG"),
    "noise": (bytes(range(256)) * 4, r"not a readable image \(it is none of PNG, JPEG"),
    "cut png": (GOOD_PNG[:-4000], "not a readable image"),
    "cut jpeg": (GOOD_JPEG[: len(GOOD_JPEG) // 2], "not a readable image"),
    "flipped png": (GOOD_PNG[:500] + bytes([GOOD_PNG[500] ^ 1]) + GOOD_PNG[501:], "not a readable"),
    "bomb": (bomb(8_000, 9_000), "8000 x 9000 pixels, and max_pixels is 64000000"),
    "large bomb": (bomb(12_000, 12_000), "12000 x 12000 pixels, and max_pixels is 64000000"),
    "giant bomb": (bomb(10**6, 10**6), "1000000 x 1000000 pixels, and max_pixels is"),
    "cmyk": (saved(Image.new("CMYK", (4, 4)), "jpeg"), "CMYK, which has no one way to RGB"),
    "16 bit": (saved(Image.new("I;16", (4, 4))), "more than 8 bits per channel"),
    "float": (saved(Image.new("F", (4, 4)), "tiff"), "more than 8 bits per channel"),
    "gif": (saved(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]), "animated, with 2"),
    "webp": (saved(FRAMES[0], "webp", save_all=True, append_images=FRAMES[1:]), "animated, with 2"),
    "apng": (saved(FRAMES[0], "png", save_all=True, append_images=FRAMES[1:]), "animated, with 2"),
}


@pytest.mark.parametrize("which", BAD)
def test_a_bad_image_is_named_with_reason_and_remedy(which: str) -> None:
    file, message = BAD[which]
    with pytest.raises(BadImageError, match=f"^some/file.png: {message}.*; .*{REMEDY}") as caught:
        open_image(file, "some/file.png", 0, 64_000_000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGBA", 3)])
def test_channels_follow_the_file_unless_told(mode: str, channels: int) -> None:
    file = saved(Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode))
    assert pixels(open_image(file, "x", 0, 100)).shape == (3, 5, channels)
    assert (pixels(open_image(file, "x", 3, 100)) == np.full((3, 5, 3), 255)).all()
    assert (pixels(open_image(file, "x", 1, 100)) == np.full((3, 5, 1), 255)).all()


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert pixels(open_image(saved(image), "x", 0, 100)).tolist() == [[[255] * 3, [10, 20, 30]]]


def test_a_cameras_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    file = saved(Image.new("RGB", (40, 20)), "jpeg", exif=exif)
    assert open_image(file, "x", 0, 10_000).size == (20, 40)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("encoding, off", [("png", 0), ("webp", 0), ("jpeg", 12)])
def test_encoded_images_come_back(encoding: str, off: int, channels: int) -> None:
    ramp = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8)[..., None] * 8
    image = np.repeat(ramp, channels, axis=-1)
    back = decoded(encoded(image, encoding), encoding, (16, 16, channels))
    assert back.shape == image.shape
    assert np.abs(back.astype(int) - image).max() <= off
