"""Forty steps of training in lockstep with diffusers: their network, their noise, Adam of torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from ddpm_ray.assembly import diffusion, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.models.interop import convert
from ddpm_ray.models.layers import HO
from ddpm_ray.models.unet_spec import UNetSpec

diffusers = pytest.importorskip("diffusers", reason="pip install 'ddpm-ray[dev]'")
CPU, STEPS, BATCH, RATE = torch.device("cpu"), 40, 8, 2e-3
SPEC = UNetSpec(
    image_channels=1,
    base_channels=8,
    channel_mults=(1, 2),
    blocks_per_level=1,
    attention_factors=(2,),
    dropout=0.0,
    groups=4,
    num_classes=0,
    condition_channels=0,
    learns_variance=False,
    variant=HO,
)


class InDouble(nn.Module):
    """A network of float64, so that only rules can differ and not roundings that add up."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, *others: Any) -> Tensor:
        model_output: Tensor = self.network(x_t.double(), t, *others)
        return model_output


def test_forty_steps_of_training_are_those_of_diffusers() -> None:
    """Losses and gradient norms at each step, and all weights at the end, to 1e-5."""
    config = load_config(
        RunConfig,
        None,
        [
            "name=a",
            "data.url=b",
            "model.base_channels=8",
            "model.groups=4",
            "model.channel_mults=[1,2]",
            "model.blocks_per_level=1",
            "model.attention_resolutions=[4]",
            "model.dropout=0",
            "schedule.kind=linear",
            f"training.learning_rate={RATE}",
            f"training.global_batch_size={BATCH}",
        ],
    )
    torch.manual_seed(0)
    state = training_run.training_state(config, ImageShape(8, 8, 1), CPU, {})
    spec, tensors = convert.to_diffusers(SPEC, state.model.state_dict(), (8, 8))
    theirs = diffusers.UNet2DModel(**{k: v for k, v in spec.items() if k[0] != "_"})
    theirs.load_state_dict(tensors)
    ours, theirs = InDouble(state.model.double()), theirs.double()
    objective = diffusion.objective(config, state, CPU)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    adam = torch.optim.Adam(theirs.parameters(), lr=RATE)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (BATCH, 8, 8, 1), generator=generator).to(torch.uint8)
        none, at = torch.full((BATCH,), -1), torch.arange(BATCH)
        drawn = objective.noising.noisy_batch(Batch(images, none), step, at, CPU)
        loss = objective.backward(ours, Batch(images, none), step, Workers(), BATCH).loss.mean()
        norm = clip_grad_norm_(ours.parameters(), 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad()

        x_0 = images.permute(0, 3, 1, 2).double() / 127.5 - 1
        x_t = scheduler.add_noise(x_0, drawn.noise.double(), drawn.t - 1)
        expected = F.mse_loss(theirs(x_t, drawn.t - 1).sample, drawn.noise.double())
        adam.zero_grad()
        expected.backward()
        their_norm = clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
        assert float(loss) == pytest.approx(expected.item(), rel=1e-5), step
        assert float(norm) == pytest.approx(float(their_norm), rel=1e-5), step
    assert expected.item() < 0.9  # it has learnt
    _, found = convert.to_diffusers(SPEC, state.model.state_dict(), (8, 8))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
