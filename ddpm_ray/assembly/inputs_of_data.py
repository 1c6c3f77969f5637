"""The small images or embeddings of a data set's images, for samples of models that take them."""

from dataclasses import replace

import torch
from torch import Tensor

from ddpm_ray.assembly.training_run import fixed_images
from ddpm_ray.config.data import DataConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.decoded_images import DECODED_AT_ONCE, decoded_images, image_codec
from ddpm_ray.sampling.denoiser import Denoiser


def with_inputs_of_data(
    denoiser: Denoiser, config: DataConfig, dataset: Dataset, count: int, device: torch.device
) -> Denoiser:
    """`denoiser` with small images or embeddings of `count` decoded images, if it takes any.

    Of the decoded images only DECODED_AT_ONCE are in memory at a time. Raises DatasetError for
    latents that the model's autoencoder did not encode, StorageError.
    """
    if not (denoiser.takes.low_resolution_pixels or denoiser.takes.image_encoder):
        return denoiser
    samples = fixed_images(config, dataset, range(count), count)
    takes, codec = replace(denoiser.takes, tokenizer=None), image_codec(dataset, denoiser.codec)
    small: list[Tensor] = []
    embedded: list[Tensor] = []
    parts = (torch.split(each, DECODED_AT_ONCE) for each in (samples.images, samples.labels))
    for stored, labels in zip(*parts, strict=True):
        images = decoded_images(codec, stored.to(device)).to(device)
        shown = takes.of_data(PIXELS.encode(images), labels.to(device))
        if shown.low_resolution is not None:
            small.append(shown.low_resolution)
        if shown.embedding is not None:
            embedded.append(shown.embedding)
    return replace(
        denoiser,
        low_resolution_images=torch.cat(small) if small else None,
        embeddings=torch.cat(embedded) if embedded else None,
    )
