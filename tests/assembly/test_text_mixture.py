"""Text to image on a captioned mixture of Gaussians, whose guided scores are known.

An image of two halves is grey N(mean, DEVIATION^2) in each; the caption names both means. Words are
independent, so the distribution of a combination that was never trained is known: the product.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly import diffusion, run_config, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.schedules import linear
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser, Guidance
from ddpm_ray.sampling.sampling import draw, sampling_plan

CPU = torch.device("cpu")
GREYS = {"dark": -0.5, "grey": 0.0, "bright": 0.5}
DEVIATION = 0.05
BATCH = 32
CAPTIONS = [f"{left} left and {right} right" for left, right in product(GREYS, GREYS)]
HELD_OUT = ["dark left and bright right", "bright left and grey right"]
TOKENIZER = Tokenizer.trained(CAPTIONS, 300, 8)
SCHEDULE = NoiseSchedule(linear(50))


def means(caption: str) -> Tensor:
    """The mean grey of both halves, [2] float64."""
    words = caption.split()
    return torch.tensor([GREYS[words[0]], GREYS[words[3]]], dtype=torch.float64)


def exact_noise(x_t: Tensor, t: Tensor, captions: list[str]) -> Tensor:
    """E[noise | x_t] of a mixture of the captions' Gaussians, by autograd of its density."""
    a = SCHEDULE.alpha_bar.double()[t][:, None]
    x = x_t.double().requires_grad_()
    variance = a * DEVIATION**2 + 1 - a
    parts = [-((x - a.sqrt() * means(one)) ** 2).sum(1) / (2 * variance[:, 0]) for one in captions]
    (score,) = torch.autograd.grad(torch.logsumexp(torch.stack(parts), 0).sum(), x)
    return -(1 - a).sqrt() * score


def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The exact denoiser of the mixture, given the tokens of a caption: "" is all captions."""
    assert conditioning.tokens is not None
    rows = []
    for n, tokens in enumerate(conditioning.tokens):
        text = TOKENIZER.decode(tokens.clamp(min=0).tolist())
        of = [text] if text else CAPTIONS
        rows.append(exact_noise(x_t[n : n + 1].flatten(1), t[n : n + 1], of))
    return torch.cat(rows).reshape(x_t.shape)


@pytest.mark.parametrize("negative", ["", CAPTIONS[4]])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guided_scores_are_those_of_the_mixture(scale: float, negative: str) -> None:
    """Unconditional or negative prompt, plus scale times the difference; each image its prompt."""
    parameterization = Parameterization.of("epsilon", SCHEDULE)
    of = Denoiser(network, parameterization, takes=ConditioningSpec(tokenizer=TOKENIZER))
    prompts, index = [CAPTIONS[1], CAPTIONS[5], CAPTIONS[6]], torch.tensor([4, 0, 3, 2])
    x_t = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in (1, 20, 50):
        t = torch.full((4,), step)
        denoise = of.bind_conditioning(
            of.conditioning(index, prompts=prompts), Guidance(scale, negative_prompt=negative)
        )
        found = denoise(x_t, t).reshape(4, 2)
        away = [negative] if negative else CAPTIONS
        for n, i in enumerate(index.tolist()):
            x, at = x_t[n : n + 1].flatten(1), t[:1]
            weak, strong = exact_noise(x, at, away), exact_noise(x, at, [prompts[i % 3]])
            expected = (1 - scale) * weak + scale * strong
            torch.testing.assert_close(found[n : n + 1], expected, rtol=0, atol=1e-9)


UNET = (
    "model.base_channels=8",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.groups=4",
    "model.attention_factors=[2]",
)
DIT = (
    "model.network=dit",
    "model.patch_size=2",
    "model.hidden_size=24",
    "model.depth=2",
    "model.heads=2",
)


def configured(*keys: str) -> RunConfig:
    """A run with text on images of 4 x 4."""
    options = (
        "name=text",
        "data.url=none",
        "text.encoder=transformer",
        "text.length=8",
        "text.width=16",
        "text.depth=1",
        "text.heads=2",
        "schedule.kind=cosine",
        "schedule.num_steps=50",
        "training.learning_rate=4e-3",
        "training.ema_decay_per_step=0.97",
        "sampling.steps=20",
    )
    return load_config(RunConfig, None, [*options, *keys])


@pytest.mark.parametrize("keys, steps", [(UNET, 400), (DIT, 700)], ids=["unet", "dit"])
def test_words_are_combined_as_they_never_were_in_training(
    keys: tuple[str, ...], steps: int
) -> None:
    """After training on 7 of 9 captions, samples of the other two have the means of their words.

    Both halves of most samples are nearest to the greys of their own words: by chance, one of nine.
    """
    config = configured(*keys)
    facts = run_config.tokenizer_facts(TOKENIZER)
    state = training_run.training_state(config, ImageShape(4, 4, 1), CPU, facts)
    objective = diffusion.objective(config, state, CPU)
    seen = [caption for caption in CAPTIONS if caption not in HELD_OUT]
    tokens = TOKENIZER.encode(seen)
    generator = torch.Generator().manual_seed(1)
    decay = training_run.ema_decay(config.training)
    for step in range(steps):
        which = torch.randint(len(seen), (BATCH,), generator=generator)
        halves = torch.stack([means(seen[n]) for n in which.tolist()]).float()
        halves += DEVIATION * torch.randn(BATCH, 2, generator=generator)
        pixels = halves.repeat_interleave(2, 1)[:, None].expand(BATCH, 4, 4)[..., None]
        images = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        batch = Batch(images, torch.full((BATCH,), -1), tokens=tokens[which])
        objective.backward(state.network, batch, step, Workers(), BATCH)
        state.clip_gradients(1.0)
        state.step_optimizers(config.training.learning_rate, torch.tensor(True))
        state.ema.update(state.model, decay(step))
    of = diffusion.denoiser(config, state.ema.model, CPU, PIXELS, TOKENIZER)
    plan = sampling_plan(config.sampling.overridden({"prompts": HELD_OUT}), of.schedule)
    drawn = draw(of, plan, torch.arange(64), ImageShape(4, 4, 1), "cpu")
    found = drawn.reshape(32, 2, 4, 2, 2).mean((2, 4))  # [draw, prompt, half]
    expected = torch.stack([means(caption) for caption in HELD_OUT]).float()
    torch.testing.assert_close(found.mean(0), expected, rtol=0, atol=0.12)
    nearest = (found[..., None] - torch.tensor([*GREYS.values()])).abs().argmin(-1)
    named = (expected[..., None] - torch.tensor([*GREYS.values()])).abs().argmin(-1)
    assert (nearest == named).all(-1).float().mean() > 0.6  # 0.84 to 1 on two processors
