"""Read image and mask files for editing, and write results."""

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddpm_ray.data.packing.image_files import (
    FORMATS,
    ORIENTATION,
    BadImageError,
    DecodedImage,
    decode_image,
    to_pixels,
)
from ddpm_ray.sampling.editing import Mask
from ddpm_ray.storage import object_store

log = logging.getLogger(__name__)

WHITE = 128  # mask pixels and alpha values from here to 255 count as white, as opaque
MOST_PIXELS = 64_000_000  # larger images are refused before they are decoded


def read_image(file: str, channels: int) -> npt.NDArray[np.uint8]:
    """Read an image file as uint8 [H, W, C]; C is 1 for `channels` 1, else 3.

    Logs a warning for each change to its pixels, as colours that become grey. Raises BadImageError;
    see data/packing/image_files.py for the accepted formats.
    """
    image, changes = _decoded(file)
    if channels == 1 and image.mode == "RGB":
        changes = (*changes, "colours turned to grey: the model is one of grey images")
    for change in changes:
        log.warning("%s: %s", file, change)
    return to_pixels(image.convert("L" if channels == 1 else "RGB"))


def _decoded(file: str) -> DecodedImage:
    remedy = "name a picture of one frame, of 8 bits grey or RGB"
    try:
        return decode_image(Path(file).read_bytes(), file, 0, MOST_PIXELS)
    except OSError as error:
        raise BadImageError(file, error.strerror or "cannot be read", remedy) from error
    except BadImageError as error:
        raise BadImageError(file, error.args[1], remedy) from error


def read_mask(file: str) -> Mask:
    """Read a mask file as bool [H, W]: False where it is white (128 and above), to be repainted.

    A file with transparent pixels is accepted in two forms: its opaque pixels are all white (a
    painted layer: white is repainted), or all dark (erased holes: transparent is repainted). Raises
    BadImageError for other files, and if all or no pixels would be repainted.
    """
    grey = to_pixels(_decoded(file).image.convert("L"))[..., 0]
    white = grey >= WHITE
    if (opaque := _opaque(file)) is not None:
        if white[opaque].any() and not white[opaque].all():
            raise BadImageError(
                file,
                "a mask with transparent pixels whose other pixels are partly white, partly dark",
                "save it without an alpha channel, white where the image is to be painted",
            )
        white = white & opaque if white[opaque].any() else ~opaque
    if not white.any():
        hint = ": multiply a mask of 0 and 1 by 255" if 0 < grey.max() <= 1 else ""
        raise BadImageError(
            file,
            f"dark everywhere (its largest value is {grey.max()} of 255), so nothing is painted",
            f"make white what is to be painted{hint}",
        )
    if white.all():
        raise BadImageError(
            file,
            "white everywhere, so nothing of the image would stay",
            "make dark what is to stay, or draw whole images with `ddpm-ray sample`",
        )
    return ~white


def _opaque(file: str) -> npt.NDArray[np.bool_] | None:
    """bool [H, W], True where the picture is opaque; None if it has no transparent pixel."""
    with Image.open(io.BytesIO(Path(file).read_bytes()), formats=FORMATS) as image:
        if not image.has_transparency_data:
            return None
        alpha = np.asarray(image.convert("RGBA"))[..., 3] >= WHITE
        if not alpha.all() and image.getexif().get(ORIENTATION, 1) != 1:
            raise BadImageError(
                file, "a mask with transparent pixels and an orientation tag", "save it upright"
            )
    return None if alpha.all() else alpha


def write_picture(file: str | Path, image: Image.Image, **options: Any) -> None:
    """Write `image` atomically in the format of the file's suffix; `options` go to Pillow's save.

    Raises StorageError and keeps the old file if the disk is full or not writable.
    """
    encoded = io.BytesIO()
    image.save(encoded, Image.registered_extensions()[Path(file).suffix.lower()], **options)
    object_store.write_bytes(str(file), encoded.getvalue())
