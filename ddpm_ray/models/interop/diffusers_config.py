"""Convert the config of a diffusers UNet2DModel to UNet's arguments, and back.

Each direction is one function. A config is supported if the round trip returns it unchanged; the
first key with another value is named in the error.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from ddpm_ray.models.layers import Variant
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.redaction import sanitize

Config: TypeAlias = Mapping[str, Any]  # of a JSON file

UNET: Config = {  # defaults of UNet2DModel, for keys that a file omits
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}


class UnsupportedModelError(ValueError):
    """The model cannot be imported or exported exactly; args are (where, problem)."""

    def __str__(self) -> str:
        where, problem = self.args
        return sanitize(f"{where}: {problem}")


def spec_from_config(config: Config) -> UNetSpec:
    """UNet's arguments from a config.json of `UNet2DModel`; raises UnsupportedModelError."""
    full, image_size = full_config(config, UNET, "UNet2DModel"), image_size_of(config)
    with refused_if_invalid("UNet2DModel"):
        spec = _spec(full)
        back = _unet_config(spec, image_size)
    require_equal({**full, "sample_size": back["sample_size"]}, back, "UNet2DModel")
    return spec


def image_size_of(config: Config, where: str = "UNet2DModel") -> tuple[int, int]:
    """(H, W) of the images of a model, of class `where`; raises UnsupportedModelError."""
    match config.get("sample_size"):
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case found:
            raise UnsupportedModelError(
                where, f"sample_size is {found!r}; supported is a side, or height and width"
            )


def sample_size_of(image_size: tuple[int, int]) -> int | list[int]:
    """The sample_size of a config for images (H, W): the reverse of `image_size_of`."""
    height, width = image_size
    return height if height == width else [height, width]


def config_from_spec(spec: UNetSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The config.json of the equivalent `UNet2DModel`; raises UnsupportedModelError."""
    config = _unet_config(spec, image_size)
    factors = sorted(spec.attention_factors)
    require_equal({**vars(spec), "attention_factors": factors}, vars(_spec(config)), "UNet2DModel")
    return {"_class_name": "UNet2DModel", **config}


def _spec(config: Config) -> UNetSpec:
    """The spec that matches the full config most closely; the caller checks the round trip."""
    widths, inputs, outputs = (
        config[key] for key in ("block_out_channels", "in_channels", "out_channels")
    )
    learns_variance = outputs == 2 * inputs
    channels = inputs if learns_variance else min(inputs, outputs)
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    return UNetSpec(
        image_channels=channels,
        base_channels=widths[0],
        channel_mults=tuple(width // widths[0] for width in widths),
        blocks_per_level=config["layers_per_block"],
        attention_factors=tuple(2**level for level, on in enumerate(attends) if on),
        dropout=config["dropout"],
        groups=config["norm_num_groups"],
        num_classes=(config["num_class_embeds"] or 1) - 1,
        condition_channels=inputs - channels,
        learns_variance=learns_variance,
        variant=Variant(
            norm_eps=config["norm_eps"],
            head_channels=config["attention_head_dim"] or 0,
            scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
            resampling_blocks=config["downsample_type"] == "resnet",
            pads_both_sides=config["downsample_padding"] == 1,
            cosines_first=config["flip_sin_to_cos"],
            frequency_shift=config["freq_shift"],
        ),
    )


def common_config(
    spec: UNetSpec, image_size: tuple[int, int], kinds: Sequence[str]
) -> dict[str, Any]:
    """The keys that the U-Nets of diffusers share; `kinds` are the names of the levels' blocks."""
    variant = spec.variant
    return {
        "sample_size": sample_size_of(image_size),
        "in_channels": spec.image_channels + spec.condition_channels,
        "out_channels": spec.image_channels * (2 if spec.learns_variance else 1),
        "freq_shift": variant.frequency_shift,
        "flip_sin_to_cos": variant.cosines_first,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "block_out_channels": spec.widths,
        "layers_per_block": spec.blocks_per_level,
        "downsample_padding": int(variant.pads_both_sides),
        "dropout": spec.dropout,
        "norm_num_groups": spec.groups,
        "norm_eps": variant.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if variant.scale_shift else "default",
        "num_class_embeds": spec.num_classes + 1 if spec.num_classes else None,
    }


def _unet_config(spec: UNetSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The full config of a spec."""
    variant, levels = spec.variant, range(len(spec.channel_mults))
    plain = "Resnet{}sampleBlock2D" if variant.resampling_blocks else "{}Block2D"
    kinds = ["Attn{}Block2D" if spec.attends(level) else plain for level in levels]
    resampling = "resnet" if variant.resampling_blocks else "conv"
    return {
        **UNET,
        **common_config(spec, image_size, kinds),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": variant.head_channels or None,
        # With scale_shift, diffusers builds the middle attention without a norm unless this is set.
        "attn_norm_num_groups": spec.groups if variant.scale_shift else None,
    }


def full_config(config: Config, defaults: Config, *classes: str) -> dict[str, Any]:
    """The config with defaults for missing keys and without private keys (`_...`)."""
    kind = config.get("_class_name", classes[0])
    if kind not in classes:
        raise UnsupportedModelError(
            "_class_name", f"it is {kind!r}; supported is {' or '.join(classes)}"
        )
    return {**defaults, **{key: value for key, value in config.items() if key[0] != "_"}}


@contextmanager
def refused_if_invalid(where: str) -> Iterator[None]:
    """Raise UnsupportedModelError for what a config with wrong types or sizes causes inside."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise UnsupportedModelError(where, f"its config is invalid ({error!r})") from error


def require_equal(asked: Config, got: Config, where: str) -> None:
    """Raises UnsupportedModelError for the first key whose values differ."""
    for key, value in asked.items():
        if key not in got:
            raise UnsupportedModelError(where, f"{key} is {value!r}, a key that is not supported")
        if _plain(value) != _plain(got[key]):
            raise UnsupportedModelError(
                where, f"{key} is {value!r}; with the other keys only {got[key]!r} is supported"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
