"""Pictures hold every pixel of every image, enlarged sharply, and say which step they show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import UInt8s
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.latent_preview import PreviewMatrix
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.models.autoencoder import Posterior
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.image_grid import (
    GUTTER_PIXELS,
    MARGIN_PIXELS,
    captioned,
    denoising_strip,
    grid,
    require_memory,
    titled,
)
from ddpm_ray.sampling.sampling import Images, SamplingPlan, draw


def test_a_grid_that_exceeds_the_memory_is_refused() -> None:
    """A million images of 4 MiB; 64 small ones are drawn, whose grid takes 8 MB."""
    require_memory("num_images", 64, ImageShape(32, 32, 3))
    says = (
        r"num_images is 1048576; these images of 1024 x 1365 and their grid take 1\d{4}\.\d GiB of"
    )
    with pytest.raises(ConfigError, match=says):
        require_memory("num_images", 2**20, ImageShape(1024, 1365, 3))


def noise(*shape: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@given(
    count=st.integers(1, 12),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    columns=st.none() | st.integers(1, 12),
)
def test_each_image_can_be_read_back(
    count: int, height: int, width: int, channels: int, columns: int | None
) -> None:
    images = noise(count, height, width, channels)
    picture = grid(images, columns, min_pixels=24)
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    factor = max(1, -(-24 // min(height, width)))
    high, wide = height * factor, width * factor
    across = (picture.width - GUTTER_PIXELS) // (wide + GUTTER_PIXELS)
    assert across == min(count, columns) if columns else across**2 >= count
    for i, image in enumerate(images):
        row, column = divmod(i, across)
        top = GUTTER_PIXELS + row * (high + GUTTER_PIXELS)
        left = GUTTER_PIXELS + column * (wide + GUTTER_PIXELS)
        block = pixels[top : top + high, left : left + wide]
        assert (block[::factor, ::factor] == image).all()
        assert (block[factor - 1 :: factor, factor - 1 :: factor] == image).all()


def test_small_images_become_legible_and_keep_their_kind() -> None:
    digits = grid(noise(4, 8, 8, 1))
    assert digits.mode == "L"
    assert digits.width >= 2 * 64
    assert grid(noise(4, 128, 128, 3)).mode == "RGB"
    assert grid(noise(4, 128, 128, 3)).width < 2 * 128 + 10


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (8, 8, 1), (1, 8, 8, 2)])
def test_what_is_no_batch_of_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images have shape .* \[N, H, W, 1 or 3\]"):
        grid(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_strip_goes_from_the_start_noise_to_the_image(count: int) -> None:
    plan, index, shape = (
        SamplingPlan(uniform_steps(20, count)),
        torch.arange(2),
        ImageShape(8, 8, 1),
    )

    def shrink(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.8 * x_t

    shrinking = Denoiser.of_noise(shrink, NoiseSchedule(schedules.cosine(20)))
    starts: list[Tensor] = []

    def keep(t: int, x_t: Tensor, x_0: Tensor) -> None:
        starts.extend([x_t.clone(), x_0.clone()] if t == 20 else [])

    x_0 = draw(shrinking, plan, index, shape, "cpu", on_step=keep)
    strip = denoising_strip(shrinking, plan, index, shape, "cpu", columns=5)
    cell = 64 + GUTTER_PIXELS
    columns = min(5, count + 1)
    left = strip.width - columns * cell - GUTTER_PIXELS
    top = strip.height - 4 * cell - GUTTER_PIXELS
    assert min(left, top) >= MARGIN_PIXELS
    pixels = np.asarray(strip)[top:, left:]
    assert (np.asarray(strip)[:top, left:] < 128).any(), "the steps are written above"
    first_noisy, first_clean, last = (PIXELS.decode(x) for x in (starts[0], starts[1], x_0))
    for i in range(2):
        for column, row, image in (
            (0, 2 * i, first_noisy[i]),
            (0, 2 * i + 1, first_clean[i]),
            (columns - 1, 2 * i, last[i]),
            (columns - 1, 2 * i + 1, last[i]),
        ):
            top, left = (GUTTER_PIXELS + place * cell for place in (row, column))
            assert (pixels[top : top + 64 : 8, left : left + 64 : 8] == image[..., 0]).all()


class Decoder:
    """Decodes each 2x2 latent to a white image of 4x4 pixels; knows how many it did at a time."""

    url = sha256 = ""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode_uint8(self, images: Tensor) -> Posterior:
        raise NotImplementedError

    def decode_uint8(self, z: Tensor) -> UInt8s:
        self.sizes.append(len(z))
        return np.full((len(z), 4, 4, 1), 255, np.uint8)


def test_a_strip_of_latents_shows_noise_by_the_preview_and_decodes_a_column_at_a_time() -> None:
    preview = PreviewMatrix(((20.0,),), (100.0,), r_squared=0.5)
    decoder = Decoder()
    codec = LatentCodec(1, 2, ("plain",), (3.0,), (2.0,), decoder, preview=preview)
    denoiser = Denoiser.of_noise(lambda x_t, t: 0.8 * x_t, NoiseSchedule(schedules.cosine(20)))
    denoiser, plan = replace(denoiser, codec=codec), SamplingPlan(uniform_steps(20, 4))
    strip = denoising_strip(denoiser, plan, torch.arange(2), ImageShape(4, 4, 1), "cpu")
    assert decoder.sizes == [2] * 5
    start = plan_noise(denoiser, plan)
    cell = 64 + GUTTER_PIXELS
    pixels = np.asarray(strip)[strip.height - 4 * cell :, strip.width - 5 * cell :]
    cells = [
        [pixels[r * cell : r * cell + 64, c * cell : c * cell + 64] for c in range(5)]
        for r in range(4)
    ]
    for i in range(2):
        assert all((one == 255).all() for one in cells[2 * i + 1])
        assert (cells[2 * i][4] == 255).all()  # the image
        levels = (100 + 20 * start[i, 0]).add(0.5).clamp(0, 255).to(torch.uint8).numpy()
        assert (cells[2 * i][0] == levels.repeat(32, 0).repeat(32, 1)).all()


def plan_noise(denoiser: Denoiser, plan: SamplingPlan) -> Tensor:
    """x_T [2, 1, 2, 2] of the first two images."""
    kept: list[Tensor] = []

    def keep(t: int, x_t: Tensor, x_0: Tensor) -> None:
        kept.append(x_t.clone())

    draw(denoiser, plan, torch.arange(2), ImageShape(4, 4, 1), "cpu", on_step=keep)
    return kept[0]


def test_captions_beside_a_picture_have_the_room_that_they_need() -> None:
    plain = Image.new("L", (100, 64), 0)
    short, long = (captioned(plain, ["a"], [name]) for name in ("x_t", "dpm_solver_pp_sde"))
    assert short.size == (100 + MARGIN_PIXELS, 64 + MARGIN_PIXELS)
    next_to = np.asarray(long)[MARGIN_PIXELS:, : long.width - 100]
    assert (next_to[:, :2] == 255).all(), "it is cut off"
    assert (next_to[:, -2:] == 255).all(), "it runs into the picture"
    assert (next_to < 100).any()


PANEL_PIXELS = 250  # width at which MLflow shows a picture


def ink(margin: Image.Image) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    return np.asarray(margin.convert("L")) < 128


def test_without_captions_above_there_is_no_empty_band() -> None:
    """Pictures of reconstructions name their rows alone."""
    plain = grid(np.zeros((2, 8, 8, 3), np.uint8), 1)
    picture = captioned(plain, [], ["image", "decoded"])
    assert picture.height == plain.height
    assert np.array_equal(np.asarray(picture)[:, -plain.width :], np.asarray(plain))


@pytest.mark.parametrize("side", [8, 32, 64, 256])
def test_text_is_readable_where_mlflow_shows_it(side: int) -> None:
    """Digits are 6.5 of 250 pixels or more in height, over eight columns with gaps between them."""
    steps = ["1000", "860", "720", "580", "440", "300", "140", "0"]
    plain = grid(noise(16, side, side, 3), columns=8)
    strip = captioned(plain, steps, ["x_t", "x_0"], corner="t")
    left, top = strip.width - plain.width, strip.height - plain.height
    text = ink(strip.crop((left, 0, strip.width, top)))
    rows = np.flatnonzero(text.any(axis=1))
    assert len(rows) * PANEL_PIXELS / strip.width >= 6.5
    cells = np.array_split(text.any(axis=0), 8)
    assert all(cell.any() and not cell[0] and not cell[-1] for cell in cells)
    whole = titled(plain, "step 4000")
    rows = np.flatnonzero(ink(whole.crop((0, 0, whole.width, whole.height - plain.height))).any(1))
    assert len(rows) * PANEL_PIXELS / whole.width >= 6.5


def test_a_title_leaves_the_picture_as_it_is() -> None:
    plain = grid(noise(4, 8, 8, 1))
    whole = titled(plain, "step 5")
    below = whole.crop((0, whole.height - plain.height, whole.width, whole.height))
    assert whole.width == plain.width
    assert (np.asarray(below) == np.asarray(plain)).all()
