"""Load a trained image and text encoder from a checkpoint."""

from functools import lru_cache

import torch

from ddpm_ray.assembly import networks, run_config
from ddpm_ray.assembly.continued_encoder import UNLOADABLE
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint, usable_device
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.contrastive import ContrastiveEncoders
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.storage import object_store
from ddpm_ray.training import checkpoint_folder


def trained_encoders(
    url: str, device: torch.device | str | None = "cpu", ema: str = "ema"
) -> TrainedEncoders:
    """Load the encoders of the checkpoint at `url`, or of a run's newest checkpoint.

    The weights are the EMA group `ema` of the checkpoint. Raises CheckpointError if no checkpoint
    passes verification, ConfigError for a run that trained something else, TokenizerError, and
    ValueError for an unusable device.
    """
    device = usable_device(device)
    where, snapshot = newest_checkpoint(url, ema)
    facts = snapshot.facts
    config = run_config.saved_config(facts, url)
    if not config.traits.embeds:
        raise ConfigError(
            f"{url} holds {config.traits.name}, which embeds no images and texts: name a run with "
            "task=contrastive"
        )
    image_shape = ImageShape(*facts["image_shape"])
    tokenizer = run_config.saved_tokenizer(facts, where)
    assert tokenizer is not None  # a config with this task has text
    network = networks.network(config, image_shape, tokenizer=tokenizer)
    assert isinstance(network, ContrastiveEncoders)
    network.load_state_dict(snapshot.tensors[ema])
    network.to(device).eval().requires_grad_(False)
    sha256 = checkpoint_folder.weights_sha256(where, ema)
    core_s = facts.get("core_seconds")
    return TrainedEncoders(network, tokenizer, image_shape, where, sha256, core_s)


@lru_cache(maxsize=1)  # a run's objective, pictures and scores share its encoder
def encoders_of_sha256(url: str, sha256: str, device: torch.device | str) -> TrainedEncoders:
    """Load the encoders at `url`, once for all their uses in a process.

    Raises ValueError, in one line, unless they load and have this sha256, and StorageError.
    """
    try:
        found = trained_encoders(url, device)
    except UNLOADABLE as error:
        raise ValueError(f"the encoder does not load: {error}") from error
    if found.sha256 != sha256:
        raise ValueError(
            f"it was the encoder of sha256 {sha256[:12]}, and that of {url} is {found.sha256[:12]}"
        )
    return found


def encoder_files(url: str) -> dict[str, str]:
    """URLs of the files that `trained_encoders(url)` reads, by their names in one folder.

    Raises CheckpointError if there is no checkpoint.
    """
    where, _ = newest_checkpoint(url)
    return {
        name: object_store.join(where, name) for name in checkpoint_folder.sampling_files(where)
    }
