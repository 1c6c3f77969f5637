"""The codec of a run's data; one of latents is bound to the autoencoder that encoded them."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ddpm_ray.assembly.autoencoder_loading import autoencoder_files, trained_autoencoder
from ddpm_ray.assembly.model_copies import copy_files, copy_in
from ddpm_ray.assembly.run_config import saved_codec
from ddpm_ray.config.data import DataConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.dataset import Dataset, DatasetError
from ddpm_ray.data.dataset_codec import codec_of
from ddpm_ray.data.embedding_codec import EmbeddingCodec
from ddpm_ray.data.encoding_record import RECORD, read_encoding
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.sampling.autoencoder import TrainedAutoencoder
from ddpm_ray.training.checkpoint_folder import CheckpointError

AUTOENCODER_COPY = "autoencoder"  # folder in that of a copied checkpoint


def codec_of_data(
    config: DataConfig, dataset: Dataset, device: torch.device | str = "cpu"
) -> Codec:
    """The codec of the training data, with the autoencoder of data.autoencoder on `device`.

    Raises ConfigError or DatasetError, in one line, for latents whose autoencoder is unknown or
    another one, for data.flip on latents without flipped views or on embeddings, and for an
    autoencoder of pixels or embeddings.
    """
    codec = codec_of(dataset.manifest)
    if isinstance(codec, EmbeddingCodec):
        return _checked_embeddings(config, dataset, codec)
    if not isinstance(codec, LatentCodec):
        if config.autoencoder:
            raise ConfigError(
                f"data.autoencoder is {config.autoencoder!r}, but data.url holds {codec.name}: "
                "leave it out, or encode them with `ddpm-ray encode` and set data.url to the result"
            )
        return codec
    _require_flips(config, codec)
    url, record = config.autoencoder, read_encoding(dataset)
    codec = replace(codec, preview=record.preview if record else None)
    if not url:
        if record is None:
            problem = f"the autoencoder of these latents is unknown, as there is no {RECORD}"
            raise DatasetError(dataset.url, problem, "name its URL, as in data.autoencoder=runs/ae")
        url = record.network
    try:
        return codec.bound(_autoencoder(url, dataset.manifest.autoencoder_sha256, device))
    except ValueError as error:
        remedy = "name the one that encoded them, as in data.autoencoder=runs/ae"
        raise DatasetError(dataset.url, str(error), remedy) from error


def codec_facts(codec: Codec) -> dict[str, Any]:
    """The facts from which `saved_codec` rebuilds a codec: statistics, preview, its network."""
    if isinstance(codec, EmbeddingCodec):
        held = {"width": codec.width, "mean": list(codec.mean), "std": list(codec.std)}
        encoder = {"url": codec.encoder_url, "sha256": codec.encoder_sha256}
        return {"codec": codec.name, "embeddings": held, "image_encoder": encoder}
    if not isinstance(codec, LatentCodec):
        return {"codec": codec.name}
    assert codec.autoencoder is not None  # codec_of_data has bound it
    return {
        "codec": codec.name,
        "latents": {
            "channels": codec.channels,
            "factor": codec.factor,
            "views": list(codec.views),
            "mean": list(codec.mean),
            "std": list(codec.std),
            **({"preview": asdict(codec.preview)} if codec.preview else {}),
        },
        "autoencoder": {"url": codec.autoencoder.url, "sha256": codec.autoencoder.sha256},
    }


def bound_codec(
    facts: Mapping[str, Any], where: str, device: torch.device | str, autoencoder: str = ""
) -> Codec:
    """The codec of a checkpoint with these facts, with its autoencoder on `device`.

    `autoencoder` is its URL if it has moved; `where` is the checkpoint's URL. A copy of the
    autoencoder in that folder (`copy_autoencoder`) is taken before the one that the facts name.
    Raises CheckpointError unless it is the autoencoder that encoded the training data, and
    ConfigError if one is given for a model of pixels.
    """
    codec = saved_codec(facts, where)
    if not isinstance(codec, LatentCodec):
        if autoencoder:
            raise ConfigError(
                f"autoencoder is {autoencoder!r}, but {where} holds a model of {codec.name}: leave "
                "it out"
            )
        return codec
    held = facts["autoencoder"]
    try:
        url = autoencoder or copy_in(where, AUTOENCODER_COPY) or held["url"]
        return codec.bound(_autoencoder(url, held["sha256"], device))
    except ValueError as error:
        remedy = "name the one that encoded them, as in autoencoder=runs/ae"
        raise CheckpointError(where, str(error), remedy) from error


def _checked_embeddings(
    config: DataConfig, dataset: Dataset, codec: EmbeddingCodec
) -> EmbeddingCodec:
    """`codec` with the URL of the encoder, if that is recorded. Raises ConfigError."""
    if config.autoencoder:
        raise ConfigError(
            f"data.autoencoder is {config.autoencoder!r}, but data.url holds embeddings: leave it "
            "out"
        )
    _require_flips(config, codec)
    record = read_encoding(dataset)
    return replace(codec, encoder_url=record.network if record else "")


def _require_flips(config: DataConfig, codec: LatentCodec | EmbeddingCodec) -> None:
    """Raise ConfigError for data.flip on a data set without flipped views."""
    if config.flip:
        try:
            codec.require_flipped()
        except ValueError as error:
            raise ConfigError(str(error)) from None


def copy_autoencoder(facts: Mapping[str, Any], folder: Path, where: str = "") -> None:
    """Copy the autoencoder of a checkpoint with these facts into the local `folder` of its copy.

    A copy in the checkpoint's own folder `where` is taken before the one that the facts name.

    So the copy loads on any machine. A model of pixels has none. Raises ValueError unless it is the
    autoencoder that encoded the training data, and StorageError.
    """
    if (held := facts.get("autoencoder")) is None:
        return
    url = copy_in(where, AUTOENCODER_COPY) or held["url"]
    try:
        files = autoencoder_files(url)
    except (CheckpointError, ConfigError, UnsupportedModelError) as error:
        raise ValueError(f"the autoencoder of these latents does not load: {error}") from error
    # The copy is verified: the autoencoder's run may commit another checkpoint at any time.
    _autoencoder(copy_files(files, folder / AUTOENCODER_COPY), held["sha256"], "cpu", url)


def _autoencoder(
    url: str, sha256: str, device: torch.device | str, named: str = ""
) -> TrainedAutoencoder:
    """Load the autoencoder at `url`, called `named` in errors, if that is given.

    Raises ValueError unless it loads and has this sha256.
    """
    try:
        found = trained_autoencoder(url, device)
    except (CheckpointError, ConfigError, UnsupportedModelError) as error:
        raise ValueError(f"the autoencoder of these latents does not load: {error}") from error
    if found.sha256 != sha256:
        raise ValueError(
            f"these latents were encoded by the autoencoder of sha256 {sha256[:12]}, and that of "
            f"{named or url} is {found.sha256[:12]}"
        )
    return found
