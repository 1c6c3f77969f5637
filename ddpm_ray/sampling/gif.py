"""Animated GIF of sampling: the estimate of x_0 at each step."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.sampling.image_grid import grid
from ddpm_ray.sampling.image_io import write_picture
from ddpm_ray.sampling.sampling import Images

FRAME_MS = 60
SHOWN_IMAGES = 16
LAST_MS = 1500  # duration of the last frame: the final images


class Film:
    """Collects the frames of a GIF; pass `add` as a sampler's on_step."""

    def __init__(self, codec: Codec = PIXELS) -> None:
        self._codec = codec
        self._frames: list[Image.Image] = []
        self._last_t: int | None = None
        self._rolls = True

    def add(self, t: int, x_t: Tensor, x_0: Tensor) -> None:
        """Add the estimates x_0 [N, C, H, W] of step t; batches after the first are ignored."""
        self._rolls = self._rolls and (self._last_t is None or t < self._last_t)
        self._last_t = t
        if self._rolls:
            self._frames.append(grid(self._codec.decode(x_0[:SHOWN_IMAGES])))

    def save(self, path: str | Path, images: Images) -> None:
        """Write a looping GIF: the frames, then the first of `images` for longer."""
        first, *others = [*self._frames, grid(images[:SHOWN_IMAGES])]
        times = [FRAME_MS] * len(self._frames) + [LAST_MS]
        write_picture(path, first, save_all=True, append_images=others, duration=times, loop=0)
