"""PSNR and SSIM of pairs of images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.data.codec import channels_first

LEVELS = 255.0  # of uint8
WINDOW, SIGMA = 11, 1.5  # pixels of SSIM's Gaussian window
K_1, K_2 = 0.01, 0.03


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [N], of uint8 images [N, H, W, C].

    10 log10(255^2 / mean squared difference). For equal images this is infinite; they get the ratio
    of images that differ by one level in one value.
    """
    difference = images.double() - others.double()
    squares = difference.square().flatten(1).sum(1).clamp(min=1)
    return 10 * torch.log10(LEVELS**2 * images[0].numel() / squares)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity, float64 [N] in [-1, 1], of uint8 images [N, H, W, C].

    (Wang et al. 2004, "Image quality assessment", eq. 13, with an 11 x 11 Gaussian window of
    sigma 1.5, K_1 = 0.01 and K_2 = 0.03.) The mean over channels and over the places where the
    window lies within the image. Raises ValueError for images smaller than the window.
    """
    if (least := min(images.shape[1:3])) < WINDOW:
        raise ValueError(f"images have a side of {least} pixels; SSIM needs at least {WINDOW}")
    x, y = (channels_first(each).double() for each in (images, others))
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x = _smooth(x * x) - mean_x.square()
    variance_y = _smooth(y * y) - mean_y.square()
    covariance = _smooth(x * y) - mean_x * mean_y
    c_1, c_2 = (K_1 * LEVELS) ** 2, (K_2 * LEVELS) ** 2
    luminance = (2 * mean_x * mean_y + c_1) / (mean_x.square() + mean_y.square() + c_1)
    structure = (2 * covariance + c_2) / (variance_x + variance_y + c_2)
    return (luminance * structure).flatten(1).mean(1)


def _smooth(x: Tensor) -> Tensor:
    """Gaussian means of x [N, C, H, W], of windows within the image: [N, C, H - 10, W - 10]."""
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weight = torch.exp(-at.square() / (2 * SIGMA**2))
    weight = (weight / weight.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(x, weight, groups=x.shape[1])
    return F.conv2d(rows, weight.transpose(2, 3), groups=x.shape[1])
