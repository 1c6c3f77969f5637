"""Operations of a training step, against what papers and torch count."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_ray.assembly import networks
from ddpm_ray.assembly.operations import training_operations
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape


def config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, None, ["name=a", "data.url=b", *overrides])


@pytest.mark.parametrize("size, gmac", [("S/2", 6.06), ("XL/2", 118.64)])
def test_a_dit_takes_the_operations_of_its_paper(size: str, gmac: float) -> None:
    """(Peebles and Xie 2023, table 4.) It counts multiply-adds of one forward pass."""
    found = config(
        "model.network=dit",
        f"model.size={size}",
        "model.num_classes=1000",
        "objective.variance=learned_range",
        "objective.loss=hybrid",
    )
    counted = training_operations(found, ImageShape(32, 32, 4))
    assert counted / 1e9 == pytest.approx(3 * 2 * gmac, rel=5e-3)


SMALL = ("model.base_channels=16", "model.channel_mults=[1,2]", "model.attention_factors=[2]")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("objective.self_conditioning=true",),
        ("objective.inpainting_masks=true",),
        ("objective.low_resolution_pixels=4",),
        ("model.num_classes=3",),
    ],
)
def test_a_unet_takes_what_torch_counts_forward_and_backward(overrides: tuple[str, ...]) -> None:
    found = config(*SMALL, "model.groups=8", *overrides)
    shape = ImageShape(8, 8, 3)
    network = networks.network(found, shape)
    takes = 3 + networks.condition_channels(found, shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        h = network.conv_in(torch.ones(1, takes, 8, 8, requires_grad=True))  # type: ignore[operator]
        torch.autograd.backward(h.sum())
    first_layer = counter.get_total_flops()
    assert first_layer == 3 * 2 * takes * 16 * 9 * 64
    alone = training_operations(found, shape)
    plain = training_operations(config(*SMALL, "model.groups=8"), shape)
    assert alone - plain == first_layer - 3 * 2 * 3 * 16 * 9 * 64


def test_an_autoencoder_and_a_classifier_are_counted() -> None:
    classifier = config(
        "task=classifier",
        "training.grid_every_steps=0",
        "model.num_classes=2",
        *SMALL,
        "model.groups=8",
    )
    autoencoder = config(
        "task=autoencoder",
        "autoencoder.base_channels=4",
        "autoencoder.groups=2",
        "autoencoder.channel_mults=[1]",
    )
    shape = ImageShape(8, 8, 3)
    assert training_operations(classifier, shape) > 0
    # Both convolutions next to the image, of 3x3, alone: 4 channels each way.
    assert training_operations(autoencoder, shape) > 3 * 2 * 2 * (3 * 4 * 9 * 64)
    doubled = training_operations(autoencoder, ImageShape(16, 16, 3))
    assert doubled == 4 * training_operations(autoencoder, shape)


def test_a_block_of_a_spatial_transformer_takes_what_its_sizes_say() -> None:
    """At 6 places: 2 + 3 stages of the second level, and the middle. Multiply-adds of a block."""
    text = ("text.encoder=transformer", "text.length=7", "text.width=12", "text.depth=1")
    keys = (*SMALL, "model.groups=8", *text, "text.pooled=false")
    one, two = (
        training_operations(config(*keys, f"model.transformer_depth={n}"), ImageShape(8, 8, 3))
        for n in (1, 2)
    )
    n, c, length, width = 4 * 4, 32, 7, 12
    itself = 4 * n * c * c + 2 * n * n * c
    to_text = 2 * n * c * c + 2 * length * width * c + 2 * n * length * c
    mlp = n * c * 8 * c + n * 4 * c * c
    assert two - one == 3 * 2 * 6 * (itself + to_text + mlp)
