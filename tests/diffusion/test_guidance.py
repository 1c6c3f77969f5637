"""Guidance against mixtures whose guided scores and conditional laws are known; see tests/truth.py.

Statistical bounds are 4 standard errors, or p > 1e-3, at a fixed seed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.choices import Prediction, ReverseVariance
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, posterior, schedules, score
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.guidance import autoguided, classifier_free, classifier_guided
from ddpm_ray.diffusion.samplers import ancestral, ddim
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from tests.diffusion.test_parameterization import KINDS
from tests.truth import LINE, SCHEDULE, THREE, Mixture, standard

PARTS = [Mixture(torch.ones(1), THREE.mean[k : k + 1], THREE.variance[k : k + 1]) for k in range(3)]
EPSILON = Parameterization.of("epsilon", SCHEDULE)
LEVELS = NoiseSchedule(torch.tensor([1, 0.8, 0.5, 0.2], dtype=torch.float64))  # sigma 1/2, 1, 2
T_4, LABELS = torch.tensor([30, 300, 700, 950]), torch.tensor([2, 0, 1, 1])
X_4 = torch.tensor([[0.3, -0.5], [-1.5, 0.7], [2.0, 2.5], [0.1, -1.2]], dtype=torch.float64)


def by_label(
    parameterization: Parameterization, x_t: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """The best network for THREE with its components as classes, and -1 for none."""
    labels = conditioning.labels
    assert labels is not None
    images = torch.stack([law.expected_image(x_t, t) for law in (*PARTS, THREE)])
    return parameterization.output_from_x0(x_t, t, images[labels, torch.arange(len(labels))])


def log_class(k: int, x_t: Tensor, t: Tensor) -> Tensor:
    return THREE.log_joint(x_t, SCHEDULE.alpha_bar[t].view(-1, 1, 1)).log_softmax(1)[:, k]


class Recorder:
    """A network that looks at everything, and keeps what it was asked."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []
        self.places: set[int] = set()

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        labels = conditioning.labels
        assert labels is not None
        assert len(x_t) == len(t) == len(labels)
        self.labels.append(labels.tolist())
        self.places.add(x_t.data_ptr())
        shape = (-1, *[1] * (x_t.ndim - 1))
        return torch.tanh(x_t * (1 + labels.view(shape) % 5) + t.view(shape) / 9)


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 2, 4, 4, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [-0.5, 0, 0.4, 1, 3])
def test_classifier_free_guidance_adds_scores(kind: Prediction, scale: float) -> None:
    """For mixtures the score behind the answer is closed form (Ho and Salimans 2022, eq. 6)."""
    parameterization = Parameterization.of(kind, SCHEDULE)
    denoise = classifier_free(partial(by_label, parameterization), Conditioning(LABELS), scale)
    a = SCHEDULE.alpha_bar[T_4].view(-1, 1, 1)
    free = THREE.score(X_4, a)
    own = torch.stack([PARTS[k].score(X_4, a)[i] for i, k in enumerate(LABELS)])
    guided = score(parameterization, denoise, X_4, T_4)
    torch.testing.assert_close(guided, free + scale * (own - free), rtol=1e-8, atol=1e-8)


def test_the_network_is_called_once_and_twice_as_wide_only_where_it_must_be() -> None:
    t, labels = torch.tensor([2, 2, 2]), torch.tensor([0, 2, 1])
    for scale, expected in ((1.0, [0, 2, 1]), (0.0, [-1, -1, -1]), (2.0, [0, 2, 1, -1, -1, -1])):
        network = Recorder()
        denoise = classifier_free(network, Conditioning(labels), scale)
        for _ in range(3):
            denoise(images(3), t)
        assert network.labels == [expected] * 3


def test_the_wide_batch_has_one_buffer_that_serves_in_any_mode_and_shape() -> None:
    network, t = Recorder(), torch.tensor([2, 2, 2])
    denoise = classifier_free(network, Conditioning(torch.tensor([0, 2, 1])), 2.0)
    x = images(3)
    with torch.inference_mode():
        inside = denoise(x, t)
    assert torch.equal(denoise(x, t), inside)
    assert len(network.places) == 1
    larger = torch.cat([x, x], 3)
    assert torch.equal(denoise(larger, t)[..., :4], inside)
    assert denoise(larger.float(), t).dtype == torch.float32
    with pytest.raises(RuntimeError, match="out="):
        denoise(x.float().requires_grad_(), t)


def test_the_wide_batch_keeps_the_memory_format() -> None:
    seen = []

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(x_t.is_contiguous(memory_format=torch.channels_last))
        return x_t

    x = images(3).contiguous(memory_format=torch.channels_last)
    denoise = classifier_free(network, Conditioning(torch.tensor([0, 2, 1])), 2.0)
    for _ in range(2):
        denoise(x, torch.tensor([2, 2, 2]))
    assert seen == [True, True]


def test_guidance_stays_within_its_interval_of_sigma() -> None:
    """By hand: steps 1, 2, 3 have sigma 1/2, 1, 2; the upper end belongs, the lower does not."""
    x, labels, parameterization = (
        images(3),
        torch.tensor([0, 2, 1]),
        Parameterization.of("v", LEVELS),
    )
    for interval, guided in (((0.6, 1.0), {2}), ((1.0, 3.0), {3}), ((0.0, 9.0), {1, 2, 3})):
        for t in (1, 2, 3):
            network = Recorder()
            denoise = classifier_free(
                network,
                Conditioning(labels),
                3.0,
                interval=interval,
                parameterization=parameterization,
            )
            denoise(x, torch.full((3,), t))
            assert [len(asked) for asked in network.labels] == [6 if t in guided else 3]


def test_images_at_different_steps_are_guided_each_by_its_own() -> None:
    x, t, labels = images(3), torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1])
    options: dict[str, Any] = {
        "interval": (0.6, 1.0),
        "parameterization": Parameterization.of("v", LEVELS),
        "rescale": 0.5,
    }
    together = classifier_free(Recorder(), Conditioning(labels), 3.0, **options)(x, t)
    for i in range(3):
        one = slice(i, i + 1)
        alone = classifier_free(Recorder(), Conditioning(labels[one]), 3.0, **options)(
            x[one], t[one]
        )
        torch.testing.assert_close(together[one], alone)


@given(st.floats(1.5, 9), st.floats(0, 1))
def test_rescale_leads_back_to_the_conditional_deviation(scale: float, phi: float) -> None:
    """It only stretches, and its share phi of the way is linear (Lin et al. 2023, eq. 14 to 16)."""
    x, t, labels = images(3), torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1])

    def guided(scale: float, phi: float) -> Tensor:
        return classifier_free(Recorder(), Conditioning(labels), scale, rescale=phi)(x, t)

    plain, full = guided(scale, 0), guided(scale, 1)
    torch.testing.assert_close(full.flatten(1).std(1), guided(1, 0).flatten(1).std(1))
    stretch = (full / plain).flatten(1)
    torch.testing.assert_close(stretch, stretch[:, :1].expand_as(stretch))
    torch.testing.assert_close(guided(scale, phi), plain + phi * (full - plain))


def test_a_learned_variance_stays_the_conditional_one() -> None:
    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.labels is not None
        raw = (conditioning.labels / 5).view(-1, 1, 1, 1).expand_as(x_t)
        return torch.cat([Recorder()(x_t, t, conditioning), raw], 1)

    x, t, labels = images(3), torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1])
    denoise = classifier_free(network, Conditioning(labels), 3.0, rescale=0.3)
    mean = classifier_free(Recorder(), Conditioning(labels), 3.0, rescale=0.3)(x, t)
    torch.testing.assert_close(denoise(x, t)[:, :2], mean)
    assert torch.equal(denoise(x, t)[:, 2:], network(x, t, Conditioning(labels))[:, 2:])

    def own(x_t: Tensor, t: Tensor) -> Tensor:
        return network(x_t, t, Conditioning(labels))

    def slope_1(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.sum((1, 2, 3))

    pushed = classifier_guided(own, slope_1, Parameterization.of("epsilon", LEVELS), 2.0)(x, t)
    size = (1 - LEVELS.alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(pushed[:, :2], own(x, t)[:, :2] - 2 * size)
    assert torch.equal(pushed[:, 2:], own(x, t)[:, 2:])
    end = ancestral(
        X0Estimator(LEVELS, denoise, clip=None),
        x,
        (3, 2, 1, 0),
        noise=lambda t: x,
        variance="learned_range",
    )
    assert end.shape == x.shape


def test_autoguidance_leads_away_from_the_weak_network() -> None:
    """Towards LINE's score and beyond, from that of a broader law: closed form."""
    broad = Mixture(LINE.weight, LINE.mean, LINE.variance + 1)
    x, t = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None], torch.full((7,), 300)
    a = SCHEDULE.alpha_bar[t].view(-1, 1, 1)
    denoise = autoguided(LINE.expected_noise, broad.expected_noise, 1.8)
    expected = 1.8 * LINE.score(x, a) - 0.8 * broad.score(x, a)
    torch.testing.assert_close(score(EPSILON, denoise, x, t), expected)


@pytest.mark.parametrize("constant", [0.0, 0.25])
def test_rescale_leaves_an_answer_without_contrast_as_it_is(constant: float) -> None:
    """As that of a network before its first step, whose last layer is 0: a deviation over 0."""
    x, t = images(2), torch.tensor([1, 2])

    def flat(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.full_like(x_t, constant)

    guided = classifier_free(flat, Conditioning(torch.tensor([1, 2])), 3.0, rescale=0.7)(x, t)
    assert torch.equal(guided, torch.full_like(x, constant))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_true_classifier_leads_to_the_conditional_answer(kind: Prediction, k: int) -> None:
    """Bayes: slope of log p(x_t | k) = slope of log p(x_t) + slope of log p(k | x_t)."""
    parameterization = Parameterization.of(kind, SCHEDULE)
    free = partial(by_label, parameterization, conditioning=Conditioning(torch.full((4,), -1)))
    guided = classifier_guided(free, partial(log_class, k), parameterization, 1.0)(X_4, T_4)
    expected = by_label(parameterization, X_4, T_4, Conditioning(torch.full((4,), k)))
    torch.testing.assert_close(guided, expected, rtol=1e-8, atol=1e-8)


def assert_drawn_from_component(samples: Tensor, k: int) -> None:
    """Each axis's whole law, and no sample of another component."""
    law = PARTS[k]
    for axis in range(2):
        m, s = float(law.mean[0, axis]), float(law.variance[0, axis].sqrt())
        error = s / math.sqrt(len(samples))
        assert abs(samples[:, axis].mean() - m) < 4 * error
        assert scipy.stats.kstest(samples[:, axis].numpy(), "norm", (m, s)).pvalue > 1e-3
    assert (THREE.component(samples, torch.ones(1, 1, 1)).argmax(1) == k).all()


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("way", ["classifier", "classifier-free"])
def test_guided_at_scale_1_ddim_draws_from_the_class(way: str, k: int) -> None:
    count = 4000
    x_T = standard(count, torch.Generator().manual_seed(k), THREE)
    denoise = (
        classifier_guided(THREE.expected_noise, partial(log_class, k), EPSILON, 1.0)
        if way == "classifier"
        else classifier_free(partial(by_label, EPSILON), Conditioning(torch.full((count,), k)), 1.0)
    )
    samples = ddim(X0Estimator(SCHEDULE, denoise, clip=None), x_T, uniform_steps(1000, 200))
    assert_drawn_from_component(samples, k)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_shifted_means_draw_from_the_class(variance: ReverseVariance) -> None:
    """Algorithm 1 of Dhariwal and Nichol 2021 with every step."""
    assert variance in ("fixed_small", "fixed_large")
    generator, steps = torch.Generator().manual_seed(3), uniform_steps(1000, 1000)
    denoise = classifier_guided(
        THREE.expected_noise, partial(log_class, 1), EPSILON, 1.0, steps=steps, variance=variance
    )
    samples = ancestral(
        X0Estimator(SCHEDULE, denoise, clip=None),
        standard(3000, generator, THREE),
        steps,
        noise=lambda t: standard(3000, generator, THREE),
        variance=variance,
    )
    assert_drawn_from_component(samples, 1)


@pytest.mark.parametrize("way", ["score", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_gaussian_label_leads_to_its_posterior(kind: Prediction, way: str) -> None:
    """x ~ N(0, 1/2), label y = x + N(0, 1/4): of y = 0.9, x is N(0.6, 1/6). Algorithms 2 and 1.

    All is affine, so the mean is where no noise leads, and the variance the sum of squares of what
    each source of noise adds: no chance in it, only 400 steps for infinitely many.
    """
    steps, v, r, y = uniform_steps(1000, 400), 0.5, 0.25, 0.9
    parameterization = Parameterization.of(kind, SCHEDULE)

    def image(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a = SCHEDULE.at(t, x)
        return a.sqrt() * v * x / (a * v + 1 - a), v * (1 - a) / (a * v + 1 - a)

    def log_label(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = image(x, t)
        return (-(y - mean).square() / (2 * (variance + r))).squeeze(1)

    def model_output(x: Tensor, t: Tensor) -> Tensor:
        return parameterization.output_from_x0(x, t, image(x, t)[0])

    sources = torch.zeros(402, 1, dtype=torch.float64)  # none, x_T, then each step's noise
    x_T = sources.clone()
    x_T[1] = 1
    row = {t: 2 + i for i, t in enumerate(steps)}
    if way == "score":
        guided = classifier_guided(model_output, log_label, parameterization, 1.0)
        end = ddim(X0Estimator(SCHEDULE, guided, parameterization, clip=None), x_T, steps)
    else:
        variance: Any = way
        guided = classifier_guided(
            model_output, log_label, parameterization, 1.0, steps=steps, variance=variance
        )
        end = ancestral(
            X0Estimator(SCHEDULE, guided, parameterization, clip=None),
            x_T,
            steps,
            variance=variance,
            noise=lambda t: sources.index_fill(0, torch.tensor([row[t]]), 1.0),
        )
    assert float(end[0]) == pytest.approx(0.6, abs=0.01)
    assert float((end[1:] - end[0]).square().sum()) == pytest.approx(1 / 6, rel=0.03)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_is_shifted_by_sigma_times_the_slope(
    kind: Prediction, variance: ReverseVariance
) -> None:
    """With a slope of 1 everywhere the shift at step s is 2 Sigma, in a coarser chain too."""
    assert variance in ("fixed_small", "fixed_large")
    schedule, steps = NoiseSchedule(schedules.linear(40, 1e-3, 0.3)), (40, 17, 0)
    parameterization = Parameterization.of(kind, schedule)
    seen: list[Tensor] = []

    def free(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x_t

    def run(denoise: Callable[[Tensor, Tensor], Tensor]) -> None:
        ancestral(
            X0Estimator(schedule, denoise, parameterization, clip=None),
            X_4,
            steps,
            noise=lambda t: 0 * X_4,
            variance=variance,
            on_step=lambda t, x_t, x_0: seen.append(x_t.clone()),
        )

    run(free)
    run(
        classifier_guided(
            free, lambda x_t, t: x_t.sum(1), parameterization, 2.0, steps=steps, variance=variance
        )
    )
    respaced = NoiseSchedule(schedule.alpha_bar[[0, 17, 40]])
    _, small = posterior(respaced, X_4, X_4, torch.full((4,), 2))
    beta = 1 - schedule.alpha_bar[40] / schedule.alpha_bar[17]
    sigma = small if variance == "fixed_small" else beta.expand(4, 1)
    torch.testing.assert_close(seen[3] - seen[1], 2 * sigma.expand(4, 2))


def test_a_classifier_moves_nothing_where_there_is_no_signal() -> None:
    schedule = NoiseSchedule(torch.tensor([1, 0.5, 0.0], dtype=torch.float64))
    parameterization = Parameterization.of("v", schedule)
    denoise = classifier_guided(lambda x, t: 2 * x, lambda x, t: x.sum(1), parameterization, 3.0)
    moved = denoise(X_4, torch.tensor([2, 2, 1, 1])) - 2 * X_4
    # by hand at a = 1/2: x_0 moves by 3 (1 / 2) / sqrt(1 / 2), and v by -1 / sqrt(1 / 2) of that
    torch.testing.assert_close(moved[:, 0], torch.tensor([0, 0, -3, -3], dtype=torch.float64))


def test_a_classifier_may_look_up_its_steps_within_a_sampler() -> None:
    """Autograd refuses to keep inference tensors, and an embedding keeps its indices."""
    table = torch.nn.Embedding(1001, 2, dtype=torch.float64)

    def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
        along: Tensor = table(t) * x_t
        return along.sum(1)

    denoise = classifier_guided(THREE.expected_noise, log_probability, EPSILON, 1.0)
    with torch.inference_mode():
        assert denoise(X_4 * 1, T_4 * 1).isfinite().all()
    assert table.weight.grad is None


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"rescale": 1.5}, r"rescale is 1\.5; it lies from 0 \(off\) to 1"),
        (
            {"interval": (0.3, 2.0)},
            r"parameterization None; give two sigmas, .* and the parameterization",
        ),
        ({"interval": (2.0, 0.3), "parameterization": EPSILON}, r"interval is \(2\.0, 0\.3\)"),
        ({"interval": (-1.0, 0.3), "parameterization": EPSILON}, r"interval is \(-1\.0, 0\.3\)"),
    ],
)
def test_guidance_refuses(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        classifier_free(Recorder(), Conditioning(LABELS), 2.0, **options)


def test_guidance_refuses_what_would_silently_be_another_law() -> None:
    with pytest.raises(ValueError, match=r"conditioning is for 4 images and x_t has 3; .*repeat"):
        classifier_free(Recorder(), Conditioning(LABELS), 2.0)(X_4[:3], T_4[:3])
    every = classifier_guided(lambda x, t: x, lambda x, t: x, EPSILON, 1.0)
    with pytest.raises(ValueError, match=r"log p is \[4, 2\] for 4 images; .* that of its label"):
        every(X_4, T_4)
    with pytest.raises(ValueError, match="steps go from 10 to 20; they must fall strictly"):
        classifier_guided(THREE.expected_noise, log_class, EPSILON, 1.0, steps=(10, 20, 0))  # type: ignore[arg-type]
