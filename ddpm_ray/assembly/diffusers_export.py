"""Write trained models for diffusers."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ddpm_ray.assembly.text_export import write_with_text
from ddpm_ray.config.loading import from_dict, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.config.schedule import ScheduleConfig
from ddpm_ray.data.codec import diffused_shape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.models.autoencoder import AutoencoderSpec
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.interop import autoencoder_kl, diffusers_folders
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.diffusers_pipelines import Export
from ddpm_ray.models.unet import UNet
from ddpm_ray.sampling.autoencoder import TrainedAutoencoder
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.storage import object_store

NAMED_BY_DIFFUSERS = "linear", "scaled_linear", "cosine"
"""Schedules that diffusers knows by name; others are exported as betas."""


def write_diffusers(model: TrainedModel, sampling: SamplingSettings, folder: Path) -> Export:
    """Write `model` for diffusers' `from_pretrained`; return the exported sampling settings.

    A model of latents is written with its autoencoder, into which the standardisation of its
    latents is folded. Of a model of texts the parts with an equivalent are written, or all of a
    StableDiffusionPipeline: see `write_with_text`. Raises UnsupportedModelError for another model
    without an equivalent in diffusers, and StorageError.
    """
    network, codec = model.denoiser.network, model.denoiser.codec
    assert isinstance(network, UNet | DiT)
    config = from_dict(RunConfig, model.provenance["config"])
    if config.objective.inpainting_masks:
        raise UnsupportedModelError(
            str(model.provenance["checkpoint"]),
            "it was trained with objective.inpainting_masks; diffusers has no pipeline for an "
            "inpainting model without text, and a model with text is not written for its own",
        )
    schedule = config.schedule
    if schedule.kind not in NAMED_BY_DIFFUSERS or schedule.rescale or schedule.zero_terminal_snr:
        a = model.denoiser.schedule.alpha_bar.cpu()
        betas = tuple((1 - a[1:] / a[:-1]).tolist())
        schedule = ScheduleConfig(kind="betas", num_steps=schedule.num_steps, betas=betas)
    clip, names, autoencoder = sampling.clip is not False, list[str](), None
    if isinstance(codec, LatentCodec):
        autoencoder, clip, names = _standardised(codec), False, [*(model.label_names or ())]
    facts = {
        "schedule": to_dict(schedule),
        "objective": to_dict(config.objective),
        "sampling": to_dict(replace(sampling, clip=clip)),
    }
    if network.spec.text is not None:
        return write_with_text(model, facts, folder, autoencoder)
    return diffusers_folders.write_folder(
        folder,
        network.spec,
        {k: v for k, v in network.state_dict().items() if not k.startswith("uncertainty.")},
        facts,
        diffused_shape(codec, model.image_shape)[:2],
        object_store.write_bytes,
        autoencoder=autoencoder,
        label_names=names,
    )


def write_autoencoder(model: TrainedAutoencoder, folder: Path) -> None:
    """Write `model` for `AutoencoderKL.from_pretrained`, with a scaling_factor of 1.

    Raises StorageError.
    """
    spec, tensors, size = model.model.spec, model.model.state_dict(), model.image_shape[:2]
    autoencoder_kl.write_folder(
        folder, spec, tensors, size, object_store.write_bytes, pipeline=autoencoder_kl.UNSCALED
    )


def _standardised(codec: LatentCodec) -> tuple[AutoencoderSpec, dict[str, Tensor]]:
    """The codec's autoencoder with the standardisation folded in: its latents are x_0."""
    trained = codec.autoencoder
    assert isinstance(trained, TrainedAutoencoder)  # bound when the model was loaded
    network = trained.model
    return autoencoder_kl.standardised(network.spec, network.state_dict(), codec.mean, codec.std)
