"""Cascades: a folder that names its models by URL and sha256, written and loaded.

<folder>/cascade.json    {"prior": part, "decoder": part, "upsamplers": [part, ...],
                              "candidates": embeddings per image},
each part {"url": of a checkpoint, "sha256": of its EMA weights}; a URL may be relative to the
folder, which then holds a copy of that model (portable_models.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ddpm_ray.assembly.checkpoint_loading import CASCADE, trained_model
from ddpm_ray.assembly.image_encoders import NamedImageEncoder
from ddpm_ray.assembly.newest_checkpoint import usable_device
from ddpm_ray.assembly.portable_models import copy_model
from ddpm_ray.assembly.prior_loading import trained_prior
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.low_resolution import low_resolution_size
from ddpm_ray.redaction import redacted
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import fields_of
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import CheckpointError

log = logging.getLogger(__name__)

Parts: TypeAlias = dict[str, Any]  # the value of cascade.json

FORMAT = 1
COPY = re.compile(r"(prior|decoder|upsampler-\d+)-[0-9a-f]{12}")  # name of a copy's folder
IDENTITY = "run.json"  # of a run (runs/run_identity.py)


def is_cascade(url: str) -> bool:
    """Whether the folder at `url` holds a cascade. Raises StorageError."""
    return object_store.exists(object_store.join(url, CASCADE))


def decoder_url(url: str) -> str:
    """The URL of the decoder, if a cascade is at `url`; else `url`. Raises StorageError."""
    return _place(url, _parts(url)["decoder"]) if is_cascade(url) else url


def joined(
    prior: str, decoder: str, upsamplers: Sequence[str], candidates: int
) -> tuple[Cascade, Parts]:
    """Load these models as a cascade; return it and its parts, as cascade.json holds them.

    The models are URLs of runs, whose newest checkpoints are taken, or of checkpoints;
    `candidates` are the embeddings that the prior draws for each image. Raises ConfigError for
    models that do not fit together, and what loading them raises.
    """
    models = _loaded({"prior": prior, "decoder": decoder, "upsamplers": list(upsamplers)}, "cpu")
    parts = {
        "prior": _part(models.prior.provenance),
        "decoder": _part(models.provenance),
        "upsamplers": [_part(one.provenance) for one in models.upsamplers],
    }
    return replace(models, candidates=candidates), {**parts, "candidates": candidates}


def write_cascade(folder: str, parts: Parts) -> None:
    """Write cascade.json to `folder`; a warning names a cascade of other models that it replaces.

    Raises ConfigError for the folder of a run, and StorageError.
    """
    require_no_run(folder)
    if is_cascade(folder):
        try:
            found = _parts(folder)
        except StorageError as error:
            log.warning(
                "%s: %s cannot be used (%s) and is replaced", folder, CASCADE, error.args[1]
            )
        else:
            if _weights(found) != _weights(parts):
                log.warning("%s held a cascade of other models: it is replaced", folder)
    checksummed_json.write(object_store.join(folder, CASCADE), parts, FORMAT)


def warn_of_unused_copies(folder: str, parts: Parts) -> None:
    """Log the copies in `folder` that its cascade does not use. Raises StorageError.

    They are not deleted: another cascade, or a run, may name them by URL.
    """
    models = (parts["prior"], parts["decoder"], *parts["upsamplers"])
    used = [f"{_place(folder, one)}/" for one in models]
    copies = [name for name in object_store.folders(folder) if COPY.fullmatch(name)]
    unused = [
        name
        for name in copies
        if not any(url.startswith(f"{object_store.join(folder, name)}/") for url in used)
    ]
    if unused:
        log.warning(
            "%s: this cascade does not use the copies %s; delete them if nothing else does",
            folder,
            ", ".join(sorted(unused)),
        )


def require_no_run(folder: str) -> None:
    """Raise ConfigError if `folder` is that of a run."""
    if object_store.exists(object_store.join(folder, IDENTITY)):
        raise ConfigError(f"--out is {folder}, which holds a run: name another folder")


def _weights(parts: Parts) -> list[str]:
    """The sha256 of the weights of all models, wherever they lie."""
    models = [parts["prior"], parts["decoder"], *parts["upsamplers"]]
    return [one["sha256"] for one in models]


def write_copies(folder: Path, parts: Parts) -> Parts:
    """Copy the models of `parts` to the local `folder`, with their encoders, and cascade.json.

    The folder can be moved as a whole. Returns the parts with places in it. Raises ConfigError if
    an encoder has moved or changed, CheckpointError and StorageError.
    """

    def copied(part: dict[str, str], name: str) -> dict[str, str]:
        """Copy a model; return the part with its place."""
        place = f"{name}-{part['sha256'][:12]}"  # other weights do not overwrite these
        if missing := copy_model(part["url"], folder / place):
            problem = missing[0].partition(". The copy is without it")[0]
            raise ConfigError(f"{name} cannot be copied: {problem}; put that encoder back")
        return part | {"url": place}

    upsamplers = enumerate(parts["upsamplers"], start=1)
    own = {
        "prior": copied(parts["prior"], "prior"),
        "decoder": copied(parts["decoder"], "decoder"),
        "upsamplers": [copied(part, f"upsampler-{number}") for number, part in upsamplers],
        "candidates": parts["candidates"],
    }
    write_cascade(str(folder), own)
    return own


def trained_cascade(url: str, device: torch.device | str | None = "cpu") -> Cascade:
    """Load the cascade in the folder at `url`.

    Raises ConfigError for a folder without a cascade, CheckpointError for a part that does not load
    or has other weights, and ValueError for an unusable device.
    """
    if not is_cascade(url):
        raise ConfigError(
            f"{url} holds no {CASCADE}: name the folder of a cascade, or make one with `ddpm-ray "
            f"cascade`; one model loads with ddpm_ray.load"
        )
    parts = _parts(url)
    models = {
        "prior": _place(url, parts["prior"]),
        "decoder": _place(url, parts["decoder"]),
        "upsamplers": [_place(url, one) for one in parts["upsamplers"]],
    }
    try:
        found = _loaded(models, device)
    except (CheckpointError, StorageError) as error:
        where, problem = error.args[:2]
        remedy = "put it back, or make the cascade again with `ddpm-ray cascade`"
        raise CheckpointError(
            url, f"a part of this cascade does not load: {where}: {problem}", remedy
        ) from error
    held = [parts["prior"], parts["decoder"], *parts["upsamplers"]]
    origins = [one.provenance for one in (found, *found.upsamplers)]
    for part, origin in zip(held, (found.prior.provenance, *origins), strict=True):
        if (sha256 := origin["weights_sha256"]) != (was := part["sha256"]):
            problem = f"its sha256 is {sha256[:12]}, and the cascade {url} has {was[:12]}"
            raise CheckpointError(part["url"], problem, "put those weights back, or make it again")
    return replace(found, candidates=parts["candidates"])


def _parts(url: str) -> dict[str, Any]:
    """The parts of the cascade at `url`. Raises StorageError."""
    held: dict[str, Any] = checksummed_json.read(object_store.join(url, CASCADE), FORMAT)
    return held


def _place(folder: str, part: Mapping[str, str]) -> str:
    """The URL of a part of the cascade in `folder`."""
    url = part["url"]
    return url if "://" in url or url.startswith("/") else object_store.join(folder, url)


def _part(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {"url": redacted(provenance["checkpoint"]), "sha256": provenance["weights_sha256"]}


def _loaded(models: Mapping[str, Any], device: torch.device | str | None) -> Cascade:
    """Load the models of a cascade, by their URLs. Raises ConfigError unless they fit together."""
    device = usable_device(device)
    prior = trained_prior(models["prior"], device)
    decoder = trained_model(models["decoder"], device)
    upsamplers = tuple(trained_model(one, device) for one in models["upsamplers"])
    encoder = decoder.denoiser.takes.image_encoder
    if not isinstance(encoder, NamedImageEncoder):
        raise ConfigError(
            f"decoder is {models['decoder']}, which is given no image embeddings: name a run with "
            "embedding.encoder"
        )
    if encoder.sha256 != prior.codec.encoder_sha256:
        raise ConfigError(
            f"prior and decoder are of different encoders: {models['prior']} draws embeddings of "
            f"the encoder of sha256 {prior.codec.encoder_sha256[:12]}, and {models['decoder']} "
            f"takes those of {encoder.sha256[:12]}"
        )
    _require_sizes((decoder, *upsamplers), models)
    if isinstance(prior.texts, NamedImageEncoder):
        _ = prior.texts.encoders  # they embed the prompts, by which candidates are compared
    own = fields_of(decoder)
    own["provenance"] = decoder.provenance | {
        "prior_sha256": prior.provenance["weights_sha256"],
        "upsamplers_sha256": [one.provenance["weights_sha256"] for one in upsamplers],
    }
    return Cascade(**own, prior=prior, upsamplers=upsamplers)


def _require_sizes(stages: Sequence[TrainedModel], models: Mapping[str, Any]) -> None:
    """Raise ConfigError unless each upsampler takes the images of the stage before it."""
    for number, (before, after) in enumerate(pairwise(stages)):
        url, takes = models["upsamplers"][number], after.denoiser.takes.low_resolution_pixels
        if not takes:
            raise ConfigError(
                f"upsamplers has {url}, which enlarges no image: name a run with "
                "objective.low_resolution_pixels"
            )
        small = *low_resolution_size(*after.image_size, takes), after.image_shape.channels
        if small != before.image_shape:
            raise ConfigError(
                f"upsamplers has {url}, which enlarges images of {' x '.join(map(str, small))}, "
                f"and the stage before it draws {' x '.join(map(str, before.image_shape))}"
            )
