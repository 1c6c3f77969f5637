"""Edits that this machine has no memory for are refused by the size of their result."""

import numpy as np
import pytest

from ddpm_ray.assembly.edit import edited
from ddpm_ray.config.jobs.edit import EditConfig
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.pipeline import TrainedModel
from tests.truth import SCHEDULE

MODEL = TrainedModel(
    Denoiser(
        lambda x_t, *_: x_t,
        Parameterization.of("epsilon", SCHEDULE),
        takes=ConditioningSpec(low_resolution_pixels=4),
    ),
    ImageShape(64, 48, 1),
    provenance={},
)


@pytest.mark.parametrize(
    "words, size",
    [
        (("kind=enlarge",), "64 x 48"),  # of the model
        (("kind=outpaint", "top=5", "bottom=1", "left=7", "right=2"), "22 x 21"),
        (("kind=image_to_image",), "16 x 12"),  # of the image
    ],
)
def test_memory_is_that_of_the_edited_images(words: tuple[str, ...], size: str) -> None:
    """Before any is drawn."""
    config = load_config(EditConfig, None, [*words, f"num_images={2**32}"])
    with pytest.raises(ConfigError, match=f"num_images is {2**32}; these images of {size} and"):
        edited(config, MODEL, np.zeros((16, 12, 1), np.uint8), None)
