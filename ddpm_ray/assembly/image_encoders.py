"""The image encoder whose embeddings a network is given: named by a run, loaded when it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.assembly.continued_encoder import encoder_of_run
from ddpm_ray.assembly.encoder_loading import (
    encoder_files,
    encoders_of_sha256,
    trained_encoders,
)
from ddpm_ray.assembly.image_embeddings import EMBEDDINGS_FINGERPRINT, checked_embeddings
from ddpm_ray.assembly.model_copies import copy_files, copy_in
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.redaction import sanitize
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.training.checkpoint_folder import CheckpointError

ENCODER_COPY = "image_encoder"  # folder in that of a copied checkpoint
REMEDY = "put the checkpoint of that encoder back"


@dataclass(frozen=True)
class NamedImageEncoder:
    """The image encoder of a checkpoint at `url`, loaded when it first embeds images.

    Drawing from given embeddings needs no encoder, so a model loads without it.
    """

    width: int
    url: str
    sha256: str  # of its weights
    device: torch.device | str
    where: str  # the model that is given its embeddings, for errors

    def embed(self, x_0: Tensor) -> Tensor:
        """Embeddings float32 [B, D] of images x_0 [B, C, H, W]; see `encoders` for errors."""
        return self.encoders.embed(x_0)

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings float32 [n, D] of n prompts; see `encoders` for errors."""
        return self.encoders.text_embeddings(prompts)

    @cached_property
    def encoders(self) -> TrainedEncoders:
        """The loaded encoders. CheckpointError unless they load and have the weights `sha256`."""
        try:
            if not self.url:
                raise ValueError("its place is unknown, as encoding.json of the data is missing")
            return encoders_of_sha256(self.url, self.sha256, self.device)
        except ValueError as error:
            problem = f"the encoder of its image embeddings: {error}"
            raise CheckpointError(self.where, problem, REMEDY) from error


def settled_embedding(
    config: RunConfig, dataset: Dataset, stored: Mapping[str, Any] = MappingProxyType({})
) -> tuple[RunConfig, dict[str, Any]]:
    """`config` with the width of its image embeddings, and the facts that name them.

    The facts are empty for a run without embeddings. `stored` are the identity or the facts of a
    run that is continued. Raises what `encoder_of_run` and `checked_embeddings` do, and
    ConfigError, in one line, for an encoder that does not take the images of `dataset`.
    """
    wanted = config.embedding
    if not wanted.encoder:
        return config, {}
    given = f"embedding.encoder is {sanitize(wanted.encoder)}"
    encoders = encoder_of_run(
        "embedding.encoder", wanted.encoder, "image_encoder", stored, trained_encoders
    )
    try:
        encoders.require_fitting(dataset.manifest.image_shape)
    except ValueError as error:
        raise ConfigError(f"{given}: {error}") from error
    if wanted.width not in (0, encoders.width):
        raise ConfigError(
            f"embedding.width is {wanted.width}, and the embeddings of {wanted.encoder} have "
            f"{encoders.width}: leave it out"
        )
    settled = replace(config, embedding=replace(wanted, width=encoders.width))
    facts: dict[str, Any] = {"image_encoder": {"url": encoders.url, "sha256": encoders.sha256}}
    if embeddings := checked_embeddings(settled, dataset, encoders.sha256):
        facts[EMBEDDINGS_FINGERPRINT] = embeddings.fingerprint
    return settled, facts


def named_encoder(
    config: RunConfig, facts: Mapping[str, Any], device: torch.device | str, where: str = ""
) -> NamedImageEncoder | None:
    """The image encoder of a model with these facts; None if it takes no embedding.

    `where` is the checkpoint's URL; a copy of the encoder in that folder (`copy_image_encoder`) is
    taken before the one that the facts name.
    """
    if not config.embedding.width:
        return None
    return encoder_of_width(config.embedding.width, facts, device, where)


def encoder_of_width(
    width: int, facts: Mapping[str, Any], device: torch.device | str, where: str = ""
) -> NamedImageEncoder:
    """The encoder of image embeddings of that width that these facts name; see `named_encoder`."""
    held = facts["image_encoder"]
    url = copy_in(where, ENCODER_COPY) or held["url"]
    return NamedImageEncoder(width, url, held["sha256"], device, where or "the run")


def copy_image_encoder(facts: Mapping[str, Any], folder: Path, where: str = "") -> None:
    """Copy the image encoder of a checkpoint with these facts into the local `folder` of its copy.

    A copy in the checkpoint's own folder `where` is taken before the one that the facts name.

    So the copy makes variations on any machine. A model without one has none. Raises ValueError
    unless it is the encoder of the training, and StorageError.
    """
    if (held := facts.get("image_encoder")) is None:
        return
    url = copy_in(where, ENCODER_COPY) or held["url"]
    try:
        copy = copy_files(encoder_files(url), folder / ENCODER_COPY)
        encoders_of_sha256(copy, held["sha256"], "cpu")
    except (CheckpointError, ValueError) as error:
        problem = f"the encoder of its image embeddings at {url} cannot be copied: {error}"
        raise ValueError(problem) from error
