"""Samples of a sweep's best trials, drawn from the same noise, one row of images each."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from ddpm_ray.sampling.image_grid import GUTTER_PIXELS, legible_font_pixels
from ddpm_ray.sweep.leaderboard import cut
from ddpm_ray.sweep.standings import digits, standings
from ddpm_ray.sweep.trial_store import Trial
from ddpm_ray.training.sample_grids import GRID_IMAGES

ROWS = 5  # with eight columns the sheet is square, as MLflow's panel is
COLUMNS = 8
CELL_PIXELS = 128  # wider samples are reduced


def contact_sheet(
    trials: Sequence[Trial], grids: Mapping[int, Image.Image], metric: str, columns: int = COLUMNS
) -> Image.Image | None:
    """Draw the first `columns` samples of the best trials; None if there are no grids.

    `grids` are the trials' square grids of 64 samples, by trial number.
    """
    rows = [row for row in standings(trials, metric) if row.number in grids][:ROWS]
    if not rows:
        return None
    titles = {trial.number: trial.title for trial in trials}
    strips = [first_images(grids[row.number], columns) for row in rows]
    width = max(strip.width for strip in strips)
    size = legible_font_pixels(width)
    line, font = round(1.3 * size), ImageFont.load_default(size=size)
    height = sum(strip.height + line for strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for row, strip in zip(rows, strips, strict=True):
        result = digits(row.score) if row.score is not None else f"loss {digits(row.loss)}"
        title, room = titles[row.number], width - font.getlength(f"  {result}")
        while title and font.getlength(title) > room:
            title = cut(title, len(title) - 1)
        pen.text((2, top), title, fill="black", font=font)
        pen.text((width - 2, top), result, fill="black", font=font, anchor="ra")
        sheet.paste(strip, (0, top + line))
        top += line + strip.height
    return sheet


def first_images(grid: Image.Image, count: int) -> Image.Image:
    """Return the first `count` images of a square grid of 64 (image_grid.py), side by side."""
    across = round(GRID_IMAGES**0.5)
    width, height = ((side - GUTTER_PIXELS) // across for side in grid.size)
    strip = Image.new("RGB", (count * width + GUTTER_PIXELS, height + GUTTER_PIXELS), "white")
    for i in range(count):
        x, y = i % across * width, i // across * height
        box = x, y, x + width + GUTTER_PIXELS, y + height + GUTTER_PIXELS
        strip.paste(grid.crop(box), (i * width, 0))
    return strip.reduce(max(1, -(-width // (CELL_PIXELS + GUTTER_PIXELS))))
