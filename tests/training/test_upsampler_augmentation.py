"""Crops and blur of an upsampler's images, against shifted images and scipy's Gaussian."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.low_resolution import downscaled
from ddpm_ray.runs.training_data import check_model
from ddpm_ray.training.upsampler_augmentation import blurred, cropped
from tests.data.latent_sets import TINY_UNET
from tests.noise import pack_noise

TINY_DIT = ("model.network=dit", "model.depth=1", "model.hidden_size=8", "model.heads=2")
COUNT = 4000
POSITIONS = torch.arange(COUNT)


def test_image_and_small_image_have_the_same_place_and_all_places_are_likely() -> None:
    """Of a map of coordinates; each of 4 x 3 places as often as any other (chi-square)."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    coordinates = torch.stack([rows, columns])[None].expand(COUNT, -1, -1, -1)
    low = downscaled(coordinates, 2)
    x_0, small = cropped(coordinates, low, 4, 5, 9, POSITIONS)
    assert x_0.shape == small.shape == (COUNT, 2, 4, 4)
    top, left = x_0[:, 0, 0, 0].long(), x_0[:, 1, 0, 0].long()
    for image in range(0, COUNT, 500):
        at = slice(int(top[image]), int(top[image]) + 4), slice(int(left[image]), None)
        torch.testing.assert_close(x_0[image], coordinates[image][:, *at][:, :, :4])
        torch.testing.assert_close(small[image], low[image][:, *at][:, :, :4])
    counts = np.bincount((top * 3 + left).numpy(), minlength=15)
    assert len(counts) == 15  # 5 tops x 3 lefts
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_blur_is_scipys_with_a_deviation_of_its_own() -> None:
    """In pixels of the low-resolution image; deviations are uniform up to the largest."""
    impulse = torch.zeros(COUNT, 1, 48, 48)
    impulse[:, :, 24, 24] = 1
    found = blurred(impulse, 1.5, 24, 3, 4, POSITIONS)[:, 0].double()  # 2 pixels to each of 24
    places = torch.arange(48.0) - 24
    variance = (found.sum(1) * places.square()).sum(1)  # of the columns
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(COUNT).double(), atol=1e-5, rtol=0)
    sigma = variance.sqrt() / 2
    wide = sigma > 0.5  # narrower ones are less than a pixel, and their moments not a Gaussian's
    assert stats.kstest(sigma[wide].numpy(), stats.uniform(0.5, 1.0).cdf).pvalue > 1e-3
    image = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(1))
    (number,) = [n for n in range(200) if abs(float(sigma[n]) - 0.9) < 4e-3][:1]
    ours = blurred(image, 1.5, 10, 3, 4, torch.tensor([number]))[0]
    theirs = ndimage.gaussian_filter(
        image[0].numpy(), (0, 2 * float(sigma[number]), 2 * float(sigma[number])), mode="nearest"
    )
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-3)


@pytest.mark.parametrize(
    "keys, says",
    [
        (
            ["objective.low_resolution_crop=16"],
            r"^objective.low_resolution_crop is 16, but the images of .* 8 x 8: use 4",
        ),
        (
            ["objective.low_resolution_crop=3"],
            "^objective.low_resolution_crop is 3: images are 3 x 3, which 2",
        ),
        (
            ["objective.low_resolution_crop=4", *TINY_DIT],
            "but model.network is dit, which takes images of one size",
        ),
    ],
)
def test_crops_that_cannot_be_are_refused_before_ray_starts(
    keys: list[str], says: str, tmp_path: Path
) -> None:
    pack_noise(str(tmp_path / "data"), 4, 8)
    low = "objective.low_resolution_pixels=4"
    network = () if "model.network=dit" in keys else TINY_UNET
    words = ["name=a", f"data.url={tmp_path / 'data'}", *network, low, *keys]
    with pytest.raises(ConfigError, match=says):
        check_model(load_config(RunConfig, None, words), open_dataset(str(tmp_path / "data")))


def test_augmentation_without_a_small_image_is_refused() -> None:
    for key in ("low_resolution_crop=4", "low_resolution_blur=0.5"):
        with pytest.raises(ConfigError, match=f"{key[:19]} is .*, but there is no low-resolution"):
            load_config(RunConfig, None, ["name=a", "data.url=b", f"objective.{key}"])
