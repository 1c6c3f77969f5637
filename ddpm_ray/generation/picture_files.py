"""Pictures and masks that a person names, as a model takes them. Raises BadImageError."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddpm_ray.data.image_files import BadImageError, open_image, pixels
from ddpm_ray.generation.editing import Mask

MOST_PIXELS = 64_000_000  # more are refused before they are decoded


def read_image(file: str, channels: int) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, C] of a picture file; C is 1 for `channels` 1, else 3. See data/image_files."""
    remedy = "name a picture of one frame, of 8 bits grey or RGB"
    try:
        return pixels(open_image(Path(file).read_bytes(), file, channels, MOST_PIXELS))
    except OSError as error:
        raise BadImageError(file, error.strerror or "cannot be read", remedy) from error
    except BadImageError as error:
        raise BadImageError(file, error.args[1], remedy) from error


def read_mask(file: str) -> Mask:
    """[H, W], True where the picture is dark (below 128 of 255), which is what stays.

    Transparent counts as white: image editors and diffusers have white painted anew.
    """
    return read_image(file, channels=1)[..., 0] < 128
