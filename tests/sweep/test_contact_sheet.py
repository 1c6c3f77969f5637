"""A contact sheet holds samples of the best trials, pixel by pixel, with captions to read."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from ddpm_ray.sampling.image_grid import GUTTER_PIXELS, grid
from ddpm_ray.sweep.contact_sheet import CELL_PIXELS, ROWS, contact_sheet
from ddpm_ray.sweep.trial_store import Trial

METRIC = "eval/fid"
CELL = 64 + GUTTER_PIXELS


def trials(count: int) -> list[Trial]:
    """Trials of which a later one has a better score."""
    outcomes = [{"metrics": {METRIC: float(count - i)}} for i in range(count)]
    return [
        Trial(i, {"schedule.num_steps": 100 * i}, status="finished", outcome=outcome)
        for i, outcome in enumerate(outcomes)
    ]


def sample_grids(numbers: range, height: int, width: int, channels: int) -> dict[int, Image.Image]:
    draw = np.random.default_rng(0)
    shape = 64, height, width, channels
    return {number: grid(draw.integers(0, 256, shape, dtype=np.uint8)) for number in numbers}


@pytest.mark.parametrize("columns, channels", [(8, 1), (3, 3), (12, 3)])
def test_a_contact_sheet_holds_the_images_of_the_grids(columns: int, channels: int) -> None:
    """Best first, trials without a grid left out; above each row is room for its caption."""
    grids = sample_grids(range(3), 32, 32, channels)
    sheet = contact_sheet(trials(4), grids, METRIC, columns)
    assert sheet is not None
    row_height = sheet.height // 3
    for row, number in enumerate((2, 1, 0)):
        top = (row + 1) * row_height - CELL
        for i in range(columns):
            x, y = GUTTER_PIXELS + i % 8 * CELL, GUTTER_PIXELS + i // 8 * CELL
            image = grids[number].convert("RGB").crop((x, y, x + 64, y + 64))
            x = GUTTER_PIXELS + i * CELL
            shown = sheet.crop((x, top, x + 64, top + 64))
            assert ImageChops.difference(shown, image).getbbox() is None


@pytest.mark.parametrize("height, width, channels", [(8, 8, 1), (256, 256, 3), (32, 64, 3)])
def test_a_sheet_of_many_trials_is_as_wide_as_high(height: int, width: int, channels: int) -> None:
    """MLflow shows it in a square: in a long sheet nothing could be seen."""
    sheet = contact_sheet(trials(9), sample_grids(range(9), height, width, channels), METRIC)
    assert sheet is not None
    assert sheet.width <= 8 * (CELL_PIXELS + GUTTER_PIXELS) + GUTTER_PIXELS
    assert 0.5 < sheet.height / sheet.width < 1.1
    assert ROWS < 9


def test_a_caption_that_is_too_long_keeps_the_result() -> None:
    """Its row's right end, where the score stands, does not depend on the trial's name."""
    (short,), (long,) = trials(1), trials(1)
    long.values["model.name"] = "x" * 200
    ends = []
    for trial in (short, long):
        sheet = contact_sheet([trial], sample_grids(range(1), 8, 8, 1), METRIC)
        assert sheet is not None
        ends.append(sheet.crop((sheet.width - 60, 0, sheet.width, sheet.height - CELL)))
    assert ImageChops.difference(*ends).getbbox() is None
    assert min(ends[0].convert("L").tobytes()) < 100


def test_without_grids_there_is_no_sheet() -> None:
    assert contact_sheet(trials(3), {}, METRIC) is None
