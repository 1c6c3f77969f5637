"""Cases of models that are given texts or embeddings, or that draw these; see cases.py."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.tiny import (
    SHAPE,
    SIDE,
    WIDTH,
    config_of,
    denoiser_of,
    embeddings,
    encoders,
    facts_of,
    pixels,
    stored,
)
from benchmarks.gpu.tiny_keys import (
    AUTOENCODER,
    BF16,
    EMBEDDED,
    LATENTS,
    PRIOR,
    STORED,
    TEXT,
)
from ddpm_ray.assembly import networks
from ddpm_ray.assembly.run_config import saved_codec
from ddpm_ray.collectives import Workers
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.decoded_images import decoded_images
from ddpm_ray.data.embedding_codec import EmbeddingCodec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.loader import Batch
from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.sampling.autoencoder import TrainedAutoencoder
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import fields_of
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.prior import TrainedPrior
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.training import validation_loss

PROMPTS = ("a red apple", "two pears")
DROPS = ["objective.label_dropout=0.5", "embedding.dropout=0.5"]
STEPS: dict[str, list[str]] = {  # keys of runs of which a step is taken
    "latents": LATENTS,
    "decoder": EMBEDDED,
    "decoder text bf16_weights": [*EMBEDDED, *TEXT, *DROPS, BF16],
    "decoder micro batches": [*EMBEDDED, "training.micro_batch_size=4"],
    "decoder stored": STORED,
    "decoder of latents": [*LATENTS, *STORED],
    "decoder of latents text bf16_weights": [*LATENTS, *STORED, *TEXT, *DROPS, BF16],
    "decoder of latents dit elastic": [
        "model.network=dit",
        *LATENTS,
        *STORED,
        "training.reduction=elastic",
        "training.reduction_slots=4",
    ],
    "prior": PRIOR,
    "prior bf16_weights micro batches": [
        *PRIOR,
        "objective.label_dropout=0.5",
        BF16,
        "training.micro_batch_size=4",
    ],
}
Case: TypeAlias = Callable[[torch.device], None]


def embedding_cases() -> dict[str, Case]:
    """Cases by name, apart from the steps above."""
    return {
        "prompts: guided": partial(_prompts, TEXT),
        "prompts: guided decoder of latents": partial(_prompts, [*LATENTS, *STORED, *TEXT]),
        "variations: pixels": partial(_variations, EMBEDDED),
        "variations: pixels, guided": partial(_variations, [*EMBEDDED, *TEXT]),
        "variations: latents": partial(_variations, [*LATENTS, *STORED]),
        "prior: candidates": _candidates,
        "cascade: pixels": partial(_cascade, EMBEDDED),
        "cascade: latents": partial(_cascade, [*LATENTS, *STORED]),
        "picture: embeddings of decoded latents": _shown_latents,
        "picture: validation loss, decoder of latents": partial(
            _validation_loss, [*LATENTS, *STORED]
        ),
        "picture: validation loss, prior": partial(_validation_loss, PRIOR),
    }


def _codec(kind: str, device: torch.device) -> Codec:
    """The codec of data of that kind, latents with a random autoencoder on the device."""
    codec = saved_codec(facts_of(kind))
    if not isinstance(codec, LatentCodec):
        return codec
    network = networks.network(config_of(AUTOENCODER), SHAPE).to(device)
    assert isinstance(network, Autoencoder)
    frozen = network.eval().requires_grad_(False)
    return codec.bound(TrainedAutoencoder(frozen, SHAPE, "none", "0"))


def _model(keys: list[str], device: torch.device, shape: ImageShape = SHAPE) -> TrainedModel:
    config = config_of(keys)
    _, denoiser = denoiser_of(config, device, _codec(config.data.url, device))
    return TrainedModel(denoiser, shape, {}, device=device, settings=config.sampling)


def _prior(device: torch.device) -> TrainedPrior:
    config, codec = config_of(PRIOR), _codec("embeddings", device)
    assert isinstance(codec, EmbeddingCodec)
    _, denoiser = denoiser_of(config, device, codec)
    of = {"checkpoint": "none", "step": 0}
    return TrainedPrior(denoiser, codec, encoders(device), of, device, config.sampling)


def _prompts(keys: list[str], device: torch.device) -> None:
    drawn = _model(keys, device).sample(
        3, prompts=PROMPTS, negative_prompt="a plum", guidance_scale=2.0, steps=3
    )
    _require_images(drawn, 3)


def _variations(keys: list[str], device: torch.device) -> None:
    model, given = _model(keys, device), pixels(2).numpy()
    _require_images(model.variations(given, per_image=2, steps=3, guidance_scale=2.0), 4)


def _candidates(device: torch.device) -> None:
    """The best of two candidates, on the device and of length 1."""
    drawn = _prior(device).embeddings(PROMPTS, range(3), 0, candidates=2)
    length = drawn.norm(dim=1).sub(1).abs().max()
    if drawn.device.type != device.type or not float(length) < 1e-5:
        raise AssertionError(f"embeddings lie on {drawn.device}; of length 1 but for {length}")


def _cascade(keys: list[str], device: torch.device) -> None:
    """Texts, variations and what lies between two texts, enlarged from half the side."""
    large = ImageShape(2 * SIDE, 2 * SIDE, SHAPE.channels)
    upsampler = _model([f"objective.low_resolution_pixels={SIDE}"], device, large)
    decoder = _model(keys, device)
    cascade = Cascade(**fields_of(decoder), prior=_prior(device), upsamplers=(upsampler,))
    given = pixels(2).numpy()
    for drawn, count in (
        (cascade.sample(3, prompts=PROMPTS, steps=3), 3),
        (cascade.variations(given, per_image=2, steps=3), 4),
        (cascade.interpolate(*PROMPTS, 2, steps=3), 2),
    ):
        _require_images(drawn, count, 2 * SIDE)


def _shown_latents(device: torch.device) -> None:
    """The embeddings of samples that a run shows or scores."""
    decoded = decoded_images(_codec("latents", device), stored("latents", 3).to(device))
    vectors = encoders(device).embed(PIXELS.encode(decoded.to(device)))
    if vectors.device.type != device.type or not bool(vectors.isfinite().all()):
        raise AssertionError(f"embeddings lie on {vectors.device}, or are not finite")


def _validation_loss(keys: list[str], device: torch.device) -> None:
    config = config_of(keys)
    kind, count = config.data.url, 2 * len(validation_loss.LEVELS)
    state, denoiser = denoiser_of(config, device, saved_codec(facts_of(kind)))
    labels, tokens = torch.zeros(count, dtype=torch.int64), torch.ones(count, 6).long()
    vectors: Tensor | None = embeddings(count, WIDTH) if config.embedding.url else None
    batch = Batch(stored(kind, count), labels, tokens=tokens, embeddings=vectors)
    workers = Workers(0, 1, device)
    validation_loss.Validator(state, denoiser, batch, 0, 1.0, workers, None, 32).validate(5)
    if not np.isfinite(loss := state.validation_losses[0]["loss"]):
        raise AssertionError(f"the validation loss is {loss}")


def _require_images(drawn: Images, count: int, side: int = SIDE) -> None:
    if drawn.shape != (wanted := (count, side, side, SHAPE.channels)) or drawn.dtype != np.uint8:
        raise AssertionError(f"images are {drawn.shape} of {drawn.dtype}, not {wanted}")
