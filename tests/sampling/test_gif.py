"""A film has a frame for each step of its first batch, and ends with the images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from ddpm_ray.sampling.gif import FRAME_MS, LAST_MS, Film


def test_a_film_shows_each_step_of_the_first_batch_and_rests_on_the_images(tmp_path: Path) -> None:
    film = Film()
    for batch in (0, 1):
        for t, level in ((40, -1.0), (20, 0.0), (10, 0.5)):
            x_0 = torch.full((3, 1, 8, 8), level - batch)
            film.add(t, x_0, x_0)
    images = np.full((20, 8, 8, 1), 255, np.uint8)
    film.save(tmp_path / "film.gif", images[:3])
    middles, times = [], []
    with Image.open(tmp_path / "film.gif") as shown:
        for frame in ImageSequence.Iterator(shown):
            middles.append(int(np.asarray(frame.convert("L"))[20, 20]))
            times.append(frame.info["duration"])
    assert len(middles) == 4
    assert np.abs(np.array(middles) - [0, 128, 191, 255]).max() <= 2
    assert times == [FRAME_MS] * 3 + [LAST_MS]
