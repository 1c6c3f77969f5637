"""What a network is shown of images, by choice, and that none of it depends on the division."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm_ray.assembly import diffusion, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.objective import ObjectiveConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.loader import Batch
from ddpm_ray.data.low_resolution import downscaled
from ddpm_ray.diffusion import Parameterization, add_noise
from ddpm_ray.diffusion.conditioning import NO_LABEL, Conditioning
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.training.noising import NoisingRecipe, NoisyBatch
from ddpm_ray.training.objective import Objective

CPU, SIDE = torch.device("cpu"), 4
IMAGES = torch.randint(
    0, 256, (400, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
)
LABELS = torch.arange(400) % 5
EVERYTHING = (
    "data.flip=true",
    "model.num_classes=5",
    "objective.offset_noise=0.1",
    "objective.input_perturbation=0.1",
    "objective.low_resolution_pixels=2",
    "objective.low_resolution_noise=0.3",
    "objective.timesteps=low_discrepancy",
)

UPSAMPLING = (
    "data.flip=true",
    "model.num_classes=5",
    "objective.input_perturbation=0.1",
    "objective.low_resolution_pixels=2",
    "objective.low_resolution_noise=0.1",
    "objective.low_resolution_blur=0.6",
    "objective.low_resolution_crop=3",
)

INPAINTING = (
    "data.flip=true",
    "model.num_classes=5",
    "objective.offset_noise=0.1",
    "objective.input_perturbation=0.1",
    "objective.inpainting_masks=true",
)

CLASSIFIER = ("task=classifier", "model.num_classes=5", "training.grid_every_steps=0")


def configured(*overrides: str) -> RunConfig:
    keys = (
        "name=a",
        "data.url=b",
        "schedule.num_steps=60",
        "model.base_channels=4",
        "model.groups=2",
        "model.channel_mults=[1]",
        "model.blocks_per_level=1",
        "model.attention_resolutions=[]",
        "training.global_batch_size=400",
    )
    return load_config(RunConfig, None, [*keys, *overrides])


def objective(*overrides: str) -> Objective:
    config = configured(*overrides)
    state = training_run.training_state(config, ImageShape(SIDE, SIDE, 3), CPU, {})
    return diffusion.objective(config, state, CPU)


def shown(made: Objective, step: int = 3, part: slice = slice(None)) -> NoisyBatch:
    positions = torch.arange(400)[part]
    return made.noising.noisy_batch(Batch(IMAGES[part], LABELS[part]), step, positions, CPU)


def columns(noisy: NoisyBatch) -> dict[str, Tensor]:
    found = vars(noisy) | vars(noisy.conditioning)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@functools.cache  # once for all examples
def with_all_of(overrides: tuple[str, ...]) -> tuple[Objective, dict[str, Tensor]]:
    made = objective(*overrides)
    return made, columns(shown(made))


@pytest.mark.parametrize("overrides", [EVERYTHING, UPSAMPLING, INPAINTING])
@given(start=st.integers(0, 399), count=st.integers(1, 50))
def test_all_that_is_shown_of_an_image_is_its_positions(
    overrides: tuple[str, ...], start: int, count: int
) -> None:
    made, whole = with_all_of(overrides)
    part = columns(shown(made, part=slice(start, start + count)))
    image = "known" if overrides == INPAINTING else "low_resolution"
    assert whole.keys() == {"x_0", "t", "noise", "perturbation", "labels", image} == part.keys()
    for name, value in part.items():
        assert torch.equal(value, whole[name][start : start + count]), name


@pytest.mark.parametrize("overrides", [EVERYTHING, UPSAMPLING, INPAINTING])
def test_another_step_shows_everything_anew(overrides: tuple[str, ...]) -> None:
    made = objective(*overrides)
    one, other = columns(shown(made, 3)), columns(shown(made, 4))
    for name in one.keys() - {"x_0"}:
        assert not torch.equal(one[name], other[name]), name


BOUND = ("objective.loss=hybrid", "objective.variance=learned_range")  # for second_moment
TIMESTEPS = get_args(get_type_hints(ObjectiveConfig)["timesteps"])


@pytest.mark.parametrize(
    "keys",
    [
        *((*BOUND, f"objective.timesteps={kind}") for kind in TIMESTEPS),
        EVERYTHING,
        UPSAMPLING,
        (*INPAINTING, "training.channels_last=true"),
    ],
    ids=str,
)
def test_a_compiled_noising_reads_the_step_from_the_device(
    keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled once draws the bits of each step, as a CUDA graph of it would."""
    recipe = objective(*keys, "training.compile=default").noising
    assert not recipe.compiled  # on a CPU: bits of earlier runs
    compiled_draws_the_bits_of_each_step(recipe, Batch(IMAGES, LABELS), monkeypatch)


class NoEncoder:
    """An image encoder that no step may call: the embeddings are stored."""

    width = 6

    def embed(self, x_0: Tensor) -> Tensor:
        raise AssertionError("the encoder was called")


def test_a_compiled_noising_drops_stored_embeddings_of_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    takes = ConditioningSpec(image_encoder=NoEncoder())
    recipe = replace(objective().noising, takes=takes, embedding_dropout=0.3)
    stored = torch.randn(400, 6, generator=torch.Generator().manual_seed(3)).half()
    batch = Batch(IMAGES, LABELS, embeddings=stored)
    compiled_draws_the_bits_of_each_step(recipe, batch, monkeypatch)
    given = recipe.noisy_batch(batch, 3, torch.arange(400), CPU).conditioning.embedding
    assert given is not None
    kept = given.any(1)
    assert torch.equal(given[kept], stored[kept].float())
    assert abs(int((~kept).sum()) - 120) < 4 * math.sqrt(400 * 0.3 * 0.7)


def test_a_compiled_noising_draws_latents_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = LatentCodec(3, 2, ("plain", "flipped"), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    recipe = replace(objective("data.flip=true").noising, codec=codec)
    stored = torch.randn(400, 2, 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    batch = Batch(stored.half(), LABELS)
    compiled_draws_the_bits_of_each_step(recipe, batch, monkeypatch)


def compiled_draws_the_bits_of_each_step(
    eager: NoisingRecipe, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert it of a recipe that is compiled once, without a break of its graph."""
    backend = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", backend)
    torch.compiler.reset()
    compiled = replace(eager, compiled=True)
    arguments, found = (torch.arange(400), CPU), []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (3, 4, 2**32 - 1):
            expected, drawn = (
                columns(one.noisy_batch(batch, step, *arguments)) for one in (eager, compiled)
            )
            assert drawn.keys() == expected.keys()
            for name, value in expected.items():
                # What is compiled interpolates in another order of sums.
                rounding = 1e-6 if name == "low_resolution" else 0.0
                torch.testing.assert_close(drawn[name], value, rtol=0.0, atol=rounding)
            found.append(drawn["noise"])
    assert not torch.equal(found[0], found[1])


def test_an_inpainting_model_is_shown_what_is_known_and_where() -> None:
    """The part of x_0 as it is diffused, mirrored where it is; nothing of the rest."""
    noisy = shown(objective(*INPAINTING))
    known = noisy.conditioning.known
    assert known is not None
    part, mask = known[:, :3], known[:, 3:].expand(-1, 3, -1, -1).bool()
    assert torch.equal(part[mask], noisy.x_0[mask])
    assert not part[~mask].any()
    assert (~mask).flatten(1).any(1).all()
    assert 0.3 < mask.float().mean() < 0.7


def test_labels_are_dropped_by_their_share() -> None:
    found = shown(
        objective("model.num_classes=5", "objective.label_dropout=0.25")
    ).conditioning.labels
    assert found is not None
    dropped = found == NO_LABEL
    assert torch.equal(found[~dropped], LABELS[~dropped])
    assert abs(int(dropped.sum()) - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)
    recipe = objective("model.num_classes=5", "objective.label_dropout=0").noising
    none = recipe.noisy_batch(Batch(IMAGES, torch.full((400,), -1)), 0, torch.arange(400), CPU)
    assert none.conditioning.labels is not None
    assert (none.conditioning.labels == NO_LABEL).all()
    assert shown(objective()).conditioning.labels is None


def test_offset_noise_is_one_number_per_image_and_channel() -> None:
    plain = shown(objective()).noise
    offset = shown(objective("objective.offset_noise=0.1")).noise - plain
    assert (offset.flatten(2).std(2) < 1e-6).all()
    numbers = offset[:, :, 0, 0].flatten() / 0.1
    assert abs(numbers.mean()) < 4 / math.sqrt(1200)
    assert numbers.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * 1200))


def test_the_low_resolution_image_has_no_more_than_its_pixels() -> None:
    """Of one colour per quarter it is itself but for the blur between them; its mean stays."""
    quarters = torch.randn(3, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    small = downscaled(quarters, 2)
    assert small.shape == quarters.shape
    torch.testing.assert_close(small[:, :, 0, 0], quarters[:, :, 0, 0])
    torch.testing.assert_close(small.mean((2, 3)), quarters.mean((2, 3)))
    detail = torch.randn(3, 1, 16, 16)
    checks = detail - downscaled(detail, 2)
    assert downscaled(checks, 2).abs().max() < 0.5 * checks.abs().max()


class Remembering(nn.Module):
    """Answers with `answer`, and keeps all that it was asked."""

    def __init__(self, answer: float = 0.0, channels: int = 1) -> None:
        super().__init__()
        self.answer, self.channels = nn.Parameter(torch.tensor(answer)), channels
        self.asked: list[tuple[Tensor, Conditioning]] = []

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.asked.append((x_t.detach().clone(), conditioning))
        return self.answer.expand(len(x_t), self.channels * x_t.shape[1], *x_t.shape[2:])


def test_input_perturbation_is_noise_that_the_target_does_not_know() -> None:
    """On top of x_t's own, in its measure; the loss of a silent network stays the target's."""
    made, network = objective("objective.input_perturbation=0.5"), Remembering()
    noisy = shown(made)
    loss = made.losses(network, noisy, 3)
    torch.testing.assert_close(loss, noisy.noise.square().flatten(1).mean(1))
    x_t = add_noise(made.schedule, noisy.x_0, noisy.t, noisy.noise)
    spread = (1 - made.schedule.at(noisy.t, x_t)).sqrt()
    more = (network.asked[0][0] - x_t) / spread
    assert more.std().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * more.numel()))
    assert abs(torch.corrcoef(torch.stack([more.flatten(), noisy.noise.flatten()]))[0, 1]) < 0.03


@pytest.mark.parametrize("kind", ["epsilon", "x_0", "v", "mean", "edm"])
def test_the_target_is_that_of_the_prediction(kind: str) -> None:
    made = objective(f"objective.prediction={kind}", "objective.sigma_data=0.6")
    noisy = shown(made)
    parameterization = Parameterization.of(kind, made.schedule, 0.6)  # type: ignore[arg-type]
    target = parameterization.target(noisy.x_0, noisy.t, noisy.noise)
    loss = made.losses(Remembering(), noisy, 3)
    torch.testing.assert_close(loss, target.square().flatten(1).mean(1))


def test_self_conditioning_shows_its_own_estimate_in_half_of_the_steps() -> None:
    """A network that says 0 for the noise has the estimate x_t / sqrt(alpha_bar), clipped."""
    made = objective("objective.self_conditioning=true")
    network, twice = Remembering(), 0
    for step in range(200):
        network.asked.clear()
        noisy = shown(made, step, slice(0, 2))
        made.losses(network, noisy, step)
        condition = network.asked[-1][1].estimate
        assert condition is not None
        if len(network.asked) == 2:
            twice += 1
            first = network.asked[0][1].estimate
            assert first is not None
            assert not first.any()
            a = made.schedule.at(noisy.t, noisy.x_0)
            x_t = add_noise(made.schedule, noisy.x_0, noisy.t, noisy.noise)
            torch.testing.assert_close(condition, (x_t / a.sqrt()).float().clamp(-1, 1))
        else:
            assert not condition.any()
    assert abs(twice - 100) < 4 * math.sqrt(200 / 4)


def gradient(overrides: tuple[str, ...], step: int = 0) -> tuple[float, Tensor]:
    """Of the batch's loss by a network's one number, and the losses as they are told."""
    made, network = objective(*overrides), Remembering(0.5)
    reported = made.backward(network, Batch(IMAGES, LABELS), step, Workers(), 400)
    assert network.answer.grad is not None
    return float(network.answer.grad), reported.loss


def test_weights_reach_the_gradient_and_not_what_is_reported() -> None:
    """Where the answer is one number, the gradient is the weighted mean of 2 (answer - target)."""
    plain, reported = gradient(())
    weighted, reported_too = gradient(("objective.weighting=min_snr",))
    assert torch.equal(reported, reported_too)
    assert weighted != plain
    made = objective("objective.weighting=min_snr")
    noisy = shown(made, 0)
    assert made.weight is not None
    slope = 2 * (0.5 - noisy.noise).flatten(1).mean(1)
    expected = (made.weight[noisy.t] * slope).mean()
    assert weighted == pytest.approx(float(expected), rel=1e-4)


def test_loss_moments_steer_t_and_what_each_loss_weighs_evens_it_out() -> None:
    config = configured(
        "objective.timesteps=second_moment",
        "objective.loss=hybrid",
        "objective.variance=learned_range",
    )
    state = training_run.training_state(config, ImageShape(SIDE, SIDE, 3), CPU, {})
    made = diffusion.objective(config, state, CPU)
    assert state.moments is not None
    before = shown(made)
    assert before.importance is not None
    torch.testing.assert_close(before.importance, torch.ones(400).double())
    every = torch.arange(1, 61).repeat(10)
    state.moments.update(every, torch.where(every > 50, 10.0, 0.1), torch.tensor(True))
    after = shown(made)
    assert after.importance is not None
    assert (after.t > 50).float().mean() > 0.9
    assert after.importance[after.t > 50].max() < 0.2
    assert after.importance[after.t <= 50].min() > 5


def test_a_classifier_is_asked_for_the_label_of_what_it_sees() -> None:
    """Logits of 0 cost log K nats; those of the truth, large, nothing."""
    made = objective(*CLASSIFIER, "model.attention_resolutions=[4]")
    noisy = shown(made)

    def answering(size: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x_t, t: size * nn.functional.one_hot(LABELS, 5).float()

    for size, cost in ((0.0, math.log(5)), (50.0, 0.0)):
        loss = made.losses(answering(size), noisy, 3)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, torch.full((400,), cost))


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.loss=hybrid", "objective.variance=learned_range"),
        ("objective.loss=vlb", "objective.variance=learned"),
        ("objective.weighting=uncertainty",),
        ("objective.timesteps=log_normal", "objective.prediction=edm", "schedule.kind=edm"),
        ("objective.self_conditioning=true", "objective.low_resolution_pixels=2"),
        ("objective.self_conditioning=true", "objective.inpainting_masks=true"),
        ("model.num_classes=5", "objective.prediction=v", "schedule.zero_terminal_snr=true"),
        (*CLASSIFIER, "model.attention_resolutions=[4]"),
    ],
    ids=str,
)
def test_each_kind_of_objective_trains_its_network(overrides: tuple[str, ...]) -> None:
    """Adam on one batch lowers its loss, and every weight takes part."""
    config = configured(*overrides, "training.learning_rate=3e-3")
    state = training_run.training_state(config, ImageShape(SIDE, SIDE, 3), CPU, {})
    made = diffusion.objective(config, state, CPU)
    losses = []
    for number in range(30):
        reported = made.backward(state.model, Batch(IMAGES[:64], LABELS[:64]), 1, Workers(), 64)
        missing = [name for name, p in state.model.named_parameters() if p.grad is None]
        assert not missing
        for group in state.optimizer.param_groups:
            group["lr"] = 3e-3
        state.optimizer.step()
        state.optimizer.zero_grad()
        if number in (0, 29):
            losses.append(reported.loss.mean().item())
    assert losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    "overrides",
    [
        (*EVERYTHING, "objective.self_conditioning=true"),
        (*INPAINTING, "objective.self_conditioning=true"),
        CLASSIFIER,
    ],
)
def test_images_need_not_be_square(overrides: tuple[str, ...]) -> None:
    """Two levels of 4 x 6 and 2 x 3 pixels: the loss is finite, and every weight has a gradient."""
    more = "model.channel_mults=[1,1]", "model.attention_resolutions=[2]"
    config = configured(*overrides, *more)
    state = training_run.training_state(config, ImageShape(4, 6, 3), CPU, {})
    made = diffusion.objective(config, state, CPU)
    images = IMAGES[:20].repeat_interleave(2, 2)[:, :, :6]
    losses = made.backward(state.model, Batch(images, LABELS[:20]), 1, Workers(), 20).loss
    assert losses.isfinite().all()
    assert all(parameter.grad is not None for parameter in state.model.parameters())
