"""Import and export of autoencoders: diffusers' AutoencoderKL.

A config is supported if the round trip returns it unchanged; the first key with another value is
named in the error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.interop import state_dict_names
from ddpm_ray.models.interop.diffusers_config import (
    Config,
    full_config,
    image_size_of,
    refused_if_invalid,
    require_equal,
    sample_size_of,
)
from ddpm_ray.models.interop.diffusers_files import (
    Write,
    autoencoder_folder,
    read_json,
    read_weights,
    weights_file,
    with_new_attention_names,
    write_json,
    write_weights,
)
from ddpm_ray.models.interop.layouts import Layout, Tensors, gathered, on_meta_device, scattered

CLASS = "AutoencoderKL"
PIPELINE: Config = {  # what only pipelines read, with AutoencoderKL's defaults
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
}
UNSCALED: Config = {**PIPELINE, "scaling_factor": 1.0}
"""Values for an autoencoder of ours: pipelines diffuse its latents as they are."""
PER_CHANNEL = ("shift_factor", "latents_mean", "latents_std")
"""Keys that LDMPipeline and DiTPipeline ignore."""
AUTOENCODER_KL: Config = {  # defaults of AutoencoderKL, for keys that a file omits
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    **PIPELINE,
}
LAYOUT = Layout(CLASS, state_dict_names.diffusers_autoencoder)


class DiffusersAutoencoder(NamedTuple):
    """An autoencoder that diffusers saved, by the names of Autoencoder."""

    spec: AutoencoderSpec
    tensors: dict[str, Tensor]
    image_size: tuple[int, int]  # (H, W)
    pipeline: dict[str, Any]  # values of the keys of PIPELINE
    weights_file: Path


def from_diffusers(config: Config, tensors: Tensors) -> tuple[AutoencoderSpec, dict[str, Tensor]]:
    """The spec and state_dict of `Autoencoder` from an AutoencoderKL's config.json and tensors.

    Raises UnsupportedModelError.
    """
    spec = spec_from_config(config)
    return spec, gathered(LAYOUT, _network(spec), with_new_attention_names(tensors))


def to_diffusers(
    spec: AutoencoderSpec,
    tensors: Tensors,
    image_size: tuple[int, int],
    pipeline: Mapping[str, Any] = PIPELINE,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and tensors that `AutoencoderKL.from_pretrained` reads as this network.

    `pipeline` holds values of PIPELINE's keys. Raises UnsupportedModelError.
    """
    config = {"_class_name": CLASS, **_config(spec, image_size), **pipeline}
    return config, scattered(LAYOUT, _network(spec), tensors)


def standardised(
    spec: AutoencoderSpec, tensors: Tensors, mean: Sequence[float], std: Sequence[float]
) -> tuple[AutoencoderSpec, dict[str, Tensor]]:
    """The autoencoder whose latents are (z - mean) / std, per channel, for latents z of this one.

    Its 1x1 convolutions contain the map, computed in float64; if `spec` has none, they are added.
    Its log variances, those of z minus 2 log(std), are clamped after the map, not before it.
    """
    c = spec.latent_channels
    m, s = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    moments, moments_bias = _latent_conv(spec, tensors, "moments_conv", 2 * c)
    latents, latents_bias = _latent_conv(spec, tensors, "latents_conv", c)
    scale = torch.cat([1 / s, torch.ones_like(s)])
    shift = torch.cat([-m / s, -2 * s.log()])
    folded = {
        "moments_conv.weight": (moments * scale[:, None])[..., None, None],
        "moments_conv.bias": moments_bias * scale + shift,
        "latents_conv.weight": (latents * s)[..., None, None],
        "latents_conv.bias": latents_bias + latents @ m,
    }
    named = {name: tensor.float() for name, tensor in folded.items()}
    return replace(spec, latent_convs=True), {**tensors, **named}


def _latent_conv(
    spec: AutoencoderSpec, tensors: Tensors, name: str, channels: int
) -> tuple[Tensor, Tensor]:
    """Matrix [n, n] and bias [n] in float64 of a 1x1 convolution; the identity if there is none."""
    if not spec.latent_convs:
        identity = torch.eye(channels, dtype=torch.float64)
        return identity, identity.new_zeros(channels)
    weight, bias = (tensors[f"{name}.{part}"].cpu().double() for part in ("weight", "bias"))
    return weight.reshape(channels, channels), bias


def in_folder(folder: str | Path) -> bool:
    """Whether diffusers saved an autoencoder in a local folder, or in vae/ or vqvae/ of it."""
    home = _home(folder)
    return (home / "config.json").is_file() and weights_file(home).is_file()


def is_autoencoder(folder: str | Path) -> bool:
    """Whether `in_folder` finds an AutoencoderKL, and not another model."""
    return in_folder(folder) and read_json(files_of(folder)[0]).get("_class_name") == CLASS


def files_of(folder: str | Path) -> tuple[Path, Path]:
    """The config.json and the weights file of the autoencoder that `in_folder` finds."""
    home = _home(folder)
    return home / "config.json", weights_file(home)


def read_config(folder: str | Path) -> tuple[AutoencoderSpec, dict[str, Any]]:
    """Sizes of the autoencoder that `read_folder` reads, and its values of PIPELINE's keys."""
    home = _home(folder)
    config = read_json(home / "config.json")
    spec, full = spec_from_config(config), full_config(config, AUTOENCODER_KL, CLASS)
    return spec, {key: full[key] for key in PIPELINE}


def read_folder(folder: str | Path) -> DiffusersAutoencoder:
    """Read the autoencoder in a folder that diffusers saved, or in vae/ or vqvae/ of a pipeline's.

    Raises UnsupportedModelError.
    """
    home = _home(folder)
    _, pipeline = read_config(home)  # raises before large weights are read
    config, weights = read_json(home / "config.json"), weights_file(home)
    spec, tensors = from_diffusers(config, read_weights(weights))
    full = full_config(config, AUTOENCODER_KL, CLASS)
    return DiffusersAutoencoder(spec, tensors, image_size_of(full, CLASS), pipeline, weights)


def write_folder(
    folder: str | Path,
    spec: AutoencoderSpec,
    tensors: Tensors,
    image_size: tuple[int, int],
    write: Write,
    *,
    pipeline: Mapping[str, Any] = PIPELINE,
) -> None:
    """Save for `AutoencoderKL.from_pretrained(folder)`; raises UnsupportedModelError.

    config.json comes last: without it the folder is not a model.
    """
    config, theirs = to_diffusers(spec, tensors, image_size, pipeline)
    write_weights(folder, theirs, write)
    write_json(f"{folder}/config.json", config, write)


def spec_from_config(config: Config) -> AutoencoderSpec:
    """The sizes of an AutoencoderKL from its config.json; raises UnsupportedModelError."""
    full = full_config(config, AUTOENCODER_KL, CLASS)
    image_size = image_size_of(full, CLASS)
    with refused_if_invalid(CLASS):
        spec = _spec(full)
        spec.require_consistent()
        back = _config(spec, image_size)
    asked = {key: value for key, value in full.items() if key not in PIPELINE}
    require_equal({**asked, "sample_size": back["sample_size"]}, back, CLASS)
    return spec


def _spec(config: Config) -> AutoencoderSpec:
    """The spec that matches the full config most closely; the caller checks the round trip."""
    widths = config["block_out_channels"]
    return AutoencoderSpec(
        image_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        base_channels=widths[0],
        channel_mults=tuple(width // widths[0] for width in widths),
        blocks_per_level=config["layers_per_block"],
        groups=config["norm_num_groups"],
        middle_attention=config["mid_block_add_attention"],
        latent_convs=config["use_quant_conv"],
    )


def _config(spec: AutoencoderSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The full config of a spec, without PIPELINE's keys."""
    levels = len(spec.channel_mults)
    return {
        "in_channels": spec.image_channels,
        "out_channels": spec.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": spec.widths,
        "layers_per_block": spec.blocks_per_level,
        "act_fn": "silu",
        "latent_channels": spec.latent_channels,
        "norm_num_groups": spec.groups,
        "sample_size": sample_size_of(image_size),
        "use_quant_conv": spec.latent_convs,
        "use_post_quant_conv": spec.latent_convs,
        "mid_block_add_attention": spec.middle_attention,
    }


def _home(folder: str | Path) -> Path:
    """The folder of the autoencoder: that of a pipeline's folder, or `folder` itself."""
    return autoencoder_folder(folder) or Path(folder)


def _network(spec: AutoencoderSpec) -> Autoencoder:
    """The network on the meta device; raises UnsupportedModelError for an inconsistent spec."""
    return on_meta_device(lambda: Autoencoder(spec))
