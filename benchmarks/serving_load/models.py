"""The served networks: sizes of the shipped configs, random weights, no classes."""

import time
from pathlib import Path

import torch
from torch import nn

from ddpm_ray.assembly import networks, training_run
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.conditioning import UNCONDITIONAL
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.models.unet import UNet
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.training.checkpoints import CheckpointStore

CONFIGS = Path(__file__).parents[2] / "conf/train"
SHAPES = {"digits": ImageShape(8, 8, 1), "mnist": ImageShape(28, 28, 1)}
OPTIONS = ("model.num_classes=0", "sampling.sampler=ddim", "sampling.eta=0")
DDIM = SamplingSettings(sampler="ddim", eta=0.0)


def drawing_model(name: str) -> TrainedModel:
    """A model with the network of conf/train/NAME.yaml, which draws by DDIM with eta 0."""
    torch.manual_seed(0)
    config = load_config(RunConfig, str(CONFIGS / f"{name}.yaml"), ["model.num_classes=0"])
    network = networks.network(config, SHAPES[name])
    assert isinstance(network, UNet)
    nn.init.normal_(network.conv_out.weight, std=0.1)  # new networks predict 0
    return model_of(network.eval(), SHAPES[name])


def untrained_run(name: str, folder: Path) -> str:
    """The folder of a run of conf/train/NAME.yaml that was saved at step 0."""
    config = load_config(RunConfig, str(CONFIGS / f"{name}.yaml"), list(OPTIONS))
    facts = {
        "config": to_dict(config),
        "image_shape": [*SHAPES[name]],
        "data_fingerprint": "",
    }
    state = training_run.training_state(config, SHAPES[name], torch.device("cpu"), facts)
    CheckpointStore(str(folder / "checkpoints")).save(state.snapshot([]))
    return str(folder)


def model_of(network: nn.Module, shape: ImageShape) -> TrainedModel:
    denoiser = Denoiser(
        network, Parameterization.of("epsilon", NoiseSchedule(schedules.cosine(1000)))
    )
    return TrainedModel(denoiser, shape, provenance={}, settings=DDIM)


def call_s(model: TrainedModel, rows: int, calls: int = 5) -> float:
    """Seconds of a network call of so many rows, the least of some: the bare network."""
    shape = model.denoiser.codec.shape(model.image_shape)
    x_t, t = torch.randn(rows, *shape), torch.full((rows,), 500)
    took = []
    with torch.inference_mode():
        for _ in range(calls + 1):
            begun_s = time.perf_counter()
            model.denoiser.network(x_t, t, UNCONDITIONAL)
            took.append(time.perf_counter() - begun_s)
    return min(took[1:])
