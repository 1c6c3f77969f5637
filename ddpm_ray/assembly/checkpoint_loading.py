"""Load a trained model from a checkpoint or a diffusers folder."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import torch as safetensors
from torch import Tensor

from ddpm_ray.assembly import networks, other_libraries, run_config
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.assembly.diffusion import denoiser
from ddpm_ray.assembly.frozen_text import bind_text_model
from ddpm_ray.assembly.image_encoders import named_encoder
from ddpm_ray.assembly.latents import bound_codec
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint, usable_device
from ddpm_ray.assembly.run_config import saved_tokenizer
from ddpm_ray.config.loading import ConfigError, from_dict, to_dict
from ddpm_ray.config.objective import ObjectiveConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.config.task import Task
from ddpm_ray.data.codec import Codec, diffused_shape
from ddpm_ray.data.dataset import DatasetError, open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.shard_index import CodecName
from ddpm_ray.models.autoencoder import AutoencoderSpec
from ddpm_ray.models.contrastive import ContrastiveSpec
from ddpm_ray.models.dit import DiT, DiTSpec
from ddpm_ray.models.interop import autoencoder_kl, diffusers_folders
from ddpm_ray.models.prior import PriorSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.guidance_models import require_same_x_0
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training import checkpoint_folder
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.state import Snapshot

CASCADE = "cascade.json"  # in the folder of a cascade (cascades.py)


def trained_model(
    url: str,
    device: torch.device | str | None = "cpu",
    ema: str = "ema",
    autoencoder: str = "",
    guides: Codec | None = None,
    text_model: str = "",
) -> TrainedModel:
    """Load the model of the checkpoint at `url`, or of the newest checkpoint of a run's folder.

    The weights are the EMA group `ema` of the checkpoint. `url` may also be a local diffusers
    folder of a UNet2DModel or DiT with its scheduler, and with its autoencoder. `autoencoder` is
    the URL of the autoencoder of a model of latents; empty: the one that the checkpoint names;
    `text_model` is that of its frozen text encoder. `guides` is the codec of a model that this one
    shall guide, and becomes its codec. Raises CheckpointError if no checkpoint passes verification
    or one of the two is another one, NewerFormatError for a codec of a later version, ConfigError
    for a classifier, UnsupportedModelError for a diffusers model that our networks cannot
    represent, and ValueError for an unusable device or a codec unlike `guides`.
    """
    device = usable_device(device)
    if diffusers_folders.holds_model(url):
        for key, given in (("autoencoder", autoencoder), ("text_model", text_model)):
            if given:
                said = f"{key} is {given}, but {url} is a diffusers folder, which holds its own"
                raise ConfigError(f"{said}, if it has one: leave it out")
        model = _of_diffusers(Path(url), device)
        if guides is not None:
            require_same_x_0(guides, model.denoiser.codec)
        return model
    if autoencoder_kl.is_autoencoder(url):
        require_denoiser(other_libraries.of_autoencoder_kl(Path(url)), url)
    where, snapshot = _newest_of_model(url, ema)
    facts = snapshot.facts
    config = run_config.saved_config(facts, url)
    require_denoiser(config, url)
    if guides is not None:
        require_same_x_0(guides, run_config.saved_codec(facts, where))
    codec = guides or bound_codec(facts, where, device, autoencoder)
    image_shape, tokenizer = ImageShape(*facts["image_shape"]), saved_tokenizer(facts, where)
    shape, variant = diffused_shape(codec, image_shape), run_config.saved_variant(facts, where)
    frozen_text = run_config.saved_frozen_text(facts, tokenizer)
    network = networks.network(config, shape, variant, tokenizer, frozen_text=frozen_text)
    network.load_state_dict(snapshot.tensors[ema])
    network.to(device).eval().requires_grad_(False)
    bind_text_model(network, facts, where, text_model)
    encoder = named_encoder(config, facts, device, where)
    return TrainedModel(
        denoiser(config, network, device, codec, tokenizer, encoder),
        image_shape,
        weights_provenance(where, snapshot, ema),
        device=device,
        settings=config.sampling,
        find_label_names=cache(partial(label_names, config, facts)),
        drops_labels=config.sampled_model.drops_labels,
    )


def _newest_of_model(url: str, ema: str) -> tuple[str, Snapshot]:
    """`newest_checkpoint`; ConfigError, which names the remedy, for the folder of a cascade."""
    try:
        return newest_checkpoint(url, ema)
    except CheckpointError as error:
        if object_store.exists(object_store.join(url, CASCADE)):
            raise ConfigError(
                f"{url} holds a cascade, not one model: load it with ddpm_ray.load_cascade, draw "
                f"from it with `ddpm-ray sample`, or name its decoder"
            ) from error
        raise


def weights_provenance(where: str, snapshot: Snapshot, ema: str = "ema") -> dict[str, Any]:
    """Config, step and sha256 of the EMA weights of the checkpoint at `where`, as plain JSON."""
    facts = snapshot.facts
    text = facts.get("text_encoder")
    return {
        "checkpoint": where,
        "step": snapshot.step,
        "weights_sha256": checkpoint_folder.weights_sha256(where, ema),
        "config": to_dict(run_config.saved_config(facts, where)),
        "data_fingerprint": facts["data_fingerprint"],
        "average": ema if ema != "ema" else facts.get("average"),  # None: the main EMA
        **({"text_encoder_sha256": text["sha256"]} if text else {}),
        **run_config.run_history(facts),
    }


def require_denoiser(config: RunConfig, url: str) -> None:
    """Raise ConfigError if the run at `url` trained a model that draws no images."""
    if config.traits.draws_images:
        return
    use = "use it as guidance.classifier"
    if config.traits.embeds:
        use = "load it with ddpm_ray.load_encoders, or score it (`ddpm-ray evaluate`)"
    if config.traits.draws_embeddings:
        use = "draw its embeddings by a cascade with a decoder (`ddpm-ray cascade`)"
    if config.traits.reconstructs:
        use = (
            "train a denoiser on the latents that it encodes (`ddpm-ray encode`), or score it "
            "(`ddpm-ray evaluate`)"
        )
    raise ConfigError(f"{url} holds {config.traits.name}, which draws no images: {use}")


class TrainedWeights(NamedTuple):
    """The weights of a trained model."""

    checkpoint: str  # its folder
    step: int
    sha256: str  # as in the provenance of `trained_model`
    tensors: dict[str, Tensor]  # by their names in our networks
    spec: UNetSpec | DiTSpec | AutoencoderSpec | ContrastiveSpec | PriorSpec  # of the network
    task: Task = "denoiser"
    objective: ObjectiveConfig | None = None  # of a denoiser; of diffusers: as its scheduler says
    codec: CodecName = "pixels"  # what it was trained on
    autoencoder_sha256: str = ""  # of its latents; empty: of pixels, or unknown
    tokenizer_sha256: str = ""  # of its texts; empty: it takes no text
    text_encoder_sha256: str = ""  # of one that is trained elsewhere; empty: it has none
    image_encoder_sha256: str = ""  # of the embeddings that it is given or draws; empty: none


def trained_weights(url: str, ema: str = "ema") -> TrainedWeights:
    """Read and verify the weights of any kind of network, as `trained_model` would load them.

    `url` may also be a diffusers folder of an AutoencoderKL. One without 1x1 convolutions of the
    latents, which our runs have, gets them as the identity.
    """
    if diffusers_folders.holds_model(url):
        read, tokenizer = other_libraries.read_diffusers(Path(url))
        sha256 = hashlib.sha256(safetensors.save(read.tensors)).hexdigest()
        objective = ObjectiveConfig(**read.facts["objective"])
        codec: CodecName = "latents" if read.autoencoder else "pixels"
        found = TrainedWeights(
            url, 0, sha256, read.tensors, read.spec, "denoiser", objective, codec
        )
        return found._replace(tokenizer_sha256=tokenizer.sha256 if tokenizer else "")
    if autoencoder_kl.in_folder(url):
        vae = trained_autoencoder(url)
        held = vae.model.spec, vae.model.state_dict()
        c = held[0].latent_channels
        with_convs, tensors = autoencoder_kl.standardised(*held, (0.0,) * c, (1.0,) * c)
        return TrainedWeights(url, 0, vae.sha256, tensors, with_convs, "autoencoder")
    where, snapshot = newest_checkpoint(url, ema)
    facts = snapshot.facts
    config, variant = run_config.saved_config(facts, url), run_config.saved_variant(facts, where)
    trained_on = run_config.saved_codec(facts, where)
    shape = diffused_shape(trained_on, ImageShape(*facts["image_shape"]))
    tokenizer = saved_tokenizer(facts, where)
    return TrainedWeights(
        where,
        snapshot.step,
        checkpoint_folder.weights_sha256(where, ema),
        snapshot.tensors[ema],
        networks.network_spec(
            config, shape, variant, tokenizer, run_config.saved_frozen_text(facts, tokenizer)
        ),
        config.task,
        config.objective,
        trained_on.name,
        trained_on.autoencoder_sha256 if isinstance(trained_on, LatentCodec) else "",
        tokenizer.sha256 if tokenizer else "",
        *(facts.get(f"{kind}_encoder", {}).get("sha256", "") for kind in ("text", "image")),
    )


Model = TypeVar("Model", bound=DrawingModel)


def with_sampling(
    model: Model, settings: SamplingSettings, *, guided_by_model: bool | None = None
) -> Model:
    """`model` with `settings`; raises ConfigError, a line for each that it does not support.

    `guided_by_model` is as in `TrainedModel.problems`.
    """
    model = replace(model, settings=settings)
    if problems := list(model.problems("sampling", guided_by_model=guided_by_model)):
        raise ConfigError("\n".join(problems))
    return model


def run_facts(url: str) -> tuple[RunConfig, dict[str, Any]]:
    """Config and facts of the checkpoint that `trained_model` would load, without its weights.

    `url` may also be a diffusers folder of an AutoencoderKL. Raises CheckpointError and
    UnsupportedModelError as `trained_model` does.
    """
    if diffusers_folders.holds_model(url):
        model = _of_diffusers(Path(url), "cpu")
        names = {"label_names": list(model.label_names)} if model.label_names else {}
        return from_dict(RunConfig, model.provenance["config"]), names
    if autoencoder_kl.is_autoencoder(url):
        return other_libraries.of_autoencoder_kl(Path(url)), {}
    facts = newest_checkpoint(url)[1].facts
    return run_config.saved_config(facts, url), facts


def label_names(config: RunConfig, facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of classes 0, 1, ... from the checkpoint; None if unknown.

    Checkpoints of earlier versions lack them: then they are read from the data set's manifest, if
    it is still readable and the same data set.
    """
    if not config.model.num_classes:
        return None
    if "label_names" in facts:
        return tuple(facts["label_names"])
    try:
        dataset = open_dataset(config.data.url)
    except (DatasetError, StorageError):
        return None
    same = dataset.fingerprint == facts.get("data_fingerprint")
    return dataset.manifest.label_names if same else None


def _of_diffusers(folder: Path, device: torch.device | str) -> TrainedModel:
    model = other_libraries.of_diffusers(folder, device)
    config, tensors = model.config, model.tensors
    network = UNet(model.spec) if isinstance(model.spec, UNetSpec) else DiT(model.spec)
    network.load_state_dict(tensors)
    network.to(device).eval().requires_grad_(False)
    origin = {
        "checkpoint": str(folder),
        "step": None,  # unknown
        "weights_sha256": hashlib.sha256(safetensors.save(tensors)).hexdigest(),
        "config": to_dict(config),
        "data_fingerprint": "",
    }
    return TrainedModel(
        denoiser(config, network, device, model.codec, model.tokenizer),
        model.image_shape,
        origin,
        device=device,
        settings=config.sampling,
        find_label_names=lambda: model.label_names,
    )
