"""PSNR and SSIM against closed forms and against SciPy's filter."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ddpm_ray.evaluation.image_similarity import psnr, ssim


def noise(seed: int, *shape: int) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))


def test_the_psnr_of_a_constant_error_is_known() -> None:
    """48.1308 dB for one level, 20 log10(16) less for 16 levels; also of an error up or down."""
    images = torch.full((3, 4, 5, 3), 100, dtype=torch.uint8)
    errors = torch.tensor([1, 16, -16]).view(3, 1, 1, 1)
    found = psnr(images, (images + errors).to(torch.uint8))
    assert found.tolist() == pytest.approx([48.130804, 24.048404, 24.048404], abs=1e-6)


def test_equal_images_have_a_finite_psnr_above_all_others() -> None:
    images = noise(0, 1, 6, 6, 3)
    other = images.clone()
    other[0, 2, 3, 1] ^= 1
    assert psnr(images, images).item() == psnr(images, other).item()
    assert math.isfinite(psnr(images, images).item())


def test_the_ssim_of_two_constant_images_is_that_of_their_luminances() -> None:
    """(2 ab + c) / (a^2 + b^2 + c) with c = 6.5025, worked out by hand for 100 and 110."""
    a, b = (torch.full((1, 12, 13, 1), level, dtype=torch.uint8) for level in (100, 110))
    assert ssim(a, b).item() == pytest.approx(22006.5025 / 22106.5025, abs=1e-9)


def test_ssim_is_1_of_itself_and_falls_with_noise() -> None:
    images = noise(1, 2, 20, 16, 3)
    assert ssim(images, images).tolist() == pytest.approx([1, 1], abs=1e-12)
    near = (images // 2 + 64).to(torch.uint8)
    assert bool((ssim(images, noise(2, 2, 20, 16, 3)) < ssim(images, near)).all())


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_what_scipys_gaussian_filter_gives(channels: int) -> None:
    """As scikit-image computes it: filtered whole, then cropped by half a window."""
    x, y = noise(3, 2, 24, 17, channels), noise(4, 2, 24, 17, channels) // 2
    wanted = []
    for one, other in zip(x.double().numpy(), y.double().numpy(), strict=True):
        of_channels = []
        for a, b in zip(one.transpose(2, 0, 1), other.transpose(2, 0, 1), strict=True):

            def smooth(values: np.ndarray) -> np.ndarray:
                return np.asarray(gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5])

            u, v = smooth(a), smooth(b)
            uu, vv, uv = smooth(a * a) - u * u, smooth(b * b) - v * v, smooth(a * b) - u * v
            c_1, c_2 = 2.55**2, 7.65**2
            top = (2 * u * v + c_1) * (2 * uv + c_2)
            of_channels.append((top / ((u * u + v * v + c_1) * (uu + vv + c_2))).mean())
        wanted.append(np.mean(of_channels))
    assert ssim(x, y).tolist() == pytest.approx(wanted, abs=1e-10)


def test_images_below_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match="a side of 10 pixels; SSIM needs at least 11"):
        ssim(noise(0, 1, 10, 12, 3), noise(1, 1, 10, 12, 3))
