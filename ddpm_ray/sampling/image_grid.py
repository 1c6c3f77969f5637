"""Draw grids of images, and strips that show the steps from noise to image."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.config.reading.errors import ConfigError
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import Images, SamplingPlan, draw, sampling_plan

if TYPE_CHECKING:
    from PIL import Image

    from ddpm_ray.sampling.drawing_model import DrawingModel

STRIP_IMAGES = 4
GUTTER_PIXELS = 2
GUTTER_GREY = 128  # contrasts with both black and white backgrounds
MARGIN_PIXELS = 28  # margin for captions; wider if a caption needs it
PROMPT_LETTERS = (28, 36, 48, 64, 96)  # of a line of a prompt, until its lines fit its row
PROMPT_PIXELS, LINE_PIXELS = 13, 17  # font of prompts, and height of their lines
HELD_OUT = "[held out]"  # stands before a prompt that no training image has as caption
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
    factor = _enlargement(height, width, min_pixels)
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    cell_height, cell_width = height * factor + GUTTER_PIXELS, width * factor + GUTTER_PIXELS
    canvas = np.full(_grid_shape(images.shape, columns, factor), GUTTER_GREY, np.uint8)
    for i, image in enumerate(images):
        top = i // columns * cell_height + GUTTER_PIXELS
        left = i % columns * cell_width + GUTTER_PIXELS
        enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + height * factor, left : left + width * factor] = enlarged
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)


def grid_of_samples(
    images: Images, prompts: Sequence[str], held_out: Collection[str] = ()
) -> Image.Image:
    """Arrange samples 0, 1, ... as `grid` does or, if they have prompts, one row for each prompt.

    The prompt of sample i is prompts[i % len(prompts)] and stands left of its row, marked if it is
    in `held_out`. Prompts without a sample and samples that do not fill a column are left out.
    """
    if not prompts:
        return grid(images)
    shown = prompts[: len(images)]
    columns = len(images) // len(prompts) or 1
    rows = [images[n :: len(prompts)][:columns] for n in range(len(shown))]
    picture = grid(np.concatenate(rows), columns)
    most = picture.height // len(shown) // LINE_PIXELS  # lines that fit a row
    marks = [f"{HELD_OUT} " if prompt in held_out else "" for prompt in shown]
    texts = [
        _in_lines(f"{m}{text or '(no text)'}", most) for m, text in zip(marks, shown, strict=True)
    ]
    return captioned(picture, [], texts, row_font_pixels=PROMPT_PIXELS)


def _in_lines(text: str, most: int) -> str:
    """Break a text into lines of equal width, at most `most` of them."""
    lines = [text]
    for letters in PROMPT_LETTERS:
        lines = textwrap.wrap(text, letters)
        if len(lines) <= most:
            break
    return "\n".join(lines[:most])


def require_memory(option: str, count: int, image_shape: ImageShape) -> None:
    """Raise ConfigError, which names `option`, if a grid of `count` images exceeds this machine.

    Before the images are drawn: it counts the images, the grid, and Pillow's copy of the grid.
    """
    from psutil import virtual_memory  # make gpu-check runs without it

    height, width, channels = image_shape
    columns, factor = math.ceil(math.sqrt(count)), _enlargement(height, width, LEGIBLE_PIXELS)
    grid_bytes = math.prod(_grid_shape((count, *image_shape), columns, factor))
    needed, there = count * height * width * channels + 2 * grid_bytes, virtual_memory().available
    if needed > there:
        raise ConfigError(
            f"{option} is {count}; these images of {height} x {width} and their grid take "
            f"{needed / 2**30:.1f} GiB of memory, and {there / 2**30:.1f} are free: draw fewer"
        )


def _enlargement(height: int, width: int, min_pixels: int) -> int:
    """The smallest integer factor that enlarges an image to `min_pixels` a side."""
    return max(1, math.ceil(min_pixels / min(height, width)))


def _grid_shape(shape: Sequence[int], columns: int, factor: int) -> tuple[int, int, int]:
    """(H, W, C) of the grid of images [N, H, W, C], each enlarged by `factor`."""
    count, height, width, channels = shape
    rows = math.ceil(count / columns)
    return (
        rows * (height * factor + GUTTER_PIXELS) + GUTTER_PIXELS,
        columns * (width * factor + GUTTER_PIXELS) + GUTTER_PIXELS,
        channels,
    )


def denoising_strip(
    denoiser: Denoiser,
    plan: SamplingPlan,
    index: Tensor,
    image_shape: ImageShape,
    device: torch.device | str,
    *,
    columns: int = 8,
) -> Image.Image:
    """Draw the images `index` [N] and show their steps: one column per step, from T to 0.

    Each image has two rows: x_t and, below it, the decoded estimate of x_0 at that step (at t = 0
    both are the image). Noisy latents are shown by their linear preview. About `columns` steps are
    shown, evenly spaced over the plan's.
    """
    places = np.linspace(0, len(plan.steps) - 1, max(2, min(columns, len(plan.steps)))).round()
    shown = [plan.steps[int(place)] for place in places]
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(t: int, x_t: Tensor, x_0_estimate: Tensor) -> None:
        if t in shown:
            kept[t] = x_t.clone(), x_0_estimate.clone()

    x_0 = draw(denoiser, plan, index, image_shape, device, on_step=keep)
    kept[0] = x_0, x_0
    codec, columns_of = denoiser.codec, []
    for t in shown:  # step by step, so that a decoder of latents holds only N images in memory
        image = codec.decode(kept[t][1])
        noisy = codec.show_noisy(kept[t][0]) if t else image
        columns_of.append(np.stack([noisy, image], axis=1))  # [N, 2, H, W, C]
    rows = np.stack(columns_of, axis=2)  # [N, 2, columns, H, W, C]
    picture = grid(rows.reshape(-1, *rows.shape[3:]), columns=len(shown))
    above = [str(t) for t in shown]
    return captioned(picture, above, row_captions=["x_t", "x_0"] * len(index), corner="t")


def strip_of(model: DrawingModel, most: int) -> Image.Image:
    """The `denoising_strip` of the model's first images, `most` at most, with its settings."""
    plan = sampling_plan(model.settings, model.denoiser.schedule, model.label_names)
    index = torch.arange(min(STRIP_IMAGES, most))
    return denoising_strip(model.denoiser, plan, index, model.image_shape, model.device)


def captioned(
    picture: Image.Image,
    above: Sequence[str],
    row_captions: Sequence[str],
    corner: str = "",
    row_font_pixels: int = 0,
) -> Image.Image:
    """Add captions to `picture`: `above` its equal columns, and left of its equal rows.

    `corner` stands left of the captions above. `row_font_pixels` is the size of those left of rows;
    0: legible where the picture is shown small.
    """
    from PIL import Image, ImageDraw, ImageFont

    size = legible_font_pixels(picture.width)
    font, smaller = (ImageFont.load_default(size=one) for one in (size, row_font_pixels or size))
    top = max(MARGIN_PIXELS, round(1.4 * size)) if above else 0
    left = max(
        [
            MARGIN_PIXELS,
            *(
                math.ceil(smaller.getlength(line)) + 6
                for text in row_captions
                for line in (text.splitlines() or [""])
            ),
        ]
    )
    whole = Image.new(picture.mode, (picture.width + left, picture.height + top), "white")
    whole.paste(picture, (left, top))
    pen = ImageDraw.Draw(whole)
    pen.text((left / 2, top / 2), corner, fill="black", font=font, anchor="mm")
    for i, caption in enumerate(above):
        x = left + (i + 0.5) * picture.width / len(above)
        pen.text((x, top / 2), caption, fill="black", font=font, anchor="mm")
    for i, caption in enumerate(row_captions):
        y = top + (i + 0.5) * picture.height / len(row_captions)
        pen.text((left / 2, y), caption, fill="black", font=smaller, anchor="mm")
    return whole


def titled(picture: Image.Image, title: str) -> Image.Image:
    """Add a line of text above `picture`."""
    from PIL import Image, ImageDraw, ImageFont

    size = legible_font_pixels(picture.width)
    top = round(1.4 * size)
    whole = Image.new(picture.mode, (picture.width, picture.height + top), "white")
    whole.paste(picture, (0, top))
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(whole).text((2, top / 2), title, fill="black", font=font, anchor="lm")
    return whole


def legible_font_pixels(width: int) -> int:
    """Return the font size that is 11 pixels where a picture is shown 250 wide, as in MLflow."""
    return max(14, math.ceil(width / 23))
