"""Load a trained prior from a checkpoint."""

import torch

from ddpm_ray.assembly import diffusion, networks
from ddpm_ray.assembly.checkpoint_loading import weights_provenance
from ddpm_ray.assembly.frozen_text import bind_text_model
from ddpm_ray.assembly.image_encoders import encoder_of_width
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint, usable_device
from ddpm_ray.assembly.run_config import (
    saved_codec,
    saved_config,
    saved_frozen_text,
    saved_tokenizer,
)
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data.codec import diffused_shape
from ddpm_ray.data.embedding_codec import EmbeddingCodec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.sampling.prior import TrainedPrior


def trained_prior(url: str, device: torch.device | str | None = "cpu") -> TrainedPrior:
    """Load the prior of the checkpoint at `url`, or of a run's newest checkpoint.

    The weights are the EMA's. Raises CheckpointError if no checkpoint passes verification,
    ConfigError for a run that trained something else, TokenizerError, and ValueError for an
    unusable device.
    """
    device = usable_device(device)
    where, snapshot = newest_checkpoint(url, "ema")
    facts = snapshot.facts
    config = saved_config(facts, url)
    if not config.traits.draws_embeddings:
        raise ConfigError(
            f"{url} holds {config.traits.name}, which draws no embeddings: name a run with "
            "task=prior"
        )
    codec, tokenizer = (
        saved_codec(facts, where),
        saved_tokenizer(facts, where),
    )
    assert isinstance(codec, EmbeddingCodec)  # this task takes no other data
    shape = diffused_shape(codec, ImageShape(*facts["image_shape"]))
    frozen = saved_frozen_text(facts, tokenizer)
    network = networks.network(config, shape, tokenizer=tokenizer, frozen_text=frozen)
    network.load_state_dict(snapshot.tensors["ema"])
    network.to(device).eval().requires_grad_(False)
    bind_text_model(network, facts, where)
    return TrainedPrior(
        diffusion.denoiser(config, network, device, codec, tokenizer),
        codec,
        encoder_of_width(codec.width, facts, device, where),
        weights_provenance(where, snapshot),
        device,
        config.sampling,
    )
