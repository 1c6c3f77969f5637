"""Load a trained classifier of noisy images, which guides a denoiser."""

import torch

from ddpm_ray.assembly import networks, run_config
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.codec import Codec, diffused_shape
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.classifier import NoisyClassifier
from ddpm_ray.sampling.guidance_models import require_same_x_0


def trained_classifier(
    url: str, device: torch.device | str = "cpu", guides: Codec | None = None
) -> NoisyClassifier:
    """Load the noisy-image classifier of a run with task=classifier.

    `guides` is the codec of a model that it shall guide. Raises CheckpointError, NewerFormatError,
    ConfigError for a run that trained another kind of model, ValueError for a codec unlike
    `guides`.
    """
    where, snapshot = newest_checkpoint(url, "ema")
    config = run_config.saved_config(snapshot.facts, url)
    if not config.traits.predicts_labels:
        raise ConfigError(f"{url} holds no classifier: train one with task=classifier")
    codec = run_config.saved_codec(snapshot.facts, where)
    if guides is not None:
        require_same_x_0(guides, codec)
    shape = diffused_shape(codec, ImageShape(*snapshot.facts["image_shape"]))
    network = networks.network(config, shape)
    assert isinstance(network, NoisyClassifier)
    network.load_state_dict(snapshot.tensors["ema"])
    return network.to(device).eval().requires_grad_(False)
