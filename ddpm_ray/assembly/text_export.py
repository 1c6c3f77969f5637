"""Write trained models of texts for diffusers and transformers."""

from pathlib import Path

from torch import Tensor

from ddpm_ray.data.codec import diffused_shape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.autoencoder import AutoencoderSpec
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.frozen_text import ContrastiveText, FrozenText
from ddpm_ray.models.interop import autoencoder_kl, stable_diffusion
from ddpm_ray.models.interop.clip_text import clip_text_limits, write_clip_text
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.diffusers_files import write_json, write_weights
from ddpm_ray.models.interop.diffusers_pipelines import Export
from ddpm_ray.models.interop.diffusers_schedulers import Facts
from ddpm_ray.models.interop.diffusers_text_unet import text_unet_to_diffusers
from ddpm_ray.models.interop.transformers_text import ClipText
from ddpm_ray.models.text_encoder import EncodesText, TextEncoder, TextEncoderSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.storage import object_store

NO_TEXT_ENCODER = (
    "text encoder (it is trained elsewhere, and is no CLIPTextModel: text.model names it)"
)


def write_with_text(
    model: TrainedModel,
    facts: Facts,
    folder: Path,
    autoencoder: tuple[AutoencoderSpec, dict[str, Tensor]] | None,
) -> Export:
    """Write each part of a model of texts that has an equivalent, and the pipeline if all have.

    That is the folder of a StableDiffusionPipeline. `autoencoder` is that of a model of latents:
    x_0 is its latents. The weights come first, model_index.json last. Raises
    UnsupportedModelError, StorageError.
    """
    network, tokenizer = model.denoiser.network, model.denoiser.takes.tokenizer
    assert isinstance(network, UNet | DiT)
    assert network.text is not None
    assert network.text.encoder is not None
    assert tokenizer is not None
    write, parts, limits = object_store.write_bytes, list[str](), list[str]()
    limit = stable_diffusion.network_limit(network.spec)
    if limit:
        limits.append(limit)
    else:
        try:
            _write_network(model, network, folder)
            parts.append("unet")
        except UnsupportedModelError as error:
            limit = f"unet ({error})"
            limits.append(limit)
    encoder = network.text.encoder
    if written := write_text_encoder(encoder, tokenizer, folder / "text_encoder"):
        parts.append("text_encoder")
    else:
        limits.append(NO_TEXT_ENCODER)
    if isinstance(written, TextEncoderSpec) and limit:  # no pipeline reads the pooled text
        limits += clip_text_limits(written)
    for name, content in tokenizer.for_transformers().items():
        write(f"{folder}/tokenizer/{name}", content.encode())
    parts.append("tokenizer")
    if autoencoder is not None:
        size, unscaled = model.image_shape[:2], autoencoder_kl.UNSCALED
        autoencoder_kl.write_folder(folder / "vae", *autoencoder, size, write, pipeline=unscaled)
        parts.append("vae")
    export = stable_diffusion.to_stable_diffusion(facts, network.spec, tuple(parts), tuple(limits))
    write_json(f"{folder}/scheduler/scheduler_config.json", export.scheduler, write)
    if export.pipeline:
        index = stable_diffusion.model_index(export.scheduler)
        write_json(f"{folder}/model_index.json", index, write)
    return export


def _write_network(model: TrainedModel, network: UNet | DiT, folder: Path) -> None:
    """Write the folder unet/ of a U-Net that has an equivalent."""
    spec, write = network.spec, object_store.write_bytes
    assert isinstance(spec, UNetSpec)
    tensors = {k: v for k, v in network.state_dict().items() if not k.startswith("uncertainty.")}
    size = diffused_shape(model.denoiser.codec, model.image_shape)[:2]
    config, theirs = text_unet_to_diffusers(spec, tensors, size)
    write_weights(folder / "unet", theirs, write)
    write_json(f"{folder}/unet/config.json", config, write)


def write_text_encoder(
    encoder: EncodesText, tokenizer: Tokenizer, folder: Path
) -> TextEncoderSpec | bool:
    """Write a CLIPTextModel; return its spec, True without one, or False if there is none."""
    write = object_store.write_bytes
    module = encoder.module if isinstance(encoder, FrozenText) else encoder
    if isinstance(module, ContrastiveText):
        module = module.text
    if isinstance(module, TextEncoder):
        spec, start = module.spec, tokenizer.start_token
        write_clip_text(str(folder), spec, module.state_dict(), start, write)
        return spec
    if isinstance(module, ClipText) and module.projection is None:
        for name, data in module.files().items():
            write(f"{folder}/{name}", data)
        return True
    return False
