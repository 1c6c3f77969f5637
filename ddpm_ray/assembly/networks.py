"""Build the network of a run, or its spec, from the run's config: one `match` per choice."""

from dataclasses import replace
from typing import assert_never

from ddpm_ray.assembly.autoencoder import autoencoder_spec
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.text import TextConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.classifier import NoisyClassifier
from ddpm_ray.models.contrastive import ContrastiveEncoders, ContrastiveSpec
from ddpm_ray.models.dit import DiT, DiTSpec
from ddpm_ray.models.layers import HO, Variant
from ddpm_ray.models.prior import Prior, PriorSpec
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextEncoderSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec, require_divisible


def network(
    config: RunConfig,
    image_shape: ImageShape,
    variant: Variant = HO,
    tokenizer: Tokenizer | None = None,
    *,
    frozen_text: FrozenTextSpec | None = None,
    gradient_checkpointing: bool = False,
) -> UNet | DiT | NoisyClassifier | Autoencoder | ContrastiveEncoders | Prior:
    """The network for images [H, W, C]; raises ValueError if H and W do not fit it.

    `tokenizer` is that of its texts, `frozen_text` the spec of a text encoder that is trained
    elsewhere.
    """
    match config.task:
        case "autoencoder":
            spec = autoencoder_spec(config, image_shape.channels)
            spec.latent_shape(image_shape[:2])  # raises ValueError
            return Autoencoder(spec)
        case "contrastive":
            require_divisible(image_shape[:2], len(config.contrastive.channel_mults))
            return ContrastiveEncoders(contrastive_spec(config, image_shape.channels, tokenizer))
        case "prior":
            return Prior(prior_spec(config, image_shape.channels, tokenizer, frozen_text))
        case "classifier":  # the config has no other network than a U-Net
            return NoisyClassifier(unet_spec(config, image_shape, variant), image_shape[:2])
        case "denoiser":
            of = denoiser_spec(config, image_shape, variant, tokenizer, frozen_text)
            return denoiser_network(config, of, gradient_checkpointing)
        case never:
            assert_never(never)


def denoiser_network(
    config: RunConfig, spec: UNetSpec | DiTSpec, gradient_checkpointing: bool
) -> UNet | DiT:
    """The network of a denoiser with this spec."""
    uncertain = config.objective.weighting == "uncertainty"
    if isinstance(spec, UNetSpec):
        return UNet(
            spec, learns_uncertainty=uncertain, gradient_checkpointing=gradient_checkpointing
        )
    return DiT(spec, learns_uncertainty=uncertain, gradient_checkpointing=gradient_checkpointing)


def network_spec(
    config: RunConfig,
    image_shape: ImageShape,
    variant: Variant = HO,
    tokenizer: Tokenizer | None = None,
    frozen_text: FrozenTextSpec | None = None,
) -> UNetSpec | DiTSpec | AutoencoderSpec | ContrastiveSpec | PriorSpec:
    """The spec of the network for images [H, W, C]; for a classifier, that of its U-Net.

    Raises ValueError as `unet_spec` does.
    """
    if config.architecture == "autoencoder":
        return autoencoder_spec(config, image_shape.channels)
    if config.architecture == "contrastive":
        return contrastive_spec(config, image_shape.channels, tokenizer)
    if config.architecture == "prior":
        return prior_spec(config, image_shape.channels, tokenizer, frozen_text)
    return denoiser_spec(config, image_shape, variant, tokenizer, frozen_text)


def prior_spec(
    config: RunConfig,
    embedding_width: int,
    tokenizer: Tokenizer | None,
    frozen_text: FrozenTextSpec | None,
) -> PriorSpec:
    """The spec of a prior of embeddings of that width."""
    wanted, text = config.prior, text_spec(config.text, tokenizer, frozen_text)
    return PriorSpec(embedding_width, text, wanted.width, wanted.depth, wanted.heads)


def denoiser_spec(
    config: RunConfig,
    image_shape: ImageShape,
    variant: Variant,
    tokenizer: Tokenizer | None,
    frozen_text: FrozenTextSpec | None,
) -> UNetSpec | DiTSpec:
    """The spec of a denoiser's network for images [H, W, C]; raises ValueError as `unet_spec`."""
    text = text_spec(config.text, tokenizer, frozen_text) if config.takes_text else None
    match config.model.network:
        case "unet":
            unet = unet_spec(config, image_shape, variant)
            return replace(
                unet,
                text=text,
                embedding_width=config.embedding.width,
                transformer_depth=config.model.transformer_depth,
                pools_text=config.text.pooled,
            )
        case "dit":
            dit = dit_spec(config, image_shape)
            return replace(
                dit,
                text=text,
                embedding_width=config.embedding.width,
                pools_text=config.text.pooled,
            )
        case never:
            assert_never(never)


def contrastive_spec(
    config: RunConfig, image_channels: int, tokenizer: Tokenizer | None
) -> ContrastiveSpec:
    """The spec of image and text encoder for images of `image_channels`."""
    wanted = config.contrastive
    return ContrastiveSpec(
        image_channels,
        wanted.base_channels,
        wanted.channel_mults,
        wanted.blocks_per_level,
        wanted.groups,
        wanted.width,
        text_encoder_spec(config.text, tokenizer),
        learns_bias=wanted.loss == "sigmoid",
    )


def text_spec(
    config: TextConfig, tokenizer: Tokenizer | None, frozen: FrozenTextSpec | None
) -> TextEncoderSpec | FrozenTextSpec:
    """The spec of a denoiser's text; a frozen one that is not given is for checks of shapes."""
    ours = text_encoder_spec(config, tokenizer)
    if config.frozen:
        return frozen or FrozenTextSpec(ours.width, ours.width, ours.null_tokens)
    return ours


def text_encoder_spec(config: TextConfig, tokenizer: Tokenizer | None) -> TextEncoderSpec:
    """The spec of the text encoder; one without a tokenizer is for checks of shapes alone."""
    vocabulary, end, null = config.vocabulary, 1, (0, *[1] * (config.length - 1))
    if tokenizer is not None:
        vocabulary, end, null = tokenizer.vocabulary, tokenizer.end_token, tokenizer.null_tokens
    sizes = config.width, config.depth, config.heads
    return TextEncoderSpec(vocabulary, end, null, *sizes, quick_gelu=config.quick_gelu)


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
