"""Models of other libraries: a network's weights with the run config that they fit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_ray.assembly import networks
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.assembly.latents import codec_facts
from ddpm_ray.assembly.run_config import tokenizer_facts
from ddpm_ray.config.autoencoder import AutoencoderConfig
from ddpm_ray.config.jobs.import_weights import ImportConfig
from ddpm_ray.config.loading import ConfigError, to_dict
from ddpm_ray.config.model import ModelConfig
from ddpm_ray.config.objective import ObjectiveConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.config.schedule import ScheduleConfig
from ddpm_ray.config.text import TextConfig
from ddpm_ray.data.codec import PIXELS, Codec, diffused_shape
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.dit import DiTSpec
from ddpm_ray.models.interop import autoencoder_kl, convert, diffusers_folders
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.diffusers_folders import DiffusersModel
from ddpm_ray.models.interop.stable_diffusion_folder import (
    is_stable_diffusion,
    read_stable_diffusion,
    read_tokenizer_files,
)
from ddpm_ray.models.layers import GUIDED, HO, Variant
from ddpm_ray.models.text_encoder import TextEncoderSpec
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.storage.file_formats import package_version
from ddpm_ray.training.state import Snapshot

MOST_BLOCKS = 6  # per level, that are tried to name a wrong option


class OtherModel(NamedTuple):
    """A network of another library."""

    config: RunConfig
    spec: UNetSpec | DiTSpec
    tensors: dict[str, Tensor]  # state_dict of the network with this spec
    image_shape: ImageShape
    codec: Codec = PIXELS  # of latents: bound to their autoencoder
    label_names: tuple[str, ...] | None = None  # of classes 0, 1, ...; None: unknown
    tokenizer: Tokenizer | None = None  # of its texts; None: it takes none


def read_diffusers(folder: Path) -> tuple[DiffusersModel, Tokenizer | None]:
    """Read the model in a folder of diffusers, and its tokenizer if it takes texts.

    Raises UnsupportedModelError, TokenizerError.
    """
    if not is_stable_diffusion(folder):
        return diffusers_folders.read_folder(folder), None
    files = read_tokenizer_files(folder)
    tokenizer = Tokenizer(files.json, files.length, str(folder / "tokenizer"))
    if files.pad:
        tokenizer = tokenizer.padded_by(files.pad)
    null = tuple(tokenizer.null_tokens)
    return read_stable_diffusion(folder, tokenizer.end_token, null), tokenizer


def of_diffusers(folder: Path, device: torch.device | str = "cpu") -> OtherModel:
    """Read the model in a folder of diffusers, with the autoencoder of one of latents on `device`.

    Raises UnsupportedModelError, TokenizerError.
    """
    read, tokenizer = read_diffusers(folder)
    facts, spec, (height, width) = read.facts, read.spec, read.image_size
    try:
        sampling = SamplingSettings().overridden(facts["sampling"])
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(str(folder), f"scheduler: {error}") from error
    config = RunConfig(
        name=folder.name,
        schedule=ScheduleConfig(**facts["schedule"]),
        objective=ObjectiveConfig(**facts["objective"]),
        sampling=sampling,
        model=_model_options(spec),
        text=_text_options(spec),
    )
    if not read.autoencoder:
        image_shape = ImageShape(height, width, spec.image_channels)
        return OtherModel(config, spec, read.tensors, image_shape, label_names=read.label_names)
    autoencoder = trained_autoencoder(read.autoencoder, device)
    c, factor = spec.image_channels, autoencoder.model.spec.factor
    codec = LatentCodec(
        c,
        factor,
        ("plain",),
        mean=(0.0,) * c,
        std=(1 / read.scaling_factor,) * c,
        autoencoder_sha256=autoencoder.sha256,
    )
    image_shape = ImageShape(height * factor, width * factor, autoencoder.model.spec.image_channels)
    bound = codec.bound(autoencoder)
    return OtherModel(config, spec, read.tensors, image_shape, bound, read.label_names, tokenizer)


def of_autoencoder_kl(folder: Path) -> RunConfig:
    """The config of a run that would train the autoencoder in a folder of diffusers.

    Raises UnsupportedModelError.
    """
    spec, _ = autoencoder_kl.read_config(folder)
    sizes = AutoencoderConfig(**_options_of(spec, AutoencoderConfig))
    return RunConfig(name=folder.name, task="autoencoder", autoencoder=sizes)


def _model_options(spec: UNetSpec | DiTSpec) -> ModelConfig:
    options = _options_of(spec, ModelConfig)
    if isinstance(spec, DiTSpec):
        return ModelConfig(network="dit", **options)
    return ModelConfig(head_channels=spec.variant.head_channels, **options)


def _text_options(spec: UNetSpec | DiTSpec) -> TextConfig:
    text = spec.text
    if not isinstance(text, TextEncoderSpec):
        return TextConfig()
    options = _options_of(text, TextConfig) | {"length": text.length, "pooled": spec.pools_text}
    return TextConfig(encoder="transformer", **options)


def _options_of(spec: object, config: type[Any]) -> dict[str, Any]:
    """The values of `spec` that are options of `config`, under the same names."""
    return {key: value for key, value in vars(spec).items() if key in config.__dataclass_fields__}


def of_weights(config: ImportConfig, where: str, tensors: Mapping[str, Tensor]) -> OtherModel:
    """Make the model of tensors with the names of `config.layout`, which were read at `where`.

    A network of guided-diffusion with labels but no null label is not sampled without labels:
    objective.label_dropout becomes 0. Raises ConfigError for sizes that do not fit together, and
    UnsupportedModelError for tensors of another network; it names an option that makes them fit.
    """
    image_shape = ImageShape(
        config.image_size, config.image_width or config.image_size, config.channels
    )
    labels, objective = tensors.get("label_emb.weight"), config.objective
    if labels is not None and len(labels) == config.model.num_classes:
        objective = replace(objective, label_dropout=0.0)
    run = RunConfig(
        schedule=config.schedule,
        objective=objective,
        sampling=config.sampling,
    )
    try:
        sizes = config.model.for_images(image_shape.height, image_shape.width)
        run = replace(run, model=sizes)
        spec = networks.unet_spec(run, image_shape, _variant(config))
        spec.require_consistent()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    convert_to = _converter(config, tensors)
    try:
        return OtherModel(run, spec, convert_to(spec), image_shape)
    except UnsupportedModelError as error:
        _, problem = error.args
        raise UnsupportedModelError(
            where, f"{problem}; {_remedy(spec, tensors, convert_to)}"
        ) from error


def snapshot(model: OtherModel, source: Mapping[str, Any]) -> Snapshot:
    """Make the checkpoint of step 0, for sampling only; `source` names the weights.

    Raises UnsupportedModelError for a network that the options of a run cannot describe.
    """
    shape, variant = diffused_shape(model.codec, model.image_shape), {}
    kept: UNetSpec | DiTSpec
    if isinstance(model.spec, DiTSpec):
        kept = networks.dit_spec(model.config, shape)
    else:
        of = model.spec.variant
        kept = networks.denoiser_spec(model.config, shape, of, model.tokenizer, None)
        variant = {"variant": asdict(model.spec.variant)}
    for key, value in asdict(model.spec).items():
        if asdict(kept)[key] != value:
            raise UnsupportedModelError(
                source["file"], f"{key} is {value}; a run's options make it {asdict(kept)[key]}"
            )
    facts = {
        "config": to_dict(model.config),
        "version": package_version(),
        "image_shape": list(model.image_shape),
        "data_fingerprint": "",
        **codec_facts(model.codec),
        **variant,
        **tokenizer_facts(model.tokenizer),
        **({"label_names": list(model.label_names)} if model.label_names else {}),
        "average": {"imported": dict(source)},  # in place of an EMA
        "step": 0,
    }
    return Snapshot({"ema": {name: one.float() for name, one in model.tensors.items()}}, facts)


def _variant(config: ImportConfig) -> Variant:
    if config.layout == "ho":
        return HO
    flags = config.guided_diffusion
    return replace(
        GUIDED,
        num_heads=flags.num_heads,
        scale_shift=flags.scale_shift,
        resampling_blocks=flags.resampling_blocks,
    )


def _converter(
    config: ImportConfig, tensors: Mapping[str, Tensor]
) -> Callable[[UNetSpec], dict[str, Tensor]]:
    """The function that makes the state_dict of a spec from `tensors`."""
    if config.layout == "ho":
        return lambda spec: convert.from_ho(tensors, spec)
    order = config.guided_diffusion.new_attention_order
    return lambda spec: convert.from_guided_diffusion(tensors, spec, new_attention_order=order)


def _remedy(
    spec: UNetSpec, tensors: Mapping[str, Tensor], convert_to: Callable[[UNetSpec], object]
) -> str:
    """Name the option that makes the tensors fit, if one alone does."""
    for setting, other in _other_specs(spec, tensors):
        try:
            convert_to(other)
        except UnsupportedModelError:
            continue
        return f"they fit with {setting}"
    return "no single option makes them fit: compare model.channel_mults and layout first"


def _other_specs(spec: UNetSpec, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, UNetSpec]]:
    """Yield specs that differ from `spec` in one option, each with its `key=value`."""
    for name in ("conv_in.weight", "input_blocks.0.0.weight"):
        if name in tensors and tensors[name].ndim == 4:
            width, channels, *_ = tensors[name].shape
            yield f"model.base_channels={width}", replace(spec, base_channels=width)
            yield f"channels={channels}", replace(spec, image_channels=channels)
    learned = (
        "fixed objective.loss=simple"
        if spec.learns_variance
        else "learned_range objective.loss=hybrid"
    )
    yield (
        f"objective.variance={learned}",
        replace(spec, learns_variance=not spec.learns_variance),
    )
    labels = len(tensors.get("label_emb.weight", ()))
    for classes in sorted({0, labels, max(labels - 1, 0)}):
        yield f"model.num_classes={classes}", replace(spec, num_classes=classes)
    for blocks in range(1, MOST_BLOCKS + 1):
        yield f"model.blocks_per_level={blocks}", replace(spec, blocks_per_level=blocks)
    for flag in ("scale_shift", "resampling_blocks"):
        if spec.variant != HO:
            on = not getattr(spec.variant, flag)
            variant = replace(spec.variant, **{flag: on})
            yield f"guided_diffusion.{flag}={str(on).lower()}", replace(spec, variant=variant)
    factors = [2**level for level in range(len(spec.channel_mults))]
    for count in range(len(factors) + 1):
        for chosen in combinations(factors, count):
            text = ",".join(map(str, chosen))
            yield f"model.attention_factors=[{text}]", replace(spec, attention_factors=chosen)
