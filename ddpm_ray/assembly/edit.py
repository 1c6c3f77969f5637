"""Edit an image according to the options of the job edit."""

from typing import assert_never

import numpy as np
import numpy.typing as npt

from ddpm_ray.assembly.checkpoint_loading import with_sampling
from ddpm_ray.config.jobs.edit import EditConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.packing.image_files import BadImageError
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.editing import Mask
from ddpm_ray.sampling.image_grid import require_memory
from ddpm_ray.sampling.image_io import read_image, read_mask
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import Images


def edited_files(
    config: EditConfig, model: DrawingModel, image: str, mask: str
) -> tuple[Images, dict[str, float | None]]:
    """Return `edited`, with the image and the mask read from files; no mask if `mask` is "".

    Raises ConfigError also for files that cannot be used.
    """
    try:
        pixels = read_image(image, model.image_shape.channels)
        keep = read_mask(mask) if mask else None
        if keep is not None and keep.shape != pixels.shape[:2]:
            sizes = [" x ".join(map(str, one.shape[:2])) for one in (keep, pixels)]
            raise ConfigError(
                f"{mask} is {sizes[0]} (height x width) and {image} {sizes[1]}; save the mask in "
                f"the size of the image"
            )
        return edited(config, model, pixels, keep)
    except (BadImageError, ValueError) as error:
        raise ConfigError(str(error)) from error


def edited(
    config: EditConfig, model: DrawingModel, image: npt.NDArray[np.uint8], mask: Mask | None
) -> tuple[Images, dict[str, float | None]]:
    """Return `num_images` edits of `image` [H, W, C], uint8 [N, H, W, C], and their measures.

    The measures are those of `fit`. Edit i uses the noise of image i of the seed. `mask` is for
    inpainting. Raises ConfigError for unsupported sampling settings, and ValueError as the model's
    methods do.
    """
    model = with_sampling(model, config.sampling)
    if isinstance(model, Cascade) and config.kind == "variations":
        return _variations(config, model, image), {}
    if not isinstance(model, TrainedModel):
        raise ConfigError(
            f"kind is {config.kind!r}, and a cascade draws only variations of an image: name its "
            f"decoder, or set kind=variations"
        )
    settings = {key: value for key, value in vars(config.sampling).items() if value != ()}
    require_memory(
        "num_images", config.num_images, _edited_shape(config, model, ImageShape(*image.shape))
    )
    images = np.repeat(image[None], config.num_images, axis=0)
    match config.kind:
        case "image_to_image":
            return model.image_to_image(images, config.strength), {}
        case "enlarge":
            return model.enlarge(images), {}
        case "variations":
            return _variations(config, model, image), {}
        case "text_diff":
            texts, iterations = (config.from_text, config.to_text), config.iterations
            return model.text_diff(images, *texts, iterations=iterations), {}
        case "outpaint":
            images, mask = editing.outpainting_canvas(
                images, config.top, config.bottom, config.left, config.right
            )
        case "inpaint":
            assert mask is not None  # argument_errors() has seen to it
        case _:
            assert_never(config.kind)
    method, resamples, jump_length = config.method, config.resamples, config.jump_length
    painted = model.inpaint(
        images, mask, method=method, resamples=resamples, jump_length=jump_length, **settings
    )  # given, the settings also hold for RePaint
    return painted, editing.fit(painted, images, mask)


def _variations(
    config: EditConfig, model: TrainedModel | Cascade, image: npt.NDArray[np.uint8]
) -> Images:
    require_memory("num_images", config.num_images, model.drawn_shape)
    prompts = config.sampling.prompts or None
    return model.variations(image[None], per_image=config.num_images, prompts=prompts)


def _edited_shape(config: EditConfig, model: TrainedModel, given: ImageShape) -> ImageShape:
    """Shape of the edited images of an image of the shape `given`."""
    if config.kind in ("enlarge", "variations"):
        return model.image_shape
    height = config.top + given.height + config.bottom
    return ImageShape(height, config.left + given.width + config.right, given.channels)
