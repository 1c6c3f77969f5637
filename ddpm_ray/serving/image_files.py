"""Files of drawn images, with the facts of their drawing."""

import io
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import PngImagePlugin

from ddpm_ray.data.packing.image_files import from_pixels

FileFormat: TypeAlias = Literal["png", "jpeg", "webp"]
FACTS = "ddpm_ray"  # keyword of the text chunk


def encoded_image(
    image: npt.NDArray[np.uint8], file_format: FileFormat, facts: Mapping[str, Any]
) -> bytes:
    """Encode uint8 [H, W, C]; a PNG holds the facts as JSON in a text chunk named FACTS.

    JPEG has quality 95, WebP is lossless.
    """
    picture, file = from_pixels(image, 0), io.BytesIO()
    match file_format:
        case "png":
            info = PngImagePlugin.PngInfo()
            info.add_itxt(FACTS, json.dumps(facts, sort_keys=True))
            picture.save(file, "PNG", pnginfo=info)
        case "jpeg":
            picture.save(file, "JPEG", quality=95, subsampling=0)
        case "webp":
            picture.save(file, "WEBP", lossless=True)
    return file.getvalue()
