"""Build the network of a run, or its spec, from the run's config: one `match` per choice."""

from dataclasses import replace
from typing import assert_never

from ddpm_ray.assembly.autoencoder import autoencoder_spec
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.classifier import NoisyClassifier
from ddpm_ray.models.dit import DiT, DiTSpec
from ddpm_ray.models.layers import HO, Variant
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec


def network(
    config: RunConfig,
    image_shape: ImageShape,
    variant: Variant = HO,
    *,
    gradient_checkpointing: bool = False,
) -> UNet | DiT | NoisyClassifier | Autoencoder:
    """The network for images [H, W, C]; raises ValueError if H and W do not fit it."""
    match config.task:
        case "autoencoder":
            spec = autoencoder_spec(config, image_shape.channels)
            spec.latent_shape(image_shape[:2])  # raises ValueError
            return Autoencoder(spec)
        case "classifier":  # the config has no other network than a U-Net
            return NoisyClassifier(unet_spec(config, image_shape, variant), image_shape[:2])
        case "denoiser":
            return denoiser_network(config, image_shape, variant, gradient_checkpointing)
        case never:
            assert_never(never)


def denoiser_network(
    config: RunConfig, image_shape: ImageShape, variant: Variant, gradient_checkpointing: bool
) -> UNet | DiT:
    """The network of a denoiser for images [H, W, C]; raises ValueError as `network` does."""
    learns_uncertainty = config.objective.weighting == "uncertainty"
    match config.model.network:
        case "unet":
            return UNet(
                unet_spec(config, image_shape, variant),
                learns_uncertainty=learns_uncertainty,
                gradient_checkpointing=gradient_checkpointing,
            )
        case "dit":
            return DiT(
                dit_spec(config, image_shape),
                learns_uncertainty=learns_uncertainty,
                gradient_checkpointing=gradient_checkpointing,
            )
        case never:
            assert_never(never)


def network_spec(
    config: RunConfig, image_shape: ImageShape, variant: Variant = HO
) -> UNetSpec | DiTSpec | AutoencoderSpec:
    """The spec of the network for images [H, W, C]; for a classifier, that of its U-Net.

    Raises ValueError as `unet_spec` does.
    """
    match config.architecture:
        case "autoencoder":
            return autoencoder_spec(config, image_shape.channels)
        case "unet":
            return unet_spec(config, image_shape, variant)
        case "dit":
            return dit_spec(config, image_shape)
        case never:
            assert_never(never)


def unet_spec(config: RunConfig, image_shape: ImageShape, variant: Variant = HO) -> UNetSpec:
    """The spec of the U-Net for images [H, W, C]; raises ValueError if H and W do not fit it."""
    height, width, channels = image_shape
    model = config.model
    spec = UNetSpec(
        channels,
        model.base_channels,
        model.channel_mults,
        model.blocks_per_level,
        dropout=model.dropout,
        groups=model.groups,
        num_classes=model.num_classes,
        condition_channels=condition_channels(config, image_shape),
        learns_variance=config.objective.variance != "fixed",
        variant=replace(variant, head_channels=model.head_channels or variant.head_channels),
    )
    spec.require_divisible((height, width))
    factors = model.for_images(height, width).attention_factors
    assert factors is not None  # for_images sets it
    return replace(spec, attention_factors=factors)


def dit_spec(config: RunConfig, image_shape: ImageShape) -> DiTSpec:
    """The spec of the DiT for images [H, W, C]."""
    height, width, channels = image_shape
    model = config.model
    return DiTSpec(
        (height, width),
        channels,
        **model.dit_sizes._asdict(),
        dropout=model.dropout,
        num_classes=model.num_classes,
        condition_channels=condition_channels(config, image_shape),
        learns_variance=config.objective.variance != "fixed",
        mlp_norm_eps=model.mlp_norm_eps,
    )


def condition_channels(config: RunConfig, image_shape: ImageShape) -> int:
    """Channels of the conditioning images that the denoiser takes."""
    objective = config.objective
    images = objective.self_conditioning + bool(objective.low_resolution_pixels)
    known = image_shape.channels + 1 if objective.inpainting_masks else 0  # and their mask
    return image_shape.channels * images + known
