"""Edits of images whose law is known in closed form, and what is the same whatever the size.

All pixels are drawn from one Gaussian, ONE of tests/truth.py, of mean 0.6 and deviation 0.3, of
which the best denoiser is known. Statistical bounds are in standard errors at a fixed seed.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.config.jobs.edit import InpaintingMethod
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.editing import Painting
from ddpm_ray.sampling.sampling import SamplingPlan
from tests.truth import ONE, SCHEDULE

MEAN, DEVIATION = 0.6, 0.3
PLAN = SamplingPlan(
    uniform_steps(1000, 20), SamplingSettings(sampler="ancestral", clip=False, seed=4)
)
SIZE = 8, 8
LEFT = torch.arange(64).view(1, 1, 8, 8) % 8 < 3
FIRST = torch.tensor([0])


def optimum(x_t: Tensor, t: Tensor) -> Tensor:
    """E[epsilon | x_t], pixel by pixel: no sums that a batch could reorder."""
    return ONE.expected_noise(x_t.double().flatten(1), t).view_as(x_t).to(x_t)


GAUSSIAN = Denoiser.of_noise(optimum, SCHEDULE)


def pictures(count: int, *shape: int) -> Tensor:
    draw = torch.randn(count, 1, *shape, generator=torch.Generator().manual_seed(7))
    return MEAN + DEVIATION * draw


class Watched:
    """The optimum, which keeps the x_t and t that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, int]] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x_t.clone(), int(t[0])))
        return optimum(x_t, t)

    @property
    def denoiser(self) -> Denoiser:
        return Denoiser.of_noise(self, SCHEDULE)


@given(
    st.sampled_from(["repaint", "replacement"]),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    st.integers(8, 13),
)
def test_what_is_known_stays_and_the_rest_is_a_function_of_seed_and_index(
    method: InpaintingMethod, index: list[int], width: int
) -> None:
    """Bit by bit, in any company, also where an image is seen in windows."""
    known, mask = pictures(len(index), 8, width), torch.arange(width).view(1, 1, 1, -1) % 3 < 1
    mask = mask.expand(1, 1, 8, width)
    plan, painting = replace(PLAN, steps=(900, 500, 100, 0)), Painting(method, 2, 1)

    def painted(rows: list[int]) -> Tensor:
        i = torch.tensor(index)[rows]
        return editing.inpaint(GAUSSIAN, plan, painting, known[rows], mask, i, SIZE)

    together = painted(list(range(len(index))))
    assert torch.equal(together[..., ::3], known[..., ::3])
    for row in range(len(index)):
        assert torch.equal(together[row], painted([row])[0])
    reseeded = replace(plan, settings=replace(plan.settings, seed=5))
    other = editing.inpaint(GAUSSIAN, reseeded, painting, known, mask, torch.tensor(index), SIZE)
    assert ((other == together) == mask).all()


@pytest.mark.parametrize("painting", [Painting("repaint", 1), Painting("replacement")])
def test_what_is_painted_is_distributed_as_the_data(painting: Painting) -> None:
    """Its pixels are independent of what is known beside them, here of another law."""
    plan, known = replace(PLAN, steps=uniform_steps(1000, 500)), -pictures(64, 8, 8)
    painted = editing.inpaint(GAUSSIAN, plan, painting, known, LEFT, torch.arange(64), SIZE)
    new = painted[..., 3:].double().flatten()
    error = 1 / math.sqrt(len(new))
    assert float(new.mean()) == pytest.approx(MEAN, abs=4 * error * DEVIATION)
    # Fewer steps make DDPM's variance too small: 20 by a third, 500 by a hundredth or two.
    assert float(new.std()) == pytest.approx(DEVIATION, rel=4 * error / math.sqrt(2) + 0.01)


def test_repaint_walks_as_often_as_configured() -> None:
    """3 steps, each stretch of 1 walked twice, by hand: 3, 2, 3, 2, 1, 2, 1, 0."""
    watched, plan = Watched(), replace(PLAN, steps=(3, 2, 1, 0))
    known = pictures(1, 8, 8)
    editing.inpaint(watched.denoiser, plan, Painting("repaint", 2, 1), known, LEFT, FIRST, SIZE)
    assert [t for _, t in watched.asked] == [3, 3, 2, 2, 1]


def test_replacement_takes_known_pixels_along_one_noise() -> None:
    """Under DDIM at eta = 0, x_t is there sqrt(a) known + sqrt(1 - a) noise, from first to last."""
    steps = uniform_steps(600, 20)  # from where there is signal: x_T must hold it as well
    ddim = replace(PLAN.settings, sampler="ddim")
    watched, plan = Watched(), SamplingPlan(steps, ddim)
    known, painting = pictures(2, 8, 8), Painting("replacement")
    editing.inpaint(watched.denoiser, plan, painting, known, LEFT, torch.arange(2), SIZE)
    keep = LEFT.expand_as(known)
    noises = []
    for x_t, t in watched.asked:
        a = float(SCHEDULE.alpha_bar[t])
        noises.append(((x_t - math.sqrt(a) * known) / math.sqrt(1 - a))[keep])
    start = normal(PLAN.settings.seed, Purpose.SAMPLE_START, 0, torch.arange(2), (1, 8, 8))[keep]
    for noise in noises:
        torch.testing.assert_close(noise, start, rtol=0, atol=1e-3)
    assert len(noises) == 20


def test_repaint_takes_the_eta_of_ddim_and_of_ancestral_1() -> None:
    known = pictures(1, 8, 8)

    def painted(**changes: object) -> Tensor:
        plan = replace(PLAN, settings=replace(PLAN.settings, **changes))  # type: ignore[arg-type]
        return editing.inpaint(GAUSSIAN, plan, Painting(resamples=1), known, LEFT, FIRST, SIZE)

    assert torch.equal(painted(), painted(sampler="ddim", eta=1.0))
    assert not torch.equal(painted(), painted(sampler="ddim", eta=0.5))
    for changes in ({"sampler": "unipc"}, {"variance": "fixed_large"}):
        with pytest.raises(ValueError, match=r"repaint supports ancestral and ddim with fixed"):
            painted(**changes)


def of_class(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """A local network: a pixel's noise as if the data were one number for each label."""
    assert conditioning.labels is not None
    shift = conditioning.labels.view(-1, 1, 1, 1) / 4
    return (x_t - shift) * 0.9 * (0.5 + t.view(-1, 1, 1, 1) / 2000)


@pytest.mark.parametrize("edit", ["repaint", "replacement", "image_to_image", "reconstruct"])
def test_windows_of_a_local_network_are_the_canvas(edit: str) -> None:
    """Of guided labels too, which each window needs: windows of any size give the same."""
    denoiser = Denoiser(
        of_class, Parameterization.of("epsilon", SCHEDULE), takes=ConditioningSpec(3)
    )
    settings = replace(PLAN.settings, guidance_scale=2.0, labels=(2, 0))
    plan = SamplingPlan((800, 400, 100, 0), settings)
    images, index = pictures(3, 11, 18), torch.arange(3)
    mask = (torch.arange(11 * 18) % 2 < 1).view(1, 1, 11, 18)

    def edited(height: int, width: int) -> Tensor:
        size = height, width
        match edit:
            case "image_to_image":
                return editing.image_to_image(denoiser, plan, 0.9, images, index, size)
            case "reconstruct":
                return editing.reconstruct(denoiser, (plan, plan), 2, images, index, size)
            case _:
                painting = Painting(edit, 2, 1)  # type: ignore[arg-type]
                return editing.inpaint(denoiser, plan, painting, images, mask, index, size)

    small = edited(4, 4)
    assert small.shape == images.shape
    torch.testing.assert_close(small, edited(7, 5), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(small, edited(3, 18), rtol=1e-3, atol=1e-4)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.integers(0, 20))
def test_windows_are_as_many_as_the_network_sees(
    tall: int, wide: int, more: int, wider: int
) -> None:
    seen = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.shape)
        return x_t * 0

    denoiser = Denoiser.of_noise(network, SCHEDULE)
    images, size = torch.zeros(2, 1, tall + more, wide + wider), (tall, wide)
    plan = replace(PLAN, steps=(9, 0))
    editing.image_to_image(denoiser, plan, 1.0, images, torch.arange(2), size)
    ((rows, *_, height, width),) = seen
    assert rows == 2 * editing.windows(tall + more, wide + wider, size)
    assert (height, width) == size


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.7, 1.0])
def test_a_variation_keeps_as_much_as_the_flow_of_a_gaussian_does(strength: float) -> None:
    """Along the flow (x - mean) / deviation is kept, so of the image a share is left, as a slope.

    With a = alpha_bar at strength T it is deviation sqrt(a) / sqrt(a deviation^2 + 1 - a), 0.98 at
    strength 0.05 and 0.00 at 1. The rest is new; its deviation has sqrt(1 - a) in sqrt(a)'s place.
    """
    plan = SamplingPlan(uniform_steps(1000, 200), replace(PLAN.settings, sampler="ddim"))
    images = pictures(64, 8, 8)
    end = editing.image_to_image(GAUSSIAN, plan, strength, images, torch.arange(64), SIZE)
    a = float(SCHEDULE.alpha_bar[round(1000 * strength)])
    scale = DEVIATION / math.sqrt(a * DEVIATION**2 + 1 - a)
    x, y = images.double().flatten() - MEAN, end.double().flatten() - MEAN
    kept, fresh = scale * math.sqrt(a), scale * math.sqrt(1 - a)
    error = 1 / math.sqrt(len(x))
    assert float(x @ y / (x @ x)) == pytest.approx(kept, abs=4 * error * fresh / DEVIATION + 0.01)
    assert float((y - kept * x).std()) == pytest.approx(fresh, rel=4 * error + 0.02)


def test_images_between_two_have_the_contrast_of_the_data() -> None:
    """On the arc; along a straight line the middle would have 0.71 of it."""
    shares = torch.linspace(0, 1, 5, dtype=torch.float64)
    plan = replace(PLAN, steps=uniform_steps(1000, 100))
    way = editing.interpolate_samples(GAUSSIAN, plan, (3, 8), shares, ImageShape(64, 64, 1), "cpu")
    assert way.shape == (5, 1, 64, 64)
    for image in way:
        assert float(image.std()) == pytest.approx(DEVIATION, rel=4 / math.sqrt(2 * 4096) + 0.01)
    first, last = way[0] - MEAN, way[4] - MEAN
    for image, share in zip(way, shares.tolist(), strict=True):
        along = float((first * (image - MEAN)).sum() / first.square().sum())
        assert along == pytest.approx(math.cos(math.pi / 2 * share), abs=0.05)
    assert abs(float((first * last).mean())) < 4 * DEVIATION**2 / 64


def test_more_steps_and_iterations_bring_an_image_back() -> None:
    images = pictures(3, 8, 8)

    def error(steps: int, iterations: int) -> float:
        plan = replace(PLAN, steps=uniform_steps(1000, steps))
        back = editing.reconstruct(
            GAUSSIAN, (plan, plan), iterations, images, torch.arange(3), SIZE
        )
        return float((back - images).abs().max())

    few, many, again = error(20, 1), error(200, 1), error(20, 6)
    assert many < few / 3
    assert again < few / 10
    assert again < 1 / 127.5


def test_a_canvas_holds_the_image_and_says_where() -> None:
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4, 1) + 1
    images.flags.writeable = False  # as of a file
    canvas, mask = editing.outpainting_canvas(images, 1, 2, 0, 5)
    assert (canvas.shape, mask.shape) == ((2, 6, 9, 1), (6, 9))
    assert canvas.dtype == np.uint8
    assert np.array_equal(canvas[:, 1:4, :4], images)
    assert mask.sum() == 12
    assert mask[1:4, :4].all()
    assert canvas[:, ~mask].max() == 0


def test_fit_is_measured_in_grey_levels_and_against_the_seams_neighbours() -> None:
    known = np.zeros((1, 4, 4, 1), np.uint8)
    mask = np.zeros((4, 4), bool)
    mask[:, :2] = True
    assert editing.fit(known, known, mask) == {"known_error": 0, "seam": None}
    result = known.copy()
    result[0, :, 1] = 3  # steps of 3 and, at the seam, of 7 - 3; the third is of 2
    result[0, :, 2:, 0] = [7, 9]
    # By hand: across 4; elsewhere 4 of 3, 4 of 2 and 12 of 0 (down the columns), of 20.
    assert editing.fit(result, known, mask) == {"known_error": 3, "seam": pytest.approx(4)}
