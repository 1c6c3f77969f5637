"""Convert diffusers configs to UNet's arguments and a run's settings, and back.

Each direction is one function. A config is supported if the round trip returns it unchanged; the
first key with another value is named in the error.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from ddpm_ray.models.layers import Variant
from ddpm_ray.models.unet import Sizes
from ddpm_ray.redaction import sanitize

Config: TypeAlias = Mapping[str, Any]  # of a JSON file
Facts: TypeAlias = Mapping[str, Mapping[str, Any]]

UNET: Config = {  # defaults of UNet2DModel, for keys that a file omits
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0,
    "flip_sin_to_cos": True, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "downsample_padding": 1,
    "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None,
    "norm_eps": 1e-5, "resnet_time_scale_shift": "default", "add_attention": True,
    "class_embed_type": None, "num_class_embeds": None, "num_train_timesteps": None,
}  # fmt: skip
SCHEDULER: Config = {  # defaults of DDPMScheduler
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "variance_type": "fixed_small", "clip_sample": True,
    "clip_sample_range": 1.0, "prediction_type": "epsilon", "thresholding": False,
    "rescale_betas_zero_snr": False,
}  # fmt: skip
OF_A_CALL = {  # keys of one sampling call, or of options that are refused above
    "timestep_spacing", "steps_offset", "set_alpha_to_one", "dynamic_thresholding_ratio",
    "sample_max_value", "timestep_values", "tensor_format",
}  # fmt: skip
OF_SAMPLING = {"variance_type", "clip_sample", "clip_sample_range", "thresholding"}
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x_0", "v_prediction": "v"}
COSINE = {"offset": 0.008, "max_beta": 0.999}
VARIANCES = {  # variance_type: (objective.variance, sampling.variance)
    "fixed_small": ("fixed", "fixed_small"), "fixed_large": ("fixed", "fixed_large"),
    "learned_range": ("learned_range", "learned"),
}  # fmt: skip
LEARNED = (
    "'learned'; diffusers reads the model output as the variance, ddpm-ray as its logarithm: train "
    "with learned_range, which means the same in both"
)


SAMPLING = (
    "_ddpm_ray_sampling"  # extra key of a scheduler's config: the sampling settings of the run
)


class UNetSpec(Sizes):
    """The arguments of UNet that determine its tensors and what they mean."""

    num_classes: int
    condition_channels: int
    learns_variance: bool
    variant: Variant


class UnsupportedModelError(ValueError):
    """The model cannot be imported or exported exactly; args are (where, problem)."""

    def __str__(self) -> str:
        where, problem = self.args
        return sanitize(f"{where}: {problem}")


def spec_from_config(config: Config) -> UNetSpec:
    """UNet's arguments from a config.json of `UNet2DModel`; raises UnsupportedModelError."""
    full, image_size = _full(config, UNET, "UNet2DModel"), image_size_of(config)
    try:
        spec = _spec(full)
        back = _unet_config(spec, image_size)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise UnsupportedModelError("UNet2DModel", f"its config is invalid ({error!r})") from error
    _require_equal({**full, "sample_size": back["sample_size"]}, back, "UNet2DModel")
    return spec


def image_size_of(config: Config) -> tuple[int, int]:
    """(H, W) of the images of a `UNet2DModel`; raises UnsupportedModelError."""
    match config.get("sample_size"):
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case found:
            raise UnsupportedModelError(
                "UNet2DModel", f"sample_size is {found!r}; supported is a side, or height and width"
            )


def config_from_spec(spec: UNetSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The config.json of the equivalent `UNet2DModel`; raises UnsupportedModelError."""
    config = _unet_config(spec, image_size)
    factors = sorted(spec["attention_factors"])
    _require_equal({**spec, "attention_factors": factors}, _spec(config), "UNet2DModel")
    return {"_class_name": "UNet2DModel", **config}


def from_scheduler(config: Config) -> dict[str, dict[str, Any]]:
    """Settings from a scheduler_config.json (DDPM or DDIM); raises UnsupportedModelError.

    A file written by ddpm-ray, of any scheduler class, holds the run's sampling settings in an
    extra key, which is read instead.
    """
    if (noted := config.get(SAMPLING)) is not None:
        if not isinstance(noted, Mapping):
            raise UnsupportedModelError("scheduler", f"{SAMPLING} is {noted!r}; it holds settings")
        learned = config.get("variance_type") == "learned_range"
        trained = {
            key: config[key] for key in SCHEDULER if key in config and key not in OF_SAMPLING
        }
        trained |= {"variance_type": "learned_range"} if learned else {}
        return {**from_scheduler(trained), "sampling": dict(noted)}
    full = _full(config, SCHEDULER, "DDPMScheduler", "DDIMScheduler")
    full = {key: value for key, value in full.items() if key not in OF_A_CALL}
    try:
        betas = full["trained_betas"] and tuple(float(beta) for beta in full["trained_betas"])
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(
            "scheduler", "trained_betas is not a list of numbers"
        ) from error
    if full["variance_type"] == "learned":
        raise UnsupportedModelError("scheduler", f"variance_type is {LEARNED}")
    kind = "betas" if betas is not None else _one_of(KINDS, full, "beta_schedule")
    trained, sampled = _one_of(VARIANCES, full, "variance_type")
    schedule = {"kind": kind, "num_steps": full["num_train_timesteps"],
                "beta_start": full["beta_start"], "beta_end": full["beta_end"],
                "zero_terminal_snr": full["rescale_betas_zero_snr"]}  # fmt: skip
    schedule |= {"betas": betas} if betas is not None else {}
    schedule |= COSINE if kind == "cosine" else {}
    prediction = _one_of(PREDICTIONS, full, "prediction_type")
    facts = {
        "schedule": schedule,
        "objective": {"prediction": prediction, "variance": trained},
        "sampling": {"variance": sampled, "clip": full["clip_sample"]},
    }
    stated = {**full, "beta_schedule": "linear"} if betas is not None else full
    _require_equal(stated, _scheduler_config(facts), "scheduler")
    return facts


def to_scheduler(facts: Facts) -> dict[str, Any]:
    """The scheduler_config.json of a DDPMScheduler; raises UnsupportedModelError."""
    return {"_class_name": "DDPMScheduler", **_scheduler_config(facts)}


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


def _unet_config(spec: UNetSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The full config of a spec."""
    variant, mults, (height, width) = spec["variant"], spec["channel_mults"], image_size
    plain = "Resnet{}sampleBlock2D" if variant.resampling_blocks else "{}Block2D"
    kinds = [
        "Attn{}Block2D" if 2**level in spec["attention_factors"] else plain
        for level in range(len(mults))
    ]
    resampling = "resnet" if variant.resampling_blocks else "conv"
    return {
        **UNET,
        "sample_size": height if height == width else [height, width],
        "in_channels": spec["image_channels"] + spec["condition_channels"],
        "out_channels": spec["image_channels"] * (2 if spec["learns_variance"] else 1),
        "freq_shift": variant.frequency_shift,
        "flip_sin_to_cos": variant.cosines_first,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "block_out_channels": [spec["base_channels"] * mult for mult in mults],
        "layers_per_block": spec["blocks_per_level"],
        "downsample_padding": int(variant.pads_both_sides),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "dropout": spec["dropout"],
        "attention_head_dim": variant.head_channels or None,
        "norm_num_groups": spec["groups"],
        # With scale_shift, diffusers builds the middle attention without a norm unless this is set.
        "attn_norm_num_groups": spec["groups"] if variant.scale_shift else None,
        "norm_eps": variant.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if variant.scale_shift else "default",
        "num_class_embeds": spec["num_classes"] + 1 if spec["num_classes"] else None,
    }


def _scheduler_config(facts: Facts) -> dict[str, Any]:
    """The full config of a run's settings; those without a diffusers key must have the default."""
    schedule, objective, sampling = (facts[key] for key in ("schedule", "objective", "sampling"))
    kind, betas = schedule["kind"], schedule.get("betas") or None
    plain: dict[str, Any] = {"rescale": False} | (COSINE if kind == "cosine" else {})
    _require_equal({key: schedule.get(key, value) for key, value in plain.items()}, plain,
                   "DDPMScheduler")  # fmt: skip
    trained = objective.get("variance", "fixed")
    if trained == "learned":
        raise UnsupportedModelError("DDPMScheduler", f"objective.variance is {LEARNED}")
    sampled = sampling["variance"] if trained == "fixed" else "learned"
    return {
        **SCHEDULER,
        "num_train_timesteps": len(betas) if kind == "betas" and betas else schedule["num_steps"],
        "beta_start": schedule.get("beta_start", SCHEDULER["beta_start"]),
        "beta_end": schedule.get("beta_end", SCHEDULER["beta_end"]),
        "beta_schedule": "linear" if kind == "betas" else _key_of(KINDS, kind, "kind"),
        "trained_betas": list(betas) if kind == "betas" and betas else None,
        "variance_type": _key_of(VARIANCES, (trained, sampled), "variance"),
        "clip_sample": sampling["clip"],
        "prediction_type": _key_of(PREDICTIONS, objective["prediction"], "prediction"),
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
    }


def _full(config: Config, defaults: Config, *classes: str) -> dict[str, Any]:
    """The config with defaults for missing keys and without private keys (`_...`)."""
    kind = config.get("_class_name", classes[0])
    if kind not in classes:
        raise UnsupportedModelError(
            "_class_name", f"it is {kind!r}; supported is {' or '.join(classes)}"
        )
    return {**defaults, **{key: value for key, value in config.items() if key[0] != "_"}}


def _require_equal(asked: Config, got: Config, where: str) -> None:
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


def _one_of(table: Mapping[str, Any], config: Config, key: str) -> Any:
    if config[key] not in list(table):
        raise UnsupportedModelError(
            "scheduler", f"{key} is {config[key]!r}; supported is {', '.join(table)}"
        )
    return table[config[key]]


def _key_of(table: Mapping[str, Any], value: Any, name: str) -> str:
    for theirs, ours in table.items():
        if ours == value:
            return theirs
    known = ", ".join(map(str, table.values()))
    raise UnsupportedModelError("DDPMScheduler", f"{name} is {value!r}; it knows {known}")
