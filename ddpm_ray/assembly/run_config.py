"""A run's config and codec as its checkpoints store them, and what a continued run may change."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ddpm_ray.config.loading import defining, from_dict
from ddpm_ray.config.option_fields import shown
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.shard_index import CODECS
from ddpm_ray.models.layers import Variant
from ddpm_ray.storage.file_formats import NewerFormatError, package_version


def saved_config(facts: Mapping[str, Any], where: str = "") -> RunConfig:
    """The run config stored in a checkpoint's facts or in a run's identity.

    `where` is its URL, for errors; an identity contains it. Raises ConfigError, which names the
    version that stored the config, if this version cannot read it.
    """
    where = where or facts.get("folder", "")
    return from_dict(RunConfig, facts["config"], facts.get("version", ""), where)


def saved_codec(facts: Mapping[str, Any], where: str = "") -> Codec:
    """The codec of the data that a checkpoint with these facts was trained on.

    Checkpoints of earlier versions name none: they hold pixels. A codec of latents is not bound to
    an autoencoder (see `latents.bound_codec`). `where` is the checkpoint's URL, for errors. Raises
    NewerFormatError for a codec that this version does not know.
    """
    name = facts.get("codec", "pixels")
    if name not in CODECS:
        here = f"ddpm_ray {package_version()} knows {', '.join(CODECS)}"
        reason = f"its codec is {shown(name)}, and {here}"
        raise NewerFormatError(where, reason, "upgrade ddpm_ray to the version that wrote it")
    if name == "pixels":
        return PIXELS
    held = facts["latents"]
    statistics = tuple(map(float, held["mean"])), tuple(map(float, held["std"]))
    return LatentCodec(held["channels"], held["factor"], tuple(held["views"]), *statistics)


def saved_variant(facts: Mapping[str, Any], where: str = "") -> Variant:
    """The variant of the network of a checkpoint with these facts.

    Imported networks name one; all others are Ho et al.'s. `where` is the checkpoint's URL, for
    errors. Raises NewerFormatError for a variant that this version does not know.
    """
    try:
        return Variant(**facts.get("variant", {}))
    except TypeError as error:
        here = f"ddpm_ray {package_version()} does not know"
        reason = f"its variant is {shown(facts['variant'])}, which {here}"
        remedy = "upgrade ddpm_ray to the version that wrote it"
        raise NewerFormatError(where, reason, remedy) from error


def for_images(config: RunConfig, image_shape: ImageShape) -> RunConfig:
    """`config` with attention by downsampling factor, for images [H, W, C].

    Raises ValueError for a resolution in pixels that no level has.
    """
    model = config.model.for_images(image_shape.height, image_shape.width)
    return replace(config, model=model)


def changed_keys(config: RunConfig, saved: Mapping[str, Any], image_shape: ImageShape) -> list[str]:
    """One line for each defining key whose value differs from that of the saved config.

    `saved` is as in `saved_config`; the data set holds images [H, W, C].
    """
    now, then = (defining(comparable(one, image_shape)) for one in (config, saved_config(saved)))
    return [
        f"{key} is {now[key]}, but the run began with {then[key]}"
        for key in now
        if now[key] != then[key]
    ]


def comparable(config: RunConfig, image_shape: ImageShape) -> RunConfig:
    """Return `for_images`, or `config` unchanged if it is for images of another size."""
    try:
        return for_images(config, image_shape)
    except ValueError:
        return config
