"""Draw grids of images, and strips that show the steps from noise to image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import Images, SamplingPlan, draw

if TYPE_CHECKING:
    from PIL import Image

GUTTER_PIXELS = 2
GUTTER_GREY = 128  # contrasts with both black and white backgrounds
MARGIN_PIXELS = 28  # margin for captions; wider if a caption is longer
LEGIBLE_PIXELS = 64  # smaller images are enlarged by an integer factor


def grid(
    images: Images, columns: int | None = None, *, min_pixels: int = LEGIBLE_PIXELS
) -> Image.Image:
    """Arrange uint8 images [N, H, W, C], C 1 (grey) or 3 (RGB), N >= 1, row by row in one picture.

    Without `columns` the grid is about square. Images with a side below `min_pixels` are enlarged
    by the smallest sufficient integer factor, without interpolation.
    """
    from PIL import Image  # so that sampling does not need Pillow

    if images.ndim != 4 or not len(images) or images.shape[3] not in (1, 3):
        raise ValueError(f"images have shape {list(images.shape)}; a grid shows [N, H, W, 1 or 3]")
    count, height, width, channels = images.shape
    factor = max(1, math.ceil(min_pixels / min(height, width)))
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    cell_height, cell_width = height * factor + GUTTER_PIXELS, width * factor + GUTTER_PIXELS
    shape = (rows * cell_height + GUTTER_PIXELS, columns * cell_width + GUTTER_PIXELS, channels)
    canvas = np.full(shape, GUTTER_GREY, np.uint8)
    for i, image in enumerate(images.repeat(factor, axis=1).repeat(factor, axis=2)):
        top = i // columns * cell_height + GUTTER_PIXELS
        left = i % columns * cell_width + GUTTER_PIXELS
        canvas[top : top + height * factor, left : left + width * factor] = image
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)


def denoising_strip(
    denoiser: Denoiser,
    plan: SamplingPlan,
    index: Tensor,
    image_shape: tuple[int, int, int],
    device: torch.device | str,
    *,
    columns: int = 10,
) -> Image.Image:
    """Draw the images `index` [N] and show their steps: one column per step, from T to 0.

    Each image has two rows: x_t, and below it the estimate of x_0 at that step (at t = 0 both are
    the image). About `columns` steps are shown, evenly spaced over the plan's.
    """
    places = np.linspace(0, len(plan.steps) - 1, max(2, min(columns, len(plan.steps)))).round()
    shown = [plan.steps[int(place)] for place in places]
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(t: int, x_t: Tensor, x_0_estimate: Tensor) -> None:
        if t in shown:
            kept[t] = x_t.clone(), x_0_estimate.clone()

    x_0 = draw(denoiser, plan, index, image_shape, device, on_step=keep)
    kept[0] = x_0, x_0
    noisy, clean = (torch.stack([kept[t][i] for t in shown], dim=1) for i in (0, 1))
    rows = torch.stack([noisy, clean], dim=1)  # [N, 2, columns, C, H, W]
    picture = grid(denoiser.codec.decode(rows.flatten(0, 2)), columns=len(shown))
    captions = [f"t = {shown[0]}", *map(str, shown[1:])]
    return captioned(picture, above=captions, row_captions=["x_t", "x_0"] * len(index))


def captioned(
    picture: Image.Image, above: Sequence[str], row_captions: Sequence[str]
) -> Image.Image:
    """Add captions to `picture`: `above` its equal columns, and left of its equal rows."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    left = max(
        [MARGIN_PIXELS, *(math.ceil(font.getlength(caption)) + 6 for caption in row_captions)]
    )
    whole = Image.new(picture.mode, (picture.width + left, picture.height + MARGIN_PIXELS), "white")
    whole.paste(picture, (left, MARGIN_PIXELS))
    pen = ImageDraw.Draw(whole)
    for i, caption in enumerate(above):
        x = left + (i + 0.5) * picture.width / len(above)
        pen.text((x, MARGIN_PIXELS / 2), caption, fill="black", font=font, anchor="mm")
    for i, caption in enumerate(row_captions):
        y = MARGIN_PIXELS + (i + 0.5) * picture.height / len(row_captions)
        pen.text((left / 2, y), caption, fill="black", font=font, anchor="mm")
    return whole
