"""Load the network that encodes a data set, with the codec of the sets that it makes."""

import torch

from ddpm_ray.assembly import run_config
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.packing.embedding_encoder import EmbeddingEncoder
from ddpm_ray.data.packing.latent_encoder import LatentEncoder
from ddpm_ray.models.interop import autoencoder_kl


def set_encoder(
    url: str, device: torch.device | str | None = "cpu"
) -> LatentEncoder | EmbeddingEncoder:
    """Load the autoencoder, or the image and text encoder, at `url`.

    Raises ConfigError for a run of another task, and the errors of `trained_autoencoder` and
    `trained_encoders`.
    """
    if autoencoder_kl.in_folder(url):
        return LatentEncoder(trained_autoencoder(url, device))
    where, snapshot = newest_checkpoint(url)
    traits = run_config.saved_config(snapshot.facts, where).traits
    if traits.reconstructs:
        return LatentEncoder(trained_autoencoder(where, device))
    if traits.embeds:
        return EmbeddingEncoder(trained_encoders(where, device))
    raise ConfigError(
        f"{url} holds {traits.name}, which encodes no images: name a run with task=autoencoder or "
        "task=contrastive, or a diffusers folder of an AutoencoderKL"
    )
