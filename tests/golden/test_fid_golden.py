"""The golden FID through the whole evaluation: shards, reference, sampler, uint8, score.

The sets and the number are torch-fidelity 0.4.0's, as in tests/evaluation/test_inception.py, which
checks the network alone, and at width 768 too.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.data import shards
from ddpm_ray.data.dataset import Dataset, UInt8s, write_index
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.manifest import Recipe, ShardRow
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.evaluation.features.feature_extractor import inception_net
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.evaluation.sample_quality import SampleSet, evaluate_samples
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import SamplingPlan
from ddpm_ray.storage import object_store

WEIGHTS = "inception_2015_12_05_to_mixed6e_folded_f32.npz"
SCHEDULE = NoiseSchedule(schedules.cosine(10))


@pytest.mark.slow  # 2,000 images: 2 to 4 minutes of a core
@pytest.mark.timeout(900)
def test_fid192_of_two_real_sets_is_the_golden_one(assets: Path, tmp_path: Path) -> None:
    net = inception_net(assets / WEIGHTS, [192], "original", "cpu")
    truth = reference(packed(tmp_path, cifar10(assets, 5)), net, Workers())
    x_0 = torch.from_numpy(cifar10(assets, 0)).permute(0, 3, 1, 2) / 127.5 - 1
    batches = iter(x_0.view(-1, 50, 3, 32, 32))

    def knows_the_test_set(x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that leads to the next 50 images: one network call draws them exactly."""
        return Parameterization.of("epsilon", SCHEDULE).output_from_x0(x_t, t, next(batches))

    scores = evaluate_samples(
        SampleSet(
            Denoiser.of_noise(knows_the_test_set, SCHEDULE),
            SamplingPlan((10, 0)),
            image_shape=ImageShape(32, 32, 3),
            num_images=1000,
            batch_size=50,
            weights={},
        ),
        net,
        truth,
        Workers(),
    )
    low, fid, high = (scores.metrics[f"eval/fid192{end}"] for end in ("_low", "", "_high"))
    assert fid == pytest.approx(0.053981019, rel=1e-3)
    assert low < fid < high


def cifar10(assets: Path, first: int) -> UInt8s:
    with np.load(assets / "cifar10_test_jpeg.npz", allow_pickle=False) as file:
        data, ends = file["data"], file["offsets"]
    files = [io.BytesIO(data[ends[i] : ends[i + 1]].tobytes()) for i in range(first, 10_000, 10)]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def packed(folder: Path, images: UInt8s) -> Dataset:
    data = shards.shard_bytes(images, [-1] * len(images), [str(i) for i in range(len(images))])
    object_store.write_bytes(object_store.join(str(folder), shards.shard_name(0)), data)
    digest = hashlib.sha256(data).hexdigest()
    row = ShardRow(shards.shard_name(0), len(images), len(data), digest, *shards.pixel_sums(images))
    return write_index(
        str(folder), Recipe(ImageShape(32, 32, 3), "raw", "none", (), "0" * 64), [row]
    )
