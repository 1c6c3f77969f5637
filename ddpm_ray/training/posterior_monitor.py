"""Metrics of an autoencoder's training steps, and the warning of a collapsed posterior."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_ray.models.autoencoder import IN_USE_NATS, channels_in_use

log = logging.getLogger(__name__)

FIRST_CHECKED_STEP = 200  # an untrained encoder uses no channel


class PosteriorMonitor:
    """The `metrics_buffer.Terms` of an autoencoder.

    The terms of an image are its reconstruction loss, the KL of each of c channels in nats per
    latent value and, with an adversary, the adversarial loss, the discriminator's loss and the
    adversarial weight. At the end of each window of steps, a warning is logged if fewer channels
    are in use than at the end of the window before.
    """

    def __init__(
        self, latent_shape: tuple[int, int, int], kl_weight: float, *, adversary: bool
    ) -> None:
        self._channels, height, width = latent_shape
        self._values, self._kl_weight, self._adversary = height * width, kl_weight, adversary
        self.count = 1 + self._channels + (3 if adversary else 0)
        self._in_use = self._channels  # number of channels in use at the end of the newest window
        self._unused: Sequence[int] = ()  # channels without use in the newest row

    def metrics(self, means: Tensor, step: int) -> dict[str, float]:
        """Metrics of one step, from its mean terms."""
        kl = means[1 : 1 + self._channels]
        in_use = channels_in_use(kl)
        self._unused = torch.nonzero(~in_use).flatten().tolist()
        row = {
            "train/reconstruction": float(means[0]),
            "train/kl_bits": float(kl.sum()) * self._values / math.log(2),
            "train/channels_in_use": float(in_use.sum()),
        }
        if self._adversary:
            adversarial, hinge, weight = means[1 + self._channels :].tolist()
            row |= {
                "train/adversarial": adversarial,
                "train/discriminator": hinge,
                "train/adversarial_weight": weight,
            }
        return row

    def end_window(self, step: int, row: dict[str, float], *, is_main: bool) -> None:
        """Log a warning if the row of `step` has fewer channels in use than the window before."""
        if step < FIRST_CHECKED_STEP or "train/channels_in_use" not in row:
            return
        in_use = int(row["train/channels_in_use"])
        if in_use < self._in_use and is_main:
            log.warning(
                "step %d: %d of %d latent channels in use; channels %s have a KL below %g nats per "
                "value, so their posterior has collapsed to the prior. Lower "
                "autoencoder.kl_weight (%g), or use fewer autoencoder.latent_channels",
                step,
                in_use,
                self._channels,
                ", ".join(map(str, self._unused)),
                IN_USE_NATS,
                self._kl_weight,
            )
        self._in_use = in_use
