"""Scores of an autoencoder that gives back what is known."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.cases import feature_net
from benchmarks.gpu.tiny import packed, pixels
from ddpm_ray.collectives import Workers
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.evaluation.reconstruction_quality import Distances, reconstruction_quality
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec, Posterior
from tests.fixtures.threaded_workers import OnWorkers

CPU, COUNT = torch.device("cpu"), 24


class Known(Autoencoder):
    """Its latents are the pixels, and one channel is the prior; decoding is off by `off` levels."""

    def __init__(self, off: int) -> None:
        super().__init__(AutoencoderSpec(3, 4, 2, (1,), 1, 2, middle_attention=False))
        self.off = off

    def encode(self, x: Tensor) -> Posterior:
        mean = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        return Posterior(mean, torch.zeros_like(mean))

    def decode(self, z: Tensor) -> Tensor:
        return z[:, :3] + self.off / PIXELS.levels_per_unit


def batches(share: range) -> list[tuple[Tensor, Tensor]]:
    images = pixels(COUNT).clamp(20, 235)
    index = torch.arange(share.start, share.stop)
    return list(zip(index.split(5), images[share.start : share.stop].split(5), strict=True))


def test_scores_of_a_constant_error_are_known() -> None:
    """2 levels: 42.1102 dB without spread; the KL of unit variances is half the mean's square."""
    scores = reconstruction_quality(Known(2), batches(range(COUNT)), COUNT, Workers(), None, {})
    metrics = scores.metrics
    for end in ("", "_low", "_high"):
        assert metrics[f"eval/psnr{end}"] == pytest.approx(42.110204, abs=1e-5)
    x = PIXELS.encode(pixels(COUNT).clamp(20, 235)).double()
    nats = 0.5 * float(x.square().flatten(1).sum(1).mean())
    assert metrics["eval/kl_bits"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert metrics["eval/channels_in_use"] == 3
    assert "eval/ssim" not in metrics  # images of 8 pixels
    assert scores.provenance["features"] == "none"
    assert scores.provenance["reconstructions"]["images"] == COUNT


def test_the_distance_of_a_perfect_reconstruction_to_its_own_data_is_0(tmp_path: Path) -> None:
    net = feature_net(CPU)
    known = Distances(net, reference(packed(str(tmp_path)), net, Workers()))
    share = range(COUNT)
    index = torch.arange(COUNT)
    own = [(index, pixels(COUNT))]
    exact = reconstruction_quality(Known(0), own, COUNT, Workers(), known, {}).metrics
    off = reconstruction_quality(Known(9), batches(share), COUNT, Workers(), known, {}).metrics
    assert exact["eval/rfd_digits"] == pytest.approx(0, abs=1e-6)
    assert off["eval/rfd_digits"] > 0.01
    assert "eval/rfd_digits_low" in exact
    assert not [key for key in exact if key.startswith(("eval/fd", "eval/is", "eval/recognised"))]


def test_any_number_of_workers_gives_the_same_scores(on_workers: OnWorkers) -> None:
    def score(workers: Workers) -> dict[str, float]:
        mine = batches(workers.share(COUNT))
        return reconstruction_quality(Known(2), mine, COUNT, workers, None, {}).metrics

    (alone,), three = on_workers(1, score), on_workers(3, score)
    assert three[0] == three[1] == three[2] == pytest.approx(alone, rel=1e-12)
