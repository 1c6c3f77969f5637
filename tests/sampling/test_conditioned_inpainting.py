"""Inpainting by a network that sees the known part, held to the conditional law of Gaussian data.

The data are rows of 8 pixels, a stationary first-order autoregression of variance 1. The denoiser
is the exact E[x_0 | x_t, known part], which is linear, so what a deterministic sampler paints is an
affine function of the noise and of the known pixels. Its coefficients are found by least squares,
without Monte Carlo: they are the mean and the covariance of what is painted.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.config.jobs.edit import InpaintingMethod
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.conditioning import Conditioning, known_part
from ddpm_ray.diffusion.inpainting import in_windows
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser, Guidance
from ddpm_ray.sampling.editing import Painting
from ddpm_ray.sampling.sampling import SamplingPlan, draw, sampling_plan
from tests.truth import SCHEDULE

PIXELS, IMAGES, SEED = 8, 40, 4
SETTINGS = SamplingSettings(
    sampler="unipc", spacing="log_snr", steps=40, clip=False, seed=SEED, batch_size=IMAGES
)
PLAN = sampling_plan(SETTINGS, SCHEDULE)
INDEX = torch.arange(IMAGES)
EPSILON = Parameterization.of("epsilon", SCHEDULE)


def covariance(rho: float) -> Tensor:
    place = torch.arange(PIXELS, dtype=torch.float64)
    return rho ** (place[:, None] - place).abs()


def conditional(rho: float, known: Tensor) -> tuple[Tensor, Tensor]:
    """Of the unknown pixels given the known ones: regression matrix and covariance."""
    cov, u, k = covariance(rho), ~known, known
    regression = cov[u][:, k] @ torch.linalg.inv(cov[k][:, k])
    return regression, cov[u][:, u] - regression @ cov[k][:, u]


class Exact:
    """The expected noise given x_t and the known part, in closed form."""

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        given = conditioning.known
        assert given is not None  # all 0 if nothing is known
        mask = given[0, 1, 0].bool()
        assert (given[:, 1, 0].bool() == mask).all()
        regression, left = conditional(self.rho, mask)
        x, known = x_t[:, 0, 0].double(), given[:, 0, 0].double()[:, mask]
        a = SCHEDULE.alpha_bar[t][:, None]
        mean = known @ regression.T
        spread = a[0] * left + (1 - a[0]) * torch.eye(len(left))
        gain = a[0].sqrt() * left @ torch.linalg.inv(spread)
        x_0 = torch.empty_like(x)
        x_0[:, mask] = known
        x_0[:, ~mask] = mean + (x[:, ~mask] - a.sqrt() * mean) @ gain.T
        return ((x - a.sqrt() * x_0) / (1 - a).sqrt()).view_as(x_t).to(x_t)


def denoiser(rho: float) -> Denoiser:
    return Denoiser(Exact(rho), EPSILON, takes=ConditioningSpec(known_pixels=True))


def painted_law(rho: float, method: InpaintingMethod, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of what is painted: its regression on the known pixels, and its covariance given them."""
    known = torch.randn(IMAGES, 1, 1, PIXELS, generator=torch.Generator().manual_seed(1))
    plan = PLAN
    if method == "replacement":
        plan = replace(plan, settings=replace(SETTINGS, sampler="ddim"))
    painted = editing.inpaint(
        denoiser(rho), plan, Painting(method), known, mask.view(1, 1, 1, -1), INDEX, (1, PIXELS)
    )[:, 0, 0].double()
    assert torch.equal(painted[:, mask].float(), known[:, 0, 0][:, mask])
    x_T = normal(SEED, Purpose.SAMPLE_START, 0, INDEX, (PIXELS,)).double()
    inputs = torch.cat([known[:, 0, 0][:, mask].double(), x_T], 1)
    found = torch.linalg.lstsq(inputs, painted[:, ~mask]).solution
    assert (inputs @ found - painted[:, ~mask]).abs().max() < 1e-3  # it is linear
    regression, of_noise = found[: int(mask.sum())].T, found[int(mask.sum()) :]
    return regression, of_noise.T @ of_noise


@pytest.mark.parametrize(
    "rho, known", [(0.5, "11110000"), (0.9, "11110000"), (0.9, "00111100"), (0.9, "10010110")]
)
def test_what_is_painted_has_the_conditional_law(rho: float, known: str) -> None:
    """To 0.01; by replacement, the unconditional denoiser misses it by 0.1 and more."""
    mask = torch.tensor([one == "1" for one in known])
    regression, left = conditional(rho, mask)
    found = painted_law(rho, "auto", mask)
    torch.testing.assert_close(found[0], regression, rtol=0, atol=0.01)
    torch.testing.assert_close(found[1], left, rtol=0, atol=0.01)
    cheap = painted_law(rho, "replacement", mask)
    assert (cheap[0] - regression).abs().max() > 0.1
    assert (cheap[1] - left).abs().max() > 0.1


def test_without_a_known_part_whole_images_have_the_law_of_the_data() -> None:
    """The same model draws them for grids and scores: nothing is known, and all inputs are 0."""
    x = draw(denoiser(0.9), PLAN, INDEX, ImageShape(1, PIXELS, 1), "cpu")[:, 0, 0].double()
    x_T = normal(SEED, Purpose.SAMPLE_START, 0, INDEX, (PIXELS,)).double()
    gain = torch.linalg.lstsq(x_T, x).solution
    torch.testing.assert_close(gain.T @ gain, covariance(0.9), rtol=0, atol=0.01)


class Asked:
    """A network that keeps its inputs; its answer is 0."""

    def __init__(self) -> None:
        self.x_t: list[Tensor] = []
        self.conditioning: list[Conditioning] = []

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.x_t.append(x_t.clone())
        self.conditioning.append(conditioning)
        return torch.zeros_like(x_t)


@given(st.integers(4, 11), st.integers(4, 11), st.booleans())
def test_each_window_sees_its_own_known_part(height: int, width: int, guided: bool) -> None:
    """Also where guidance passes each window twice, with and without its label."""
    network, classes = Asked(), 2 if guided else 0
    takes = ConditioningSpec(num_classes=classes, known_pixels=True)
    settings = replace(SETTINGS, guidance_scale=2.0 if guided else 1.0)
    known = torch.randn(3, 1, height, width, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(3, 1, height, width, generator=torch.Generator().manual_seed(3)) < 0.5
    of = Denoiser(network, EPSILON, takes=takes)
    plan = SamplingPlan((1000, 0), replace(settings, sampler="ddim"))
    editing.inpaint(of, plan, Painting(), known, mask, torch.arange(3), (4, 4))
    found = network.conditioning[0].known
    assert found is not None
    x_T = normal(SEED, Purpose.SAMPLE_START, 0, torch.arange(3), (1, height, width))
    for seen, whole in ((network.x_t[0], x_T), (found, known_part(known, mask))):
        cut = in_windows(whole, (4, 4), (2, 2))
        assert torch.equal(seen, torch.cat([cut, cut]) if guided else cut)


def test_nothing_of_an_unknown_pixel_is_shown() -> None:
    known, mask = torch.tensor([[[[0.5, -0.25]]]]), torch.tensor([[[[True, False]]]])
    for unknown in (7.0, float("nan")):
        known[..., 1] = unknown
        assert known_part(known, mask).flatten().tolist() == [0.5, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(scale=3)])
def test_self_conditioning_and_guidance_leave_the_known_part(guidance: Guidance) -> None:
    """The known part lies behind the estimate; if none is given, it is 0 in each pass."""
    network, part = Asked(), torch.rand(2, 2, 4, 4)
    takes = ConditioningSpec(num_classes=3, self_conditioning=True, known_pixels=True)
    of, labels = Denoiser(network, EPSILON, takes=takes), torch.tensor([0, 2])
    times = 2 if guidance.scale != 1 else 1
    for shown, wanted in ((part, part), (None, torch.zeros_like(part))):
        denoise = of.bind_conditioning(Conditioning(labels, known=shown), guidance)
        denoise(torch.rand(2, 1, 4, 4), torch.tensor([9, 9]))
        images = torch.cat(network.conditioning[-1].images, 1)
        assert images.shape == (2 * times, 3, 4, 4)
        assert torch.equal(images[:, 1:], torch.cat([wanted] * times))


def test_a_model_that_cannot_see_known_pixels_refuses_them() -> None:
    of, known = Denoiser(Asked(), EPSILON), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"not trained to see known pixels .* method='repaint'"):
        of.bind_conditioning(Conditioning(known=known_part(known, known > 0)))
    with pytest.raises(ValueError, match="method is 'conditioned', but the model was trained with"):
        editing.inpaint(of, PLAN, Painting("conditioned"), known, known > 0, INDEX[:1], (4, 4))
