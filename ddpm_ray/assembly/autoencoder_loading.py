"""Load a trained autoencoder from a checkpoint or a diffusers folder."""

import hashlib
from pathlib import Path

import torch

from ddpm_ray.assembly import networks, run_config
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint, usable_device
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.sampling.autoencoder import TrainedAutoencoder
from ddpm_ray.storage import object_store
from ddpm_ray.training import checkpoint_folder


def trained_autoencoder(
    url: str, device: torch.device | str | None = "cpu", ema: str = "ema"
) -> TrainedAutoencoder:
    """Load the autoencoder of the checkpoint at `url`, or of a run's newest checkpoint.

    The weights are the EMA group `ema` of the checkpoint. `url` may also be a local diffusers
    folder of an AutoencoderKL, or of a pipeline with one in vae/. Raises CheckpointError if no
    checkpoint passes verification, ConfigError for a run that trained something else,
    UnsupportedModelError for a diffusers model that Autoencoder cannot represent, and ValueError
    for an unusable device.
    """
    device = usable_device(device)
    if autoencoder_kl.in_folder(url):
        return _of_diffusers(url, device)
    where, snapshot = newest_checkpoint(url, ema)
    config = run_config.saved_config(snapshot.facts, url)
    if not config.traits.reconstructs:
        raise ConfigError(
            f"{url} holds {config.traits.name}, which has no latents: name a run with "
            "task=autoencoder, or a diffusers folder of an AutoencoderKL"
        )
    image_shape = ImageShape(*snapshot.facts["image_shape"])
    network = networks.network(config, image_shape)
    assert isinstance(network, Autoencoder)
    network.load_state_dict(snapshot.tensors[ema])
    sha256 = checkpoint_folder.weights_sha256(where, ema)
    core_s = snapshot.facts.get("core_seconds")
    return _ready(network, device, image_shape, where, sha256, core_s)


def autoencoder_files(url: str) -> dict[str, str]:
    """URLs of the files that `trained_autoencoder(url)` reads, by their names in one folder.

    Raises CheckpointError if there is no autoencoder.
    """
    if autoencoder_kl.in_folder(url):
        return {path.name: str(path) for path in autoencoder_kl.files_of(url)}
    where, _ = newest_checkpoint(url)
    return {
        name: object_store.join(where, name) for name in checkpoint_folder.sampling_files(where)
    }


def _of_diffusers(folder: str, device: torch.device) -> TrainedAutoencoder:
    read = autoencoder_kl.read_folder(folder)
    network = Autoencoder(read.spec)
    network.load_state_dict(read.tensors)
    image_shape = ImageShape(*read.image_size, read.spec.image_channels)
    with Path(read.weights_file).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return _ready(network, device, image_shape, folder, sha256)


def _ready(
    network: Autoencoder,
    device: torch.device,
    image_shape: ImageShape,
    url: str,
    sha256: str,
    core_seconds: float | None = None,
) -> TrainedAutoencoder:
    network.to(device).eval().requires_grad_(False)
    return TrainedAutoencoder(network, image_shape, url, sha256, core_seconds)
