"""Image files of strangers to uint8 pixels, or one line that says which file, why, and what to do.

Transparent pixels are laid on white, a camera's orientation tag is applied. What would silently
change the picture is refused: CMYK, more than 8 bits, several frames. So is, whatever the suffix
says, every format but those of FORMATS (Pillow knows 40 more, one of which runs another program),
and more bytes or pixels than allowed: looked up in the header, before anything is decoded.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ddpm_ray.telling import told

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # that are ever opened
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
GREY_MODES = ("1", "L", "LA", "La")
COLOUR_MODES = ("RGB", "RGBA", "RGBa", "P", "PA", "YCbCr")
Image.MAX_IMAGE_PIXELS = None  # `max_pixels` takes its place, with a line that says what to do


class BadImageError(RuntimeError):
    """An image that cannot be packed as it is; args are (file, problem, remedy)."""

    def __str__(self) -> str:
        file, problem, remedy = self.args
        return told(f"{file}: {problem}; {remedy}")


def is_image(name: str) -> bool:
    """True if the file's suffix says that it is an image."""
    return name.lower().endswith(SUFFIXES)


def open_image(file: bytes, name: str, channels: int, max_pixels: int) -> Image.Image:
    """A decoded image of mode L or RGB; `channels` is 1, 3 or 0: as the file has it.

    Raises BadImageError.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(file), formats=FORMATS)
        _refuse_unfit(image, name, max_pixels)
        image.load()
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        text = " ".join(str(error).split())
        text = f"it is none of {', '.join(FORMATS)}" if "cannot identify" in text else text
        raise BadImageError(
            name, f"not a readable image ({text})", "repair it, remove it or use on_bad_image=skip"
        ) from error
    grey = channels == 1 or (channels == 0 and image.mode in GREY_MODES)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if grey else "RGB")


def from_pixels(image: npt.NDArray[np.uint8], channels: int) -> Image.Image:
    """uint8 [H, W, 1 or 3] as an image of mode L or RGB; `channels` as in open_image."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return picture.convert({0: picture.mode, 1: "L", 3: "RGB"}[channels])


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, C] of an image of mode L or RGB."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def encoded(image: npt.NDArray[np.uint8], encoding: str) -> bytes:
    """A PNG, JPEG (quality 95, full colour) or lossless WebP file of uint8 [H, W, C]."""
    file = io.BytesIO()
    picture = from_pixels(image, 0)
    # Each format ignores the options of the others.
    picture.save(file, encoding, quality=95, subsampling=0, lossless=True)
    return file.getvalue()


def decoded(
    file: object, encoding: str, image_shape: tuple[int, int, int], key: str = ""
) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, C] from the bytes that `encoded` gave for an image of that shape.

    Raises BadImageError, before anything is decoded, for a file of another format or size.
    """
    height, width, channels = image_shape
    remedy = "pack the data set again"
    try:
        stream = io.BytesIO(file)  # type: ignore[arg-type]  # any buffer
        with Image.open(stream, formats=[encoding.upper()]) as image:
            if image.size != (width, height):
                problem = f"{image.width} x {image.height} pixels, and the manifest says"
                raise BadImageError(key, f"{problem} {width} x {height}", remedy)
            return pixels(image.convert("L" if channels == 1 else "RGB"))
    except BadImageError:
        raise
    except Exception as error:  # as above
        text = " ".join(str(error).split())
        raise BadImageError(key, f"not a readable {encoding} image ({text})", remedy) from error


def _refuse_unfit(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        problem = f"{image.width} x {image.height} pixels, and max_pixels is {max_pixels}"
        remedy = "make it smaller, raise max_pixels if you trust it, or use on_bad_image=skip"
        raise BadImageError(name, problem, remedy)
    if getattr(image, "n_frames", 1) > 1:
        remedy = "save the frame you want as an image of its own, or use on_bad_image=skip"
        raise BadImageError(name, f"animated, with {image.n_frames} frames", remedy)  # type: ignore[attr-defined]
    if image.mode == "CMYK":
        remedy = "convert it to RGB with its colour profile, or use on_bad_image=skip"
        raise BadImageError(name, "CMYK, which has no one way to RGB", remedy)
    if image.mode not in GREY_MODES + COLOUR_MODES:
        remedy = "convert it to 8 bits grey or RGB, or use on_bad_image=skip"
        raise BadImageError(name, f"more than 8 bits per channel (mode {image.mode})", remedy)
