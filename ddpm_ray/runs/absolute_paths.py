"""Relative paths in a config made absolute: workers have other working directories."""

import dataclasses
from pathlib import Path

from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.storage import object_store
from ddpm_ray.tracking.tracking_uri import resolve_tracking_uri


def with_absolute_paths(config: RunConfig, home: Path) -> RunConfig:
    """Make the relative paths and URLs of a training run absolute, from the folder `home`."""
    return dataclasses.replace(
        config,
        storage=object_store.absolute(config.storage, home),
        training=dataclasses.replace(
            config.training, init_from=object_store.absolute(config.training.init_from, home)
        ),
        data=dataclasses.replace(
            config.data,
            url=object_store.absolute(config.data.url, home),
            autoencoder=object_store.absolute(config.data.autoencoder, home),
        ),
        text=dataclasses.replace(
            config.text,
            model=object_store.absolute(config.text.model, home),
            tokenizer=object_store.absolute(config.text.tokenizer, home),
        ),
        embedding=dataclasses.replace(
            config.embedding,
            encoder=object_store.absolute(config.embedding.encoder, home),
            url=object_store.absolute(config.embedding.url, home),
        ),
        evaluation=absolute_evaluation_paths(config.evaluation, home),
        tracking=dataclasses.replace(
            config.tracking, uri=resolve_tracking_uri(home, config.tracking.uri)
        ),
    )


def absolute_evaluation_paths(wanted: EvaluationConfig, home: Path) -> EvaluationConfig:
    """Make the relative paths of an evaluation absolute, from the folder `home`."""
    return dataclasses.replace(
        wanted,
        weights=object_store.absolute(wanted.weights, home),
        alignment_encoder=object_store.absolute(wanted.alignment_encoder, home),
        held_out_url=object_store.absolute(wanted.held_out_url, home),
        reference_url=object_store.absolute(wanted.reference_url, home),
        memorisation_picture=object_store.absolute(wanted.memorisation_picture, home),
    )
