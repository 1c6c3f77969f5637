"""The encoder that a run takes from another run or folder: the same at each start of the run."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.tokenizer import TokenizerError
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.redaction import brief, sanitize
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import CheckpointError

log = logging.getLogger(__name__)

UNLOADABLE = (CheckpointError, ConfigError, TokenizerError, UnsupportedModelError)
"""Errors of an encoder that is missing, damaged or of another kind; an outage is a StorageError."""


class HasSha256(Protocol):
    """An encoder that is known by its weights."""

    @property
    def sha256(self) -> str:
        """sha256 of the weights."""
        ...


Encoder = TypeVar("Encoder", bound=HasSha256)


def encoder_of_run(
    key: str, url: str, fact: str, stored: Mapping[str, Any], load: Callable[[str], Encoder]
) -> Encoder:
    """Load the encoder that the option `key` names by `url`.

    `stored` are the identity or the facts of the run that is continued, empty for a new one; under
    `fact` they hold URL and sha256 of its encoder. A new run has the newest checkpoint of the run
    at `url`. A continued run keeps that checkpoint, even if the encoder's run trains on. If it is
    gone, or `key` names another place now, the encoder at `url` must have the same weights. Raises
    ConfigError, in one line, for an encoder that does not load or has other weights, StorageError.
    """
    group, name = key.split(".")
    began = stored.get(fact)
    if began and stored["config"].get(group, {}).get(name) == url:
        try:
            found = load(began["url"])
            if found.sha256 == began["sha256"]:
                return found
        except (*UNLOADABLE, StorageError) as error:
            log.info("%s: the checkpoint that the run began with: %s", key, brief(error))
    try:
        found = load(url)
    except UNLOADABLE as error:
        raise ConfigError(f"{key}: {error}") from error
    if began and found.sha256 != began["sha256"]:
        what = fact.replace("_", " ")
        raise ConfigError(
            f"{key} is {sanitize(url)}, whose {what} has sha256 {found.sha256[:12]}, but the run "
            f"began with {began['sha256'][:12]}: name the place of that one, or start a run with "
            f"another name="
        )
    return found
