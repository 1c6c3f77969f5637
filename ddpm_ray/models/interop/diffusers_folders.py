"""Whole models in folders of diffusers: network, scheduler and the autoencoder of latents.

A `UNetSpec` or `DiTSpec` holds the arguments of our network; `facts` are settings under the keys of
a run's config: {"schedule": ..., "objective": ..., "sampling": ...}. A model that cannot be
converted exactly is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ddpm_ray.models.autoencoder import AutoencoderSpec
from ddpm_ray.models.dit import DiTSpec
from ddpm_ray.models.interop import autoencoder_kl, convert, diffusers_dit
from ddpm_ray.models.interop.diffusers_config import (
    Config,
    UnsupportedModelError,
    image_size_of,
    require_equal,
)
from ddpm_ray.models.interop.diffusers_files import (
    Write,
    autoencoder_folder,
    part_folder,
    read_json,
    read_weights,
    weights_file,
    write_json,
    write_weights,
)
from ddpm_ray.models.interop.diffusers_pipelines import (
    PART_CLASSES,
    Export,
    ModelTraits,
    to_pipeline,
)
from ddpm_ray.models.interop.diffusers_schedulers import Facts, from_scheduler
from ddpm_ray.models.interop.layouts import Tensors
from ddpm_ray.models.unet_spec import UNetSpec

MODEL_INDEX = "model_index.json"  # present in the folder of a pipeline


class DiffusersModel(NamedTuple):
    """A model that diffusers saved, by the names of our networks."""

    spec: UNetSpec | DiTSpec
    tensors: dict[str, Tensor]
    facts: dict[str, dict[str, Any]]
    image_size: tuple[int, int]  # (H, W) of x_0
    autoencoder: str  # folder of the autoencoder; empty: a model of pixels
    scaling_factor: float  # x_0 is the autoencoder's latents times this
    label_names: tuple[str, ...] | None  # of classes 0, 1, ...; None: unknown


def holds_model(folder: str | Path) -> bool:
    """Whether a local folder holds a model that diffusers saved: a pipeline, or only a DiT."""
    return any(Path(folder, file).is_file() for file in (MODEL_INDEX, "transformer/config.json"))


def read_folder(folder: str | Path) -> DiffusersModel:
    """Read the model in a folder that diffusers saved.

    Network and scheduler are in folders of their own, or a U-Net and its scheduler both in the
    folder itself. Weights are read from safetensors or else from a .bin file with weights_only, so
    that no code in it is run. The autoencoder's weights are not read. Raises UnsupportedModelError.
    """
    is_dit = Path(folder, "transformer").is_dir()
    network = part_folder(folder, "transformer" if is_dit else "unet")
    config = read_json(network / "config.json")
    if config.get("_class_name") == autoencoder_kl.CLASS:
        raise UnsupportedModelError(
            str(folder),
            "it holds an autoencoder, which draws no images: give it to `ddpm-ray encode`",
        )
    scheduler = part_folder(folder, "scheduler") / "scheduler_config.json"
    facts, tensors = from_scheduler(read_json(scheduler)), read_weights(weights_file(network))
    convert_from = diffusers_dit.dit_from_diffusers if is_dit else convert.from_diffusers
    spec, tensors = convert_from(config, tensors)
    size = image_size_of(config, PART_CLASSES["transformer" if is_dit else "unet"])
    if spec.learns_variance and facts["objective"]["variance"] == "fixed":
        # DiTPipeline drops the learned variance, so its scheduler's config does not name it.
        facts["objective"]["variance"] = "learned_range"
    autoencoder, scaling_factor = autoencoder_of(folder, spec.image_channels)
    if autoencoder and facts["sampling"]["clip"]:
        raise UnsupportedModelError(
            str(scheduler),
            "clip_sample is True, but latents have no range to clip to: set it to false",
        )
    index = Path(folder, MODEL_INDEX)
    names = class_names_of(read_json(index), spec.num_classes) if index.is_file() else None
    return DiffusersModel(spec, tensors, facts, size, autoencoder, scaling_factor, names)


def class_names_of(model_index: Config, num_classes: int) -> tuple[str, ...] | None:
    """The names of classes 0, 1, ... in id2label of a DiTPipeline.

    None unless there is exactly one for each class: labels without a name are numbers.
    """
    named = model_index.get("id2label")
    keys = [str(label) for label in range(num_classes)]
    if not num_classes or not isinstance(named, dict) or named.keys() != {*keys}:
        return None
    names = tuple(named[key] for key in keys)
    return names if all(isinstance(name, str) for name in names) else None


def write_folder(
    folder: str | Path,
    spec: UNetSpec | DiTSpec,
    tensors: Tensors,
    facts: Facts,
    image_size: tuple[int, int],
    write: Write,
    *,
    autoencoder: tuple[AutoencoderSpec, Tensors] | None = None,
    label_names: Sequence[str] = (),
) -> Export:
    """Save for `from_pretrained` of diffusers; return the exported sampling settings.

    `image_size` is (H, W) of x_0. `autoencoder` is that of a model of latents: x_0 is its latents,
    not scaled. The weights come first, since a full disk fails on the largest file, and last the
    file without which the folder is not a model: model_index.json or, where no pipeline draws the
    model, the config.json of its network. Raises UnsupportedModelError, before anything is written,
    for a model that cannot be exported.
    """
    traits = ModelTraits.of(spec, image_size, autoencoder is not None)
    export = to_pipeline(facts, traits)
    weights, configs = dict[str, Tensors](), dict[str, Config]()
    configs[traits.network], weights[traits.network] = _converted(spec, tensors, traits)
    if autoencoder is not None:
        vae, theirs = autoencoder
        sides = image_size[0] * vae.factor, image_size[1] * vae.factor
        configs[export.parts[1]], weights[export.parts[1]] = autoencoder_kl.to_diffusers(
            vae, theirs, sides, autoencoder_kl.UNSCALED
        )
    for part, held in weights.items():
        write_weights(f"{folder}/{part}", held, write)
    files: dict[str, Config] = {"scheduler/scheduler_config.json": export.scheduler}
    files |= {f"{part}/config.json": config for part, config in configs.items()}
    if export.pipeline:
        named = {str(label): name for label, name in enumerate(label_names)}
        id2label = {"id2label": named} if named and traits.by_dit_pipeline else {}
        files[MODEL_INDEX] = export.model_index | id2label
    for name, value in files.items():
        write_json(f"{folder}/{name}", value, write)
    return export


def _converted(
    spec: UNetSpec | DiTSpec, tensors: Tensors, traits: ModelTraits
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of the network, as the model's pipeline calls it."""
    if isinstance(spec, UNetSpec):
        return convert.to_diffusers(spec, tensors, traits.image_size)
    if traits.by_dit_pipeline:
        return diffusers_dit.dit_to_pipeline(spec, tensors)
    return diffusers_dit.dit_to_diffusers(spec, tensors)


def autoencoder_of(folder: str | Path, channels: int) -> tuple[str, float]:
    """The folder of a model's autoencoder and its scaling factor; ("", 1) for a model of pixels.

    Raises UnsupportedModelError for an autoencoder that Autoencoder cannot represent, and for one
    whose latents have other than `channels` channels.
    """
    home = autoencoder_folder(folder)
    if home is None:
        return "", 1.0
    found, scaling = autoencoder_kl.read_config(home)
    ignored = {key: value for key, value in scaling.items() if key in autoencoder_kl.PER_CHANNEL}
    require_equal(ignored, dict.fromkeys(autoencoder_kl.PER_CHANNEL), str(home))
    if found.latent_channels != channels:
        raise UnsupportedModelError(
            str(folder),
            f"the autoencoder's latents have {found.latent_channels} channels, but the network "
            f"draws {channels}",
        )
    factor = scaling["scaling_factor"]
    if not isinstance(factor, int | float) or not factor > 0:
        raise UnsupportedModelError(str(home), f"scaling_factor is {factor!r}; it must be above 0")
    return str(home), float(factor)
