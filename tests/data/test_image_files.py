"""Decoding of image files; each bad image raises one line with file, reason and remedy."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.packing.image_files import (
    BAD_EXIF,
    FIRST_ONLY,
    ON_WHITE,
    PROFILE,
    ROTATED,
    BadImageError,
    decode_image,
    decode_stored,
    encode_image,
    open_image,
    to_pixels,
)
from tests.limits import ENDS_S


def saved(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(
    width: int,
    height: int,
    rows: bytes,
    depth: int = 8,
    colour: int = 2,
    extra: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """Write a PNG by hand; colour type 0: grey, 2: RGB, 3: palette, 4: grey + alpha, 6: RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(rows) if rows else b""
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", data), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_file(channels: int, bits: int, **tags: int) -> bytes:
    """Write a TIFF of 2 x 2 pixels by hand, RGB or grey plus extra channels."""
    photometric = 2 if channels >= 3 else 1
    extra = channels - (3 if photometric == 2 else 1)
    data = bytes(range(2 * 2 * channels * bits // 8))
    entries: list[tuple[int, list[int]]] = [
        (256, [2]),
        (257, [2]),
        (258, [bits] * channels),
        (259, [1]),
        (262, [photometric]),
        (273, [0]),
        (277, [channels]),
        (278, [2]),
        (279, [len(data)]),
        (338, [0] * extra),
        (339, [tags.get("sample_format", 1)] * channels),
    ]
    entries = [(tag, values) for tag, values in entries if values]
    end = 8 + 2 + 12 * len(entries) + 4
    lists, directory = b"", struct.pack("<H", len(entries))
    spread = sum(2 * len(values) for _, values in entries if len(values) > 2)
    for tag, values in entries:
        if tag == 273:
            values = [end + spread]
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(values) > 2:
            directory += struct.pack("<HHII", tag, 3, len(values), end + len(lists))
            lists += packed
        else:
            directory += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + lists + data


def bomb(width: int, height: int) -> bytes:
    """Write a PNG of a few bytes whose header claims width x height pixels."""
    return png_file(width, height, b"")


FRAMES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
GOOD_PNG, GOOD_JPEG = saved(NOISE), saved(NOISE, "jpeg")
BAD = {
    "empty": (b"", r"not a readable image \(the file is empty\)"),
    "text": (b"<html>404</html>", r"not a readable image \(it is none of PNG, JPEG"),
    "noise": (bytes(range(256)) * 4, r"not a readable image \(it is none of PNG, JPEG"),
    "cut png": (GOOD_PNG[:-4000], "not a readable image"),
    "cut jpeg": (GOOD_JPEG[: len(GOOD_JPEG) // 2], "not a readable image"),
    "flipped png": (GOOD_PNG[:500] + bytes([GOOD_PNG[500] ^ 1]) + GOOD_PNG[501:], "not a readable"),
    "bomb": (bomb(8_000, 9_000), "8000 x 9000 pixels, and max_pixels is 64000000"),
    "large bomb": (bomb(12_000, 12_000), "12000 x 12000 pixels, and max_pixels is 64000000"),
    "giant bomb": (bomb(10**6, 10**6), "1000000 x 1000000 pixels, and max_pixels is"),
    "cmyk": (
        saved(Image.new("CMYK", (4, 4)), "jpeg"),
        "CMYK, whose conversion to RGB is ambiguous",
    ),
    "16 bit": (saved(Image.new("I;16", (4, 4))), "more than 8 bits per channel"),
    "16 bit colour": (png_file(1, 1, bytes(7), depth=16), "more than 8 bits per channel"),
    "16 bit alpha": (png_file(1, 1, bytes(5), 16, 4), "more than 8 bits per channel"),
    "16 bit tiff": (tiff_file(3, 16), "more than 8 bits per channel"),
    "16 bit ppm": (b"P6 1 1 65535\n" + bytes(6), "more than 8 bits per channel"),
    "16 bit plain ppm": (b"P3 1 1 1023\n1 2 3\n", "more than 8 bits per channel"),
    "near infrared": (tiff_file(4, 8), "4 channels, of which 3 would be kept"),
    "grey and more": (tiff_file(2, 8), "2 channels, of which 1 would be kept"),
    "signed": (tiff_file(1, 8, sample_format=2), "values that are not unsigned integers"),
    "lab": (saved(Image.new("LAB", (4, 4)), "tiff"), "LAB, whose conversion to RGB is ambiguous"),
    "pages": (saved(FRAMES[0], "tiff", save_all=True, append_images=FRAMES[1:]), "2 pages"),
    "palette": (
        png_file(
            1,
            1,
            bytes([0, 3]),
            colour=3,
            extra=chunk(b"PLTE", bytes(12)) + chunk(b"tRNS", b"\x80" * 300),
        ),
        r"not a readable image \(palette index out of range\)",
    ),
    "header": (saved(NOISE, "tiff")[:20], r"not a readable image \(a damaged TIFF file"),
    "float": (saved(Image.new("F", (4, 4)), "tiff"), "more than 8 bits per channel"),
    "gif": (saved(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]), "animated, with 2"),
    "webp": (saved(FRAMES[0], "webp", save_all=True, append_images=FRAMES[1:]), "animated, with 2"),
    "apng": (saved(FRAMES[0], "png", save_all=True, append_images=FRAMES[1:]), "animated, with 2"),
}


@pytest.mark.parametrize("which", BAD)
def test_a_bad_image_is_named_with_reason_and_remedy(which: str) -> None:
    file, message = BAD[which]
    with pytest.raises(BadImageError, match=f"^some/file.png: {message}.*; [a-z]+ ") as caught:
        open_image(file, "some/file.png", 0, 64_000_000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGBA", 3)])
def test_channels_follow_the_file_unless_set(mode: str, channels: int) -> None:
    file = saved(Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode))
    assert to_pixels(open_image(file, "x", 0, 100)).shape == (3, 5, channels)
    assert (to_pixels(open_image(file, "x", 3, 100)) == np.full((3, 5, 3), 255)).all()
    assert (to_pixels(open_image(file, "x", 1, 100)) == np.full((3, 5, 1), 255)).all()


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert to_pixels(open_image(saved(image), "x", 0, 100)).tolist() == [[[255] * 3, [10, 20, 30]]]


@pytest.mark.parametrize(
    "value, corners",
    # As the EXIF standard draws them: where the stored pixels 1 2 / 3 4 are to be seen.
    [
        (1, "1234"),
        (2, "2143"),
        (3, "4321"),
        (4, "3412"),
        (5, "1324"),
        (6, "3142"),
        (7, "4231"),
        (8, "2413"),
        (0, "1234"),
        (9, "1234"),
    ],
)
def test_a_cameras_orientation_is_applied(value: int, corners: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    stored = Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8))
    image, changes = decode_image(saved(stored, exif=exif), "x", 0, 10_000)
    assert to_pixels(image)[..., 0].reshape(-1).tolist() == [int(corner) for corner in corners]
    assert changes == ((ROTATED,) if value in range(2, 9) else ())


def webp_with_exif(exif: bytes) -> bytes:
    return saved(NOISE, "webp", exif=exif, lossless=True)


@pytest.mark.parametrize(
    "file",
    [
        saved(NOISE, exif=b"\x00\x08\x00\x02\x01\x12\x00\x03"),
        saved(NOISE, exif=b"garbage"),
        webp_with_exif(b"garbage"),
        png_file(
            64,
            64,
            b"".join(b"\0" + row.tobytes() for row in np.asarray(NOISE)),
            extra=chunk(b"tEXt", b"Raw profile type exif\0\nexif\n   8\nzzzzzzzz"),
        ),
        png_file(
            64,
            64,
            b"".join(b"\0" + row.tobytes() for row in np.asarray(NOISE)),
            extra=chunk(b"eXIf", b"MM\0*\0\0\0"),
        ),
        png_file(
            64,
            64,
            b"".join(b"\0" + row.tobytes() for row in np.asarray(NOISE)),
            after=chunk(b"eXIf", b"MM\0*\0\0\0"),
        ),
    ],
    ids=["no header", "garbage", "webp", "text", "short", "short after the pixels"],
)
def test_sound_pixels_with_a_damaged_exif_block_are_kept(file: bytes) -> None:
    image, changes = decode_image(file, "x", 0, 10_000)
    assert (to_pixels(image) == np.asarray(NOISE)).all()
    assert changes == (BAD_EXIF,)


def test_a_camera_jpeg_with_a_preview_is_its_first_picture() -> None:
    preview = Image.new("RGB", (8, 8), "red")
    file = saved(NOISE, "mpo", save_all=True, append_images=[preview], quality=95)
    image, changes = decode_image(file, "x", 0, 10_000)
    assert (
        to_pixels(image) == to_pixels(open_image(saved(NOISE, "jpeg", quality=95), "x", 0, 9999))
    ).all()
    assert changes == (FIRST_ONLY,)


def test_what_is_done_to_an_image_is_reported_and_only_that() -> None:
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    opaque = Image.new("RGBA", (2, 2), (0, 0, 0, 255))
    palette = opaque.convert("P")
    wide = b"\0" * 40 + "Display P3".encode("utf-16-be")
    srgb = b"\0" * 40 + "sRGB IEC61966-2.1".encode("utf-16-be")
    reported = {
        "half": decode_image(saved(half), "x", 0, 10).changes,
        "opaque": decode_image(saved(opaque), "x", 0, 10).changes,
        "palette": decode_image(saved(palette, transparency=0), "x", 0, 10).changes,
        "wide": decode_image(saved(opaque, icc_profile=wide), "x", 0, 10).changes,
        "srgb": decode_image(saved(opaque, icc_profile=srgb), "x", 0, 10).changes,
    }
    assert reported == {
        "half": (ON_WHITE,),
        "opaque": (),
        "palette": (ON_WHITE,),
        "wide": (PROFILE,),
        "srgb": (),
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"])
def test_a_cut_file_is_refused_or_loses_no_pixel(kind: str) -> None:
    whole = saved(NOISE, kind)
    expected = to_pixels(open_image(whole, "x", 3, 10_000))
    refused = 0
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        try:
            assert (to_pixels(open_image(whole[:end], "x", 3, 10_000)) == expected).all()
        except BadImageError:
            refused += 1
    assert refused >= 55


HOST = """
import io, sys, warnings
from PIL import Image
before = Image.MAX_IMAGE_PIXELS
import ddpm_ray.data.packing.image_files as ours
large = io.BytesIO()
Image.new("1", (20_000, 20_000)).save(large, "png")
warnings.simplefilter("error")
filters = list(warnings.filters)
assert ours.open_image(large.getvalue(), "x", 1, 10**9).size == (20_000, 20_000)
assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (before, filters)
try:
    Image.open(large)
except Image.DecompressionBombError:
    print("guarded")
"""


def test_the_bound_of_the_host_process_is_left_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOST], capture_output=True, text=True, timeout=ENDS_S
    )
    assert done.stdout == "guarded\n", done.stderr


def test_warnings_of_pillow_are_neither_shown_nor_raised() -> None:
    """The host's filters may turn warnings into errors; a malformed MPO index once raised one."""
    jpeg = saved(NOISE, "jpeg")
    index = b"MPF\0II*\0" + struct.pack("<IHHHII", 8, 1, 0xB001, 4, 1, 7) + bytes(4)
    segment = b"\xff\xe2" + struct.pack(">H", 2 + len(index)) + index
    with pytest.warns(UserWarning, match="malformed MPO"):
        Image.open(io.BytesIO(jpeg[:2] + segment + jpeg[2:]))
    image = open_image(jpeg[:2] + segment + jpeg[2:], "x", 0, 10_000)
    assert (to_pixels(image) == to_pixels(open_image(jpeg, "x", 0, 10_000))).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("encoding, off", [("png", 0), ("webp", 0), ("jpeg", 12)])
def test_encoded_images_come_back(encoding: str, off: int, channels: int) -> None:
    ramp = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8)[..., None] * 8
    image = np.repeat(ramp, channels, axis=-1)
    back = decode_stored(encode_image(image, encoding), encoding, ImageShape(16, 16, channels))
    assert back.shape == image.shape
    assert np.abs(back.astype(int) - image).max() <= off
