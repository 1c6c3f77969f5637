"""A tiny model whose network records its calls, and can be held."""

import threading

import torch
from torch import Tensor, nn

from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.pipeline import TrainedModel
from tests.limits import ENDS_S

SCHEDULE = NoiseSchedule(schedules.cosine(20))


class Counted(nn.Module):
    """A network that records the rows and steps of its calls, and may be held."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.batches: list[list[int]] = []
        self.called, self.go_on = threading.Semaphore(0), threading.Event()
        self.go_on.set()
        self.fails_with: int | None = None
        self.exits = False

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.called.release()
        assert self.go_on.wait(ENDS_S)
        self.batches.append(t.tolist())
        labels = conditioning.labels
        if self.exits:
            raise SystemExit("the network ends its thread")
        if labels is not None and self.fails_with in labels.tolist():
            raise ValueError(f"this network fails with label {self.fails_with}")
        output: Tensor = self.network(x_t, t, conditioning)
        return output


def counted(model: TrainedModel) -> Counted:
    network = model.denoiser.network
    assert isinstance(network, Counted)
    return network


def tiny_model() -> TrainedModel:
    torch.manual_seed(0)
    spec = UNetSpec(
        image_channels=1,
        base_channels=8,
        channel_mults=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        groups=4,
        num_classes=3,
    )
    network = UNet(spec)
    nn.init.normal_(network.conv_out.weight, std=0.1)
    denoiser = Denoiser(
        Counted(network.eval()),
        Parameterization.of("epsilon", SCHEDULE),
        takes=ConditioningSpec(num_classes=3),
    )
    return TrainedModel(denoiser, ImageShape(8, 8, 1), provenance={})


def held(model: TrainedModel) -> None:
    """Stop the network at its next call, which the next acquire of `called` waits for."""
    counted(model).go_on.clear()
    while counted(model).called.acquire(blocking=False):
        pass
