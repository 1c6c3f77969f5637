"""LPIPS: the perceptual distance of the package lpips, weights learned from judgments.

(Zhang et al. 2018, arXiv:1801.03924; its VGG16 form, as Rombach et al. 2022 train autoencoders.)
The package is optional. It needs torchvision, and downloads the weights of VGG16 at its first use.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEAST_PIXELS = 16  # VGG16 halves each side four times


class NoLpipsError(ValueError):
    """The package lpips is missing, or does not load; args are (reason, torch's version)."""

    def __str__(self) -> str:
        reason, version = self.args
        return (
            f"autoencoder.perceptual is lpips, but this package does not load ({reason}): install "
            f"it (pip install 'ddpm-ray[lpips]') with the torchvision that belongs to torch "
            f"{version}, or use autoencoder.perceptual=inception"
        )


@dataclass(frozen=True)
class LpipsDistance:
    """The distance of images x and x_hat [B, 3 or 1, H, W] in [-1, 1], as float32 [B]."""

    network: nn.Module  # lpips.LPIPS in eval mode, parameters frozen

    def __call__(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """The distance [B], with a gradient for x_hat."""
        rgb = (one.expand(-1, 3, -1, -1) for one in (x, x_hat))
        distance: Tensor = self.network(*rgb)  # [B, 1, 1, 1]
        return distance.float().flatten()


def require_lpips() -> None:
    """Raise NoLpipsError unless the package lpips can be imported."""
    try:
        import lpips  # noqa: F401
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NoLpipsError(reason, torch.__version__) from error


def load_lpips(device: torch.device) -> LpipsDistance:
    """The distance on `device`. Raises NoLpipsError, and OSError if VGG16's weights are missing."""
    require_lpips()
    import lpips

    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights before it loads them
            network = lpips.LPIPS(net="vgg", verbose=False)
    except OSError as error:  # no network, no disk
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"autoencoder.perceptual is lpips, and the weights of VGG16 are not fetched "
            f"({reason}): put them into torch's cache (TORCH_HOME) on each node"
        ) from error
    return LpipsDistance(network.to(device).eval().requires_grad_(False))
