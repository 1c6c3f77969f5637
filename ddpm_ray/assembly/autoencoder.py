"""Build the parts of a run with task=autoencoder: autoencoder, adversary and objective."""

from pathlib import Path
from typing import assert_never

import torch
from torch import nn

from ddpm_ray.assembly.diffusion import gradient_settings, memory_format
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.evaluation.features.inception import LEAST_SIDE
from ddpm_ray.evaluation.features.inception_weights import load_inception
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.lpips_distance import LEAST_PIXELS, load_lpips
from ddpm_ray.models.patch_discriminator import PatchDiscriminator, require_patches
from ddpm_ray.models.perceptual import PerceptualDistance
from ddpm_ray.storage import checksummed
from ddpm_ray.training.adversary import Adversary
from ddpm_ray.training.autoencoder_objective import AutoencoderObjective, Perceptual
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.state import TrainingState

PERCEPTUAL_WIDTH = 192  # features behind the last stage that the perceptual loss reads
ADVERSARY_BETAS = (0.5, 0.9)  # of the discriminator's Adam, as in the code of Esser et al. 2021


def autoencoder_spec(config: RunConfig, image_channels: int) -> AutoencoderSpec:
    """The spec of the autoencoder for images of `image_channels`."""
    wanted = config.autoencoder
    return AutoencoderSpec(
        image_channels,
        wanted.latent_channels,
        wanted.base_channels,
        wanted.channel_mults,
        wanted.blocks_per_level,
        wanted.groups,
        wanted.middle_attention,
    )


def require_fitting(config: RunConfig, image_shape: ImageShape) -> None:
    """Raise ValueError for images [H, W, C] too small for the discriminator or a loss."""
    height, width, channels = image_shape
    if config.autoencoder.discriminator_from_step:
        PatchDiscriminator(channels, config.autoencoder.discriminator_channels)
        require_patches((height, width))
    least = LEAST_PIXELS if config.autoencoder.perceptual == "lpips" else LEAST_SIDE
    if config.autoencoder.perceptual_weight and min(height, width) < least:
        raise ValueError(
            f"images of {height} x {width} are too small for the perceptual loss, which needs "
            f"{least} pixels a side: set autoencoder.perceptual_weight=0"
        )


def adversary(config: RunConfig, network: nn.Module, device: torch.device) -> Adversary | None:
    """The initial adversary of an autoencoder as it computes; None without a discriminator."""
    assert isinstance(network, Autoencoder)
    wanted, training = config.autoencoder, config.training
    if not wanted.discriminator_from_step:
        return None
    discriminator = PatchDiscriminator(network.spec.image_channels, wanted.discriminator_channels)
    discriminator.to(device).to(memory_format=memory_format(training))  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(
        discriminator.parameters(), lr=training.learning_rate, betas=ADVERSARY_BETAS, fused=True
    )
    weights = Bf16Weights(discriminator) if training.precision == "bf16_weights" else None
    none = torch.zeros((), device=device)
    return Adversary(discriminator, optimizer, network.last_layer, none, weights)


def autoencoder_objective(
    config: RunConfig, state: TrainingState, device: torch.device, cache: Path
) -> AutoencoderObjective:
    """The training objective of `state`'s autoencoder; `cache`: folder of downloaded weights."""
    wanted, model = config.autoencoder, state.model
    assert isinstance(model, Autoencoder)
    perceptual = _perceptual(config, device, cache) if wanted.perceptual_weight else None
    return AutoencoderObjective(
        config.seed,
        model.spec,
        wanted.loss,
        wanted.kl_weight,
        gradient_difference_weight=wanted.gradient_difference_weight,
        perceptual_weight=wanted.perceptual_weight,
        perceptual=perceptual,
        adversary=state.adversary,
        adversary_from_step=wanted.discriminator_from_step,
        adversary_weight=wanted.discriminator_weight,
        flip=config.data.flip,
        memory_format=memory_format(config.training),
        **gradient_settings(config.training, state),
    )


def _perceptual(config: RunConfig, device: torch.device, cache: Path) -> Perceptual:
    """The perceptual distance, as configured."""
    match config.autoencoder.perceptual:
        case "inception":
            weights = config.evaluation
            path = checksummed.fetch(weights.weights, weights.weights_sha256, cache)
            network = load_inception(path, (PERCEPTUAL_WIDTH,), "original").to(device)
            if config.training.precision == "bf16_weights":
                network.bfloat16()
                return PerceptualDistance(lambda x: network.first_stages(x.bfloat16()))
            return PerceptualDistance(network.first_stages)
        case "lpips":
            return load_lpips(device)
        case never:
            assert_never(never)
