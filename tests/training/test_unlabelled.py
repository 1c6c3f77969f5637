"""A data set of which some images have no label (-1), through all that reads labels.

A network looks labels up in a table that has no row -1: an IndexError, or on a GPU an assert that
ends the process. Each consumer must give what the null label gives.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.assembly import diffusion, networks, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.diffusion import Parameterization
from ddpm_ray.evaluation.likelihood_over_dataset import flow_likelihood
from ddpm_ray.evaluation.vlb_over_dataset import vlb_bits_per_dim
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.training.ema import EMA
from ddpm_ray.training.state import TrainingState
from ddpm_ray.training.validation_loss import LEVELS, Validator

CPU, COUNT, CLASSES = torch.device("cpu"), len(LEVELS), 3
IMAGES = torch.randint(
    0, 256, (COUNT, 4, 4, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
SOME = torch.arange(COUNT) % (CLASSES + 1) - 1  # -1, 0, 1, 2, -1, ...
NULL = torch.where(SOME < 0, CLASSES, SOME)


def configured(*more: str) -> RunConfig:
    keys = (
        "name=a",
        "data.url=b",
        "schedule.num_steps=60",
        f"model.num_classes={CLASSES}",
        "model.base_channels=4",
        "model.groups=2",
        "model.channel_mults=[1]",
        "model.blocks_per_level=1",
        "model.attention_resolutions=[]",
    )
    return load_config(RunConfig, None, [*keys, *more])


def trained(labels: Tensor, *more: str) -> list[float]:
    """Losses of a step of training."""
    torch.manual_seed(0)
    config = configured(*more)
    state = training_run.training_state(config, ImageShape(4, 4, 1), CPU, {})
    objective = diffusion.objective(config, state, CPU)
    return objective.backward(state.model, Batch(IMAGES, labels), 1, Workers(), COUNT).loss.tolist()


def network() -> nn.Module:
    """The network that runs train, whose last layer is not 0."""
    torch.manual_seed(0)
    made = networks.network(configured(), ImageShape(4, 4, 1))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def denoiser() -> Denoiser:
    schedule = diffusion.noise_schedule(configured().schedule)
    return Denoiser(
        network().eval(),
        Parameterization.of("epsilon", schedule),
        takes=ConditioningSpec(CLASSES),
    )


def validated(labels: Tensor) -> list[float]:
    model, of = network(), denoiser()
    state = TrainingState(model, EMA(model), torch.optim.Adam(model.parameters()), {})
    Validator(state, of, Batch(IMAGES, labels), 0, 0.3, Workers(), None).validate(1)
    (found,) = state.validation_losses
    return list(found["spectrum"])


def bounded(labels: Tensor) -> list[float]:
    batch = torch.arange(COUNT), IMAGES, labels
    found = vlb_bits_per_dim(
        denoiser(), [batch], variance="fixed_small", workers=Workers(), terms=4
    )
    return [*found.metrics.values(), *found.terms]


def likely(labels: Tensor) -> list[float]:
    batch = torch.arange(COUNT), IMAGES, labels
    return [*flow_likelihood(denoiser(), [batch], steps=5, workers=Workers()).metrics.values()]


CONSUMERS: dict[str, Callable[[Tensor], list[float]]] = {
    "training": trained,
    "training by its own estimate": lambda labels: trained(
        labels, "objective.self_conditioning=true"
    ),
    "losses by log-SNR": validated,
    "bits per dimension": bounded,
    "likelihood": likely,
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_an_image_without_a_label_counts_as_one_of_the_null_label(name: str) -> None:
    found = CONSUMERS[name](SOME)
    assert found == CONSUMERS[name](NULL)
    if not name.startswith("training"):  # whose last layer is 0 at the start
        assert found != CONSUMERS[name](SOME.clamp(min=0))


def test_a_classifier_learns_nothing_of_an_image_without_a_label() -> None:
    losses = torch.tensor(trained(SOME, "task=classifier", "training.grid_every_steps=0"))
    labelled = SOME >= 0
    assert not losses[~labelled].any()
    assert (losses[labelled] > 0).all()
