"""Decode untrusted image files to uint8 pixels; errors name the file, the problem and a remedy.

Images that would silently lose pixel values are refused: CMYK, more than 8 bits, more channels than
RGB and alpha, several frames or pages. Changes made to an image after decoding (`CHANGES`) are
returned with it, so that the packing report can count them. All formats but those of FORMATS are
refused, whatever the suffix says: Pillow reads 40 more, one of which runs another program. Images
of more bytes or pixels than allowed are refused by their header, before anything is decoded.

Pillow's module settings belong to the host process: its limit on pixels is neither used nor
changed here, and its warnings are suppressed.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import (  # each registers its format in Image.OPEN
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    WebPImagePlugin,
)

from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.redaction import sanitize

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # all others are refused
SUFFIXES: tuple[str, ...] = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
)
SUFFIXES += (".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm")
GREY_MODES = ("1", "L", "LA", "La")
COLOUR_MODES = ("RGB", "RGBA", "RGBa", "P", "PA", "YCbCr")
Plugin = Callable[[io.BytesIO], ImageFile.ImageFile]
STORED: dict[str, Plugin] = {  # the plugin that reads the files of `encode_image`
    "png": PngImagePlugin.PngImageFile,
    "jpeg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
ORIENTATION = 0x0112  # EXIF and TIFF tag
SAMPLES_PER_PIXEL, SAMPLE_FORMAT = 277, 339
TRANSPOSES = {  # by the value of the orientation tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ON_WHITE = "transparent pixels composited on white"
ROTATED = "rotated or mirrored by the orientation tag"
BAD_EXIF = "EXIF block unreadable and ignored, so not rotated"
FIRST_ONLY = "first picture of the JPEG used; its preview, depth or gain map ignored"
PROFILE = "colour profile other than sRGB not applied"
CHANGES = (ON_WHITE, ROTATED, BAD_EXIF, FIRST_ONLY, PROFILE)

_warnings_lock = threading.Lock()  # catch_warnings changes a list shared by the whole process


class BadImageError(RuntimeError):
    """An image that cannot be packed unchanged; args are (file, problem, remedy)."""

    def __str__(self) -> str:
        file, problem, remedy = self.args
        return sanitize(f"{file}: {problem}; {remedy}")


class DecodedImage(NamedTuple):
    """An image of mode L or RGB, and the changes made to it after decoding."""

    image: Image.Image
    changes: tuple[str, ...]  # of CHANGES


def is_image(name: str) -> bool:
    """Return whether the file's suffix is that of an image."""
    return name.lower().endswith(SUFFIXES)


def open_image(file: bytes, name: str, channels: int, max_pixels: int) -> Image.Image:
    """Return the image of `decode_image` without the list of changes."""
    return decode_image(file, name, channels, max_pixels).image


def decode_image(file: bytes, name: str, channels: int, max_pixels: int) -> DecodedImage:
    """Decode a file to an image of mode L or RGB; `channels` is 1, 3 or 0: those of the file.

    Transparent pixels are composited on white, and the orientation tag is applied. Raises
    BadImageError.
    """
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _identified(file)
            _refuse_unfit(image, name, max_pixels)
            image.load()
            return _upright_and_opaque(image, channels)
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        text = " ".join(str(error).split()) or type(error).__name__
        problem = f"not a readable image ({text})"
        raise BadImageError(name, problem, "repair it or delete it") from error


def from_pixels(image: npt.NDArray[np.uint8], channels: int) -> Image.Image:
    """Convert uint8 [H, W, 1 or 3] to an image of mode L or RGB; `channels` as in open_image."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return picture.convert({0: picture.mode, 1: "L", 3: "RGB"}[channels])


def to_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Convert an image of mode L or RGB to uint8 [H, W, C]."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def encode_image(image: npt.NDArray[np.uint8], encoding: str) -> bytes:
    """Encode uint8 [H, W, C] as PNG, JPEG (quality 95, 4:4:4) or lossless WebP."""
    file = io.BytesIO()
    picture = from_pixels(image, 0)
    # Each format ignores the options of the others.
    picture.save(file, encoding, quality=95, subsampling=0, lossless=True)
    return file.getvalue()


def decode_stored(
    file: object, encoding: str, image_shape: ImageShape, key: str = ""
) -> npt.NDArray[np.uint8]:
    """Decode a file of `encode_image` to uint8 [H, W, C] of the given shape.

    A file of another format or size raises BadImageError before anything is decoded.
    """
    height, width, channels = image_shape
    remedy = "pack the data set again"
    try:
        stream = io.BytesIO(file)  # type: ignore[arg-type]  # any buffer
        with STORED[encoding](stream) as image:
            if image.size != (width, height):
                problem = f"{image.width} x {image.height} pixels, but the manifest says"
                raise BadImageError(key, f"{problem} {width} x {height}", remedy)
            return to_pixels(image.convert("L" if channels == 1 else "RGB"))
    except BadImageError:
        raise
    except Exception as error:  # as above
        text = " ".join(str(error).split())
        raise BadImageError(key, f"not a readable {encoding} image ({text})", remedy) from error


def _identified(file: bytes, formats: Sequence[str] = FORMATS) -> ImageFile.ImageFile:
    """Open the file with the first format that accepts its header; raises SyntaxError if none does.

    Unlike Image.open it does not use Pillow's limit on pixels, a setting of the whole process.
    """
    if not file:
        raise SyntaxError("the file is empty")
    problem = f"it is none of {', '.join(formats)}"
    for name in formats:
        open_file, accepts = Image.OPEN[name]
        if accepts is not None and accepts(file[:16]) is not True:
            continue
        try:
            return open_file(io.BytesIO(file), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            problem = f"a damaged {name} file: {error}"
    raise SyntaxError(problem)


def _refuse_unfit(image: ImageFile.ImageFile, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        problem = f"{image.width} x {image.height} pixels, and max_pixels is {max_pixels}"
        remedy = "make it smaller, or raise max_pixels if you trust it"
        raise BadImageError(name, problem, remedy)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO is a JPEG with further pictures appended
        remedy = "save the frame you want as a separate image"
        what = f"{frames} pages" if image.format == "TIFF" else f"animated, with {frames} frames"
        raise BadImageError(name, what, remedy)
    if image.mode in ("CMYK", "LAB", "HSV"):
        remedy = "convert it to RGB with its colour profile"
        raise BadImageError(name, f"{image.mode}, whose conversion to RGB is ambiguous", remedy)
    remedy = "convert it to 8 bits grey or RGB"
    if image.mode not in GREY_MODES + COLOUR_MODES or _has_16_bits(image):
        raise BadImageError(name, f"more than 8 bits per channel (mode {image.mode})", remedy)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        stored, kept = image.tag_v2.get(SAMPLES_PER_PIXEL, 1), len(image.getbands())
        if stored > kept:
            raise BadImageError(name, f"{stored} channels, of which {kept} would be kept", remedy)
        if {2, 3} & set(image.tag_v2.get(SAMPLE_FORMAT, (1,))):
            raise BadImageError(name, "values that are not unsigned integers", remedy)


def _has_16_bits(image: ImageFile.ImageFile) -> bool:
    """Return whether Pillow would truncate 16 bits to 8, which the mode of an image hides."""
    arguments = image.tile[0].args if image.tile else ""
    first, *rest = arguments if isinstance(arguments, list | tuple) else (arguments,)
    largest_value = rest[0] if image.format == "PPM" and rest else 255
    return ";16" in str(first) or largest_value > 255


def _upright_and_opaque(image: ImageFile.ImageFile, channels: int) -> DecodedImage:
    changes = [FIRST_ONLY] if image.format == "MPO" else []
    profile = image.info.get("icc_profile") or b""
    if profile and not any(name in profile for name in (b"sRGB", "sRGB".encode("utf-16-be"))):
        changes.append(PROFILE)
    grey = channels == 1 or (channels == 0 and image.mode in GREY_MODES)
    upright: Image.Image = image
    try:
        turn = TRANSPOSES.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - the pixels are intact; EXIF parsers raise anything
        turn = None
        changes.append(BAD_EXIF)
    if turn is not None:
        upright = image.transpose(turn)
        changes.append(ROTATED)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        upright = upright.convert("RGBA")
        if upright.getchannel("A").getextrema() != (255, 255):
            changes.append(ON_WHITE)
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    return DecodedImage(upright.convert("L" if grey else "RGB"), tuple(changes))
