"""Images through an autoencoder and back."""

import torch
from torch import Tensor

from ddpm_ray.data.codec import PIXELS
from ddpm_ray.models.autoencoder import Autoencoder


@torch.no_grad()
def round_trip(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Decode the posterior means of uint8 images [B, H, W, C] on the model's device.

    Returns the reconstructions, uint8 [B, H, W, C], and the KL of each image's latent channels in
    nats, float32 [B, c], both on that device. The result is deterministic: no latent is drawn.
    Raises ValueError if a reconstruction is not finite.
    """
    posterior = model.encode(PIXELS.encode(images))
    decoded = PIXELS.decode(model.decode(posterior.mean))
    return torch.from_numpy(decoded).to(images.device), posterior.kl_by_channel()
