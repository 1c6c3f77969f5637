"""diffusers' UNet2DConditionModel, the network of Stable Diffusion, as our U-Net, and back.

A config is supported if the round trip returns it unchanged, apart from the keys of `_comparable`;
the first key with another value is named in the error. The text encoder is no part of the network.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ddpm_ray.models.interop import state_dict_names
from ddpm_ray.models.interop.diffusers_config import (
    Config,
    UnsupportedModelError,
    common_config,
    full_config,
    image_size_of,
    refused_if_invalid,
    require_equal,
)
from ddpm_ray.models.interop.layouts import Layout, Tensors, gathered, on_meta_device, scattered
from ddpm_ray.models.layers import Variant
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextEncoderSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec

CLASS = "UNet2DConditionModel"
LAYOUT = Layout(CLASS, state_dict_names.diffusers)
WITH_TEXT, PLAIN, MIDDLE = "CrossAttn{}Block2D", "{}Block2D", "UNetMidBlock2DCrossAttn"
DEFAULTS: Config = {  # of UNet2DConditionModel, for keys that a file omits
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [*[WITH_TEXT.format("Down")] * 3, "DownBlock2D"],
    "mid_block_type": MIDDLE,
    "up_block_types": ["UpBlock2D", *[WITH_TEXT.format("Up")] * 3],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
OF_ATTENTION = "attention_head_dim", "cross_attention_dim", "transformer_layers_per_block"
WITHOUT_EFFECT = (
    "upcast_attention",  # a precision: the function is the same
    "use_linear_projection",  # a dense layer is a 1x1 convolution
    "addition_embed_type_num_heads",  # of an embedding that is refused
)


def text_unet_from_diffusers(
    config: Config, tensors: Tensors, text: TextEncoderSpec | FrozenTextSpec
) -> tuple[UNetSpec, dict[str, Tensor]]:
    """UNet's arguments, and its state_dict without a text encoder, from theirs.

    `text` is the text encoder of the pipeline. `num_class_embeds` includes the null label. Raises
    UnsupportedModelError.
    """
    spec = text_unet_spec(config, text)
    return spec, gathered(LAYOUT, _network(spec), tensors)


def text_unet_to_diffusers(
    spec: UNetSpec, tensors: Tensors, image_size: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors for `UNet2DConditionModel.from_pretrained`.

    The text encoder in `tensors` is left out. With `head_channels` the file has the form of Stable
    Diffusion 2 (a list of heads, dense projections), else that of Stable Diffusion 1 (a number of
    heads, 1x1 convolutions). Raises UnsupportedModelError for a spec without an equivalent.
    """
    config = text_unet_config(spec, image_size)
    own = {name: one for name, one in tensors.items() if not name.startswith("text.")}
    theirs = scattered(LAYOUT, _network(spec), own)
    if not config["use_linear_projection"]:
        for name, tensor in theirs.items():
            if name.endswith((".proj_in.weight", ".proj_out.weight")):
                theirs[name] = tensor[..., None, None]
    return config, theirs


def text_unet_spec(config: Config, text: TextEncoderSpec | FrozenTextSpec) -> UNetSpec:
    """UNet's arguments from a config.json; raises UnsupportedModelError."""
    full, image_size = full_config(config, DEFAULTS, CLASS), image_size_of(config, CLASS)
    with refused_if_invalid(CLASS):
        spec = _spec(full, text)
        back = _config(spec, image_size)
        held, ours = _comparable(full), _comparable(back)
    require_equal({**held, "sample_size": back["sample_size"]}, ours, CLASS)
    return spec


def text_unet_config(spec: UNetSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The config.json of the equivalent `UNet2DConditionModel`; raises UnsupportedModelError."""
    if spec.text is None or not spec.transformer_depth:
        problem = "a network without spatial transformers, which attend to a text, has no place"
        raise UnsupportedModelError(CLASS, problem)
    with refused_if_invalid(CLASS):
        config = _config(spec, image_size)
        back = _spec(config, spec.text)
    factors = sorted(spec.attention_factors)
    require_equal({**vars(spec), "attention_factors": factors}, vars(back), CLASS)
    return {"_class_name": CLASS, **config}


def _spec(config: Config, text: TextEncoderSpec | FrozenTextSpec) -> UNetSpec:
    """The spec that matches the full config most closely; the caller checks the round trip."""
    widths, inputs, outputs = (
        config[key] for key in ("block_out_channels", "in_channels", "out_channels")
    )
    learns_variance = outputs == 2 * inputs
    channels = inputs if learns_variance else min(inputs, outputs)
    attends, (num_heads, head_channels) = _attends(config), _heads(config)
    if (width := _by_level(config, "cross_attention_dim")[-1]) != text.width:
        raise UnsupportedModelError(
            CLASS, f"cross_attention_dim is {width}, and the text encoder's width {text.width}"
        )
    return UNetSpec(
        image_channels=channels,
        base_channels=widths[0],
        channel_mults=tuple(width // widths[0] for width in widths),
        blocks_per_level=_by_level(config, "layers_per_block")[0],
        attention_factors=tuple(2**level for level, on in enumerate(attends) if on),
        dropout=config["dropout"],
        groups=config["norm_num_groups"],
        num_classes=(config["num_class_embeds"] or 1) - 1,
        condition_channels=inputs - channels,
        learns_variance=learns_variance,
        variant=Variant(
            norm_eps=config["norm_eps"],
            scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
            pads_both_sides=config["downsample_padding"] == 1,
            cosines_first=config["flip_sin_to_cos"],
            frequency_shift=config["freq_shift"],
            num_heads=num_heads,
            head_channels=head_channels,
        ),
        text=text,
        transformer_depth=_by_level(config, "transformer_layers_per_block")[-1],
        pools_text=False,
    )


def _heads(config: Config) -> tuple[int, int]:
    """num_heads and head_channels of a Variant.

    attention_head_dim is the number of heads, in spite of its name: a list has one for each level.
    """
    counts, widths = _by_level(config, "attention_head_dim"), config["block_out_channels"]
    if isinstance(config["attention_head_dim"], int):
        return counts[0], 0
    if widths[-1] % counts[-1] == 0:
        channels = widths[-1] // counts[-1]
        levels = [level for level, on in enumerate(_attends(config)) if on]
        if all(counts[level] * channels == widths[level] for level in levels):
            return 1, channels
    return counts[-1], 0


def _config(spec: UNetSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The full config of a spec with text."""
    assert spec.text is not None
    variant, levels = spec.variant, range(len(spec.channel_mults))
    kinds = [WITH_TEXT if spec.attends(level) else PLAIN for level in levels]
    heads: int | list[int] = variant.num_heads
    if variant.head_channels:
        heads = [max(1, width // variant.head_channels) for width in spec.widths]
    return {
        **DEFAULTS,
        **common_config(spec, image_size, kinds),
        "attention_head_dim": heads,
        "cross_attention_dim": spec.text.width,
        "transformer_layers_per_block": spec.transformer_depth,
        "use_linear_projection": bool(variant.head_channels),
    }


def _comparable(config: Config) -> dict[str, Any]:
    """The config by what it computes: lists where a number may stand for all levels.

    Of levels without attention, what only attentions read is None.
    """
    attends = [*_attends(config)[:-1], True]  # the middle is as the last level
    kept = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT}
    for key in OF_ATTENTION:
        values = _by_level(config, key)
        kept[key] = [one if on else None for one, on in zip(values, attends, strict=True)]
    kept["layers_per_block"] = _by_level(config, "layers_per_block")
    kept["only_cross_attention"] = _by_level(config, "only_cross_attention")
    kept["mid_block_only_cross_attention"] = config["mid_block_only_cross_attention"] or None
    return kept


def _attends(config: Config) -> list[bool]:
    """Whether each level attends to the text."""
    return [kind.startswith("CrossAttn") for kind in config["down_block_types"]]


def _by_level(config: Config, key: str) -> list[Any]:
    """The value of each level; one that is no list stands for all."""
    value, levels = config[key], len(config["block_out_channels"])
    return [*value] if isinstance(value, list | tuple) else [value] * levels


def _network(spec: UNetSpec) -> UNet:
    """The network without its text encoder, on the meta device."""
    assert spec.text is not None
    width = spec.text.width
    return on_meta_device(lambda: UNet(replace(spec, text=FrozenTextSpec(width, width, (0,)))))
