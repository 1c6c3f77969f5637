"""What a denoiser shows its network beside x_t, and what it makes of its answers."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser, Guidance
from ddpm_ray.sampling.sampling import SamplingPlan, draw
from tests.truth import LINE, SCHEDULE

SHAPE, IMAGE = (1, 2, 2), ImageShape(2, 2, 1)
LINEAR = NoiseSchedule(schedules.linear(40, 1e-3, 0.3))
EPSILON = Parameterization.of("epsilon", LINEAR)
T = torch.tensor([7, 7])


class Seen:
    """A network that keeps what it was shown, and answers with zeros of `channels`."""

    def __init__(self, channels: int = 1) -> None:
        self.channels = channels
        self.x_t: list[Tensor] = []
        self.labels: list[Tensor | None] = []
        self.condition: list[Tensor | None] = []

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        labels, images = conditioning.labels, conditioning.images
        self.x_t.append(x_t.clone())
        self.labels.append(None if labels is None else labels.clone())
        self.condition.append(torch.cat(images, 1) if images else None)
        return 0.1 * x_t.repeat(1, self.channels, 1, 1)


def test_labels_go_by_the_index_in_turn_or_as_wished() -> None:
    for wished, expected in (((), [0, 1, 2, 0, 1]), ((2, 0), [2, 0, 2, 0, 2])):
        network = Seen()
        denoiser = Denoiser(network, EPSILON, takes=ConditioningSpec(num_classes=3))
        plan = SamplingPlan((40, 0), SamplingSettings(labels=wished))
        draw(denoiser, plan, torch.arange(5), IMAGE, "cpu")
        assert [labels.tolist() for labels in network.labels if labels is not None] == [expected]


def test_guidance_shows_each_image_with_its_label_and_without() -> None:
    network = Seen()
    denoiser = Denoiser(network, EPSILON, takes=ConditioningSpec(num_classes=3))
    denoise = denoiser.bind_conditioning(Conditioning(torch.tensor([1, 2])), Guidance(scale=2))
    denoise(torch.ones(2, *SHAPE), T)
    (labels,) = network.labels
    assert labels is not None
    assert labels.tolist() == [1, 2, -1, -1]
    assert network.x_t[0].shape == (4, *SHAPE)


def test_a_model_without_labels_refuses_them() -> None:
    denoiser = Denoiser(Seen(), EPSILON)
    with pytest.raises(ValueError, match="guidance_scale 1 are for models trained with labels"):
        denoiser.bind_conditioning(Conditioning(torch.tensor([0])))
    with pytest.raises(ValueError, match="guidance_scale 3 are for models trained with labels"):
        denoiser.bind_conditioning(guidance=Guidance(scale=3))


def test_a_self_conditioned_network_sees_its_last_estimate_clipped() -> None:
    """First nothing; then x_0 as its own answer, a tenth of x_t, had it."""
    network = Seen()
    denoiser = Denoiser(network, EPSILON, takes=ConditioningSpec(self_conditioning=True))
    denoise = denoiser.bind_conditioning()
    x = torch.tensor([0.3, 5.0]).view(2, 1, 1, 1).expand(2, *SHAPE)
    for _ in range(2):
        denoise(x, T)
    a = float(LINEAR.alpha_bar[7])
    first, second = network.condition
    assert first is not None
    assert second is not None
    assert not first.any()
    expected = (0.3 - math.sqrt(1 - a) * 0.03) / math.sqrt(a)
    assert second[0].flatten().tolist() == pytest.approx([expected] * 4)
    assert (second[1] == 1).all()
    denoiser.bind_conditioning()(x, T)
    assert network.condition[2] is not None
    assert not network.condition[2].any(), "a new walk remembers the one before"


def test_guided_and_self_conditioned_it_keeps_the_two_estimates_apart() -> None:
    network = Seen()
    denoiser = Denoiser(network, EPSILON, takes=ConditioningSpec(2, True))
    denoise = denoiser.bind_conditioning(Conditioning(torch.tensor([0, 1])), Guidance(scale=2))
    for _ in range(2):
        denoise(torch.randn(2, *SHAPE), T)
    assert [c.shape for c in network.condition if c is not None] == [(4, *SHAPE)] * 2


def test_the_low_resolution_image_lies_behind_the_estimate() -> None:
    network, small = Seen(), torch.full((2, *SHAPE), 0.5)
    denoiser = Denoiser(network, EPSILON, takes=ConditioningSpec(0, True, 1))
    denoiser.bind_conditioning(Conditioning(low_resolution=small))(torch.ones(2, *SHAPE), T)
    (condition,) = network.condition
    assert condition is not None
    assert torch.equal(condition, torch.cat([torch.zeros_like(small), small], 1))


def test_each_image_is_shown_its_own_low_resolution_by_its_index() -> None:
    network, bank = Seen(), torch.arange(3.0).view(3, 1, 1, 1).expand(3, *SHAPE)
    denoiser = Denoiser(
        network, EPSILON, takes=ConditioningSpec(0, False, 1), low_resolution_images=bank
    )
    draw(denoiser, SamplingPlan((40, 0)), torch.tensor([5, 0, 4]), IMAGE, "cpu")
    (condition,) = network.condition
    assert condition is not None
    assert condition[:, 0, 0, 0].tolist() == [2, 0, 1]


@pytest.mark.parametrize("pixels, says", [(0, "is not for"), (1, "is for")])
def test_low_resolution_is_shown_to_those_who_want_it_alone(pixels: int, says: str) -> None:
    given = None if pixels else torch.zeros(2, *SHAPE)
    with pytest.raises(ValueError, match=f"{says} super-resolution .* and only to them"):
        Denoiser(Seen(), EPSILON, takes=ConditioningSpec(0, False, pixels)).bind_conditioning(
            Conditioning(low_resolution=given)
        )


def test_edm_shows_its_input_with_unit_variance() -> None:
    """Data of deviation 0.5 at sigma: x_t has the variance a 0.25 + 1 - a."""
    network = Seen()
    denoiser = Denoiser(network, Parameterization.of("edm", LINEAR, sigma_data=0.5))
    a = LINEAR.alpha_bar[7]
    x_t = (a * 0.25 + 1 - a).sqrt().float() * torch.randn(2, 1, 100, 100)
    denoiser.bind_conditioning()(x_t, T)
    assert network.x_t[0].std().item() == pytest.approx(1, abs=0.03)


def test_a_learned_variance_reaches_the_sampler_that_reads_it_alone() -> None:
    denoiser = Denoiser(Seen(2), EPSILON, variance="learned_range")
    whole = tuple(range(40, -1, -1))
    for sampler in ("ddim", "ancestral", "unipc"):
        plan = SamplingPlan(whole, SamplingSettings(sampler=sampler))
        assert draw(denoiser, plan, torch.arange(2), IMAGE, "cpu").shape == (2, *SHAPE)
    plan = SamplingPlan(whole, SamplingSettings(sampler="ancestral", variance="learned"))
    learned = draw(denoiser, plan, torch.arange(2), IMAGE, "cpu")
    plan = SamplingPlan(whole, SamplingSettings(sampler="ancestral"))
    fixed = draw(denoiser, plan, torch.arange(2), IMAGE, "cpu")
    assert not torch.equal(learned, fixed)
    plan = SamplingPlan((40, 0), SamplingSettings(sampler="unipc", variance="learned"))
    with pytest.raises(ValueError, match="unipc has none: use fixed_small"):
        draw(denoiser, plan, torch.arange(2), IMAGE, "cpu")
    plan = SamplingPlan(whole, SamplingSettings(sampler="ancestral", variance="learned"))
    with pytest.raises(ValueError, match="the network predicts none; use fixed_small"):
        draw(Denoiser(Seen(), EPSILON), plan, torch.arange(2), IMAGE, "cpu")


@pytest.mark.parametrize("kind", ["epsilon", "x_0", "v", "mean", "score", "edm"])
def test_its_noise_is_the_expected_noise_whatever_it_predicts(kind: str) -> None:
    """The mixture's optimum in every form is one and the same estimate of the noise."""
    parameterization = Parameterization.of(kind, SCHEDULE)  # type: ignore[arg-type]
    scale = (
        torch.ones_like(SCHEDULE.alpha_bar)
        if parameterization.c_in is None
        else parameterization.c_in
    )

    def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        x_t = x / scale[t].view(-1, 1)
        return parameterization.output_from_x0(x_t, t, LINE.expected_image(x_t, t))

    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    t = torch.full((9,), 600)
    found = Denoiser(network, parameterization).noise()(x_t, t)
    torch.testing.assert_close(found, LINE.expected_noise(x_t, t))


def test_an_own_estimate_carries_no_gradient_from_call_to_call() -> None:
    """Else each call would keep the graphs of all before it."""
    conditions: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        (condition,) = conditioning.images
        conditions.append(condition)
        return 0.5 * x_t + 0.1 * condition

    schedule = NoiseSchedule(schedules.linear(40, 1e-3, 0.3))
    of = Denoiser(
        network,
        Parameterization.of("epsilon", schedule),
        takes=ConditioningSpec(self_conditioning=True),
    )
    x, t = torch.full((2, 1, 2, 2), 0.5, requires_grad=True), torch.tensor([9, 9])
    walk, alone = of.bind_conditioning(), of.unguided()
    for denoise, remembered in ((walk, True), (alone, False)):
        conditions.clear()
        first, second = denoise(x, t), denoise(x, t)
        assert first.requires_grad
        assert second.requires_grad
        assert not any(condition.requires_grad for condition in conditions)
        assert bool(conditions[1].any()) == remembered


def test_labels_reach_the_network_by_every_way() -> None:
    seen: list[list[int]] = []

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.labels is not None
        seen.append(conditioning.labels.tolist())
        return x_t

    schedule = NoiseSchedule(schedules.linear(40, 1e-3, 0.3))
    of = Denoiser(
        network, Parameterization.of("epsilon", schedule), takes=ConditioningSpec(num_classes=3)
    )
    x, t = torch.zeros(3, 1, 2, 2), torch.tensor([9, 9, 9])
    conditioning = Conditioning(torch.tensor([2, -1, 0]))
    of.bind_conditioning(conditioning)(x, t)
    of.unguided(conditioning)(x, t)
    of.noise(conditioning)(x, t)
    of.bind_conditioning(conditioning, Guidance(2.0))(x, t)
    assert seen == [[2, -1, 0]] * 3 + [[2, -1, 0, -1, -1, -1]]
