"""The distance of a model of latents is the autoencoder's part plus the denoiser's, by closed form.

Images are x = 128 + U z of independent normals z of variances l. A linear autoencoder keeps the
first four, so the Frechet distance of decoded images is the sum of the other l. The exact denoiser
of standard normals is epsilon = sqrt(1 - a) x_t; a step of DDIM then multiplies x_t by
cos(theta_t - theta_s) with a = cos(theta)^2, so few steps shrink each deviation by a known g and
add l (1 - g)^2 for each of the four.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.dataset import Dataset, DatasetError
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.packing import encoded_packer
from ddpm_ray.data.packing.latent_encoder import LatentEncoder
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.evaluation import ceiling
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.memorisation import nearest_images, spread
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.evaluation.sample_quality import SampleSet, evaluate_samples
from ddpm_ray.evaluation.vlb_over_dataset import vlb_bits_per_dim
from ddpm_ray.models.autoencoder import Posterior
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import Images, SamplingPlan
from tests.noise import pack

IMAGES, SHAPE, KEPT = 4000, ImageShape(4, 4, 1), 4
VARIANCES = np.array([900, 700, 500, 300, 60, 50, 40, 30, 20, 20, 10, 10, 8, 6, 4, 2.0])
BASIS = np.linalg.qr(np.random.default_rng(3).normal(size=(16, 16)))[0]
SCHEDULE = NoiseSchedule(schedules.cosine(1000))
STEPS = (1000, 600, 250, 0)
WORKER = Workers()


@dataclass(frozen=True)
class Linear:
    """The best linear autoencoder of these images: 4 x 4 pixels to 4 channels of 1 x 1."""

    url: str = "memory"
    sha256: str = "b" * 64
    core_seconds: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: torch.nn.Module = field(default_factory=torch.nn.Identity)

    def latent_shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        return KEPT, 1, 1

    def encode_uint8(self, images: Any) -> Posterior:
        x = torch.as_tensor(images).flatten(1).double() - 128
        mean = (x @ torch.from_numpy(BASIS[:, :KEPT])).float()[..., None, None]
        return Posterior(mean, torch.full_like(mean, -30))

    def decode_uint8(self, z: Tensor) -> Images:
        x = z.double().flatten(1) @ torch.from_numpy(BASIS[:, :KEPT]).T + 128
        return x.round().clamp(0, 255).to(torch.uint8).view(-1, *SHAPE).numpy()


def pixels_as_features() -> FeatureNet:
    return FeatureNet("inception", (16,), lambda x: {16: x.flatten(1).float()}, {"of": "pixels"})


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """Pixels and their latents."""
    folder = tmp_path_factory.mktemp("sets")
    z = np.random.default_rng(0).normal(size=(IMAGES, 16)) * np.sqrt(VARIANCES)
    images = np.clip(np.round(z @ BASIS.T + 128), 0, 255).astype(np.uint8).reshape(-1, *SHAPE)
    pixels = pack(folder / "pixels", images, [1500, 1500, 1000])
    return pixels, encoded(pixels, folder / "latents", Linear())


def encoded(pixels: Dataset, folder: Path, autoencoder: Linear) -> Dataset:
    options = EncodeConfig(batch_size=500)
    encoder = LatentEncoder(autoencoder)
    plan = encoded_packer.make_encoding_plan(pixels, str(folder), encoder, options)
    shards = [encoded_packer.encode_shard(plan, n, encoder) for n in range(plan.shards)]
    return encoded_packer.finish_encoded(plan, shards)


def exact_denoiser(codec: LatentCodec) -> Denoiser:
    def epsilon(x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        return (1 - SCHEDULE.at(t, x_t)).sqrt().to(x_t) * x_t

    return Denoiser(epsilon, Parameterization.of("epsilon", SCHEDULE), codec=codec)


def test_the_distance_is_the_ceiling_plus_the_denoisers_part(
    sets: tuple[Dataset, Dataset],
) -> None:
    pixels, latents = sets
    codec, net = LatentCodec.of(latents.manifest).bound(Linear()), pixels_as_features()
    known = reference(pixels, net, WORKER)
    highest = ceiling.measure_ceiling(latents, codec, net, known, IMAGES, WORKER)
    plan = SamplingPlan(STEPS, SamplingSettings())
    samples = SampleSet(exact_denoiser(codec), plan, SHAPE, IMAGES, 1000, {})
    scores = evaluate_samples(samples, net, known, WORKER, ceiling=highest)
    angles = [math.acos(math.sqrt(float(SCHEDULE.alpha_bar[t]))) for t in STEPS]
    gain = math.prod(math.cos(a - b) for a, b in pairwise(angles))
    lost, shrunk = VARIANCES[KEPT:].sum(), (VARIANCES[:KEPT] * (1 - gain) ** 2).sum()
    assert shrunk > 0.3 * lost  # both parts count
    found = scores.metrics
    # Rounding to grey levels adds 1/12 to each variance, which a lost direction gets as well.
    rounding = sum((math.sqrt(v + 1 / 12) - math.sqrt(1 / 12)) ** 2 - v for v in VARIANCES[KEPT:])
    assert found["eval/fid16_ceiling"] == pytest.approx(lost + rounding, rel=0.03)
    assert found["eval/fid16"] == pytest.approx(lost + rounding + shrunk, rel=0.03)
    assert list(found).index("eval/fid16_ceiling") == list(found).index("eval/fid16") + 1
    assert scores.provenance["samples"]["clip"] is False
    assert scores.provenance["ceiling"]["data"] == latents.fingerprint


def test_images_are_encoded_for_the_ceiling_where_no_latents_are_stored(
    sets: tuple[Dataset, Dataset],
) -> None:
    codec, net = LatentCodec.of(sets[1].manifest).bound(Linear()), pixels_as_features()
    known = reference(sets[0], net, WORKER)
    found, stored = (
        ceiling.measure_ceiling(data, codec, net, known, IMAGES, WORKER).distances["eval/fid16"]
        for data in sets
    )
    assert found == pytest.approx(stored, rel=1e-3)  # latents are stored in float16


def test_against_decoded_latents_there_is_no_ceiling_and_the_provenance_says_so(
    sets: tuple[Dataset, Dataset],
) -> None:
    _, latents = sets
    codec, net = LatentCodec.of(latents.manifest).bound(Linear()), pixels_as_features()
    known = reference(latents, net, WORKER, codec=codec)
    highest = ceiling.measure_ceiling(latents, codec, net, known, 100, WORKER)
    plan = SamplingPlan(STEPS, SamplingSettings())
    samples = SampleSet(exact_denoiser(codec), plan, SHAPE, 100, 100, {})
    scores = evaluate_samples(samples, net, known, WORKER, ceiling=highest)
    assert not [name for name in scores.metrics if "ceiling" in name]
    assert scores.provenance["ceiling"] == ceiling.OF_LATENTS
    assert scores.provenance["reference"]["images_of"] == "decoded latents"


def test_a_stored_ceiling_is_taken_if_its_facts_are_the_same(
    sets: tuple[Dataset, Dataset],
) -> None:
    pixels, latents = sets
    net = pixels_as_features()
    facts = ceiling.ceiling_facts(latents, reference(pixels, net, WORKER), 100)
    scores = {"metrics": {"eval/fid": 3.0, "eval/fid_ceiling": 2.0}, "certificate": {}}
    assert ceiling.stored_ceiling(scores, facts) is None
    assert ceiling.stored_ceiling({}, facts) is None
    found = ceiling.stored_ceiling(scores | {"certificate": {"ceiling": facts}}, facts)
    assert found is not None
    assert found.with_ceilings({"eval/fid": 5.0}) == {"eval/fid": 5.0, "eval/fid_ceiling": 2.0}


def test_neighbours_of_samples_are_decoded_images(sets: tuple[Dataset, Dataset]) -> None:
    pixels, latents = sets
    codec = LatentCodec.of(latents.manifest).bound(Linear())
    samples = spread(latents, 20, WORKER, codec)
    original = spread(pixels, 20, WORKER)
    assert not torch.equal(samples, original)
    again = Linear().decode_uint8(Linear().encode_uint8(original).mean)
    assert int((samples.int() - torch.from_numpy(again).int()).abs().max()) <= 1
    near = nearest_images(samples, latents, WORKER, codec=codec)
    assert near.position[:, 0].tolist() == [i * IMAGES // 20 for i in range(20)]
    assert near.distance[:, 0].max() == 0


def test_latents_of_another_autoencoder_are_not_decoded(
    sets: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    pixels, latents = sets
    codec = LatentCodec.of(latents.manifest).bound(Linear())
    others = encoded(pixels, tmp_path, Linear(sha256="c" * 64))
    with pytest.raises(DatasetError, match="latents that the model's autoencoder did not encode"):
        reference(others, pixels_as_features(), WORKER, codec=codec)
    with pytest.raises(DatasetError, match="latents that the model's autoencoder did not encode"):
        reference(latents, pixels_as_features(), WORKER)


def test_bits_per_dimension_of_latents_are_refused(sets: tuple[Dataset, Dataset]) -> None:
    codec = LatentCodec.of(sets[1].manifest).bound(Linear())
    with pytest.raises(
        ValueError, match="bits_per_dim is defined for 8-bit pixels, but this model"
    ):
        vlb_bits_per_dim(exact_denoiser(codec), [], variance="fixed_small", workers=WORKER)
