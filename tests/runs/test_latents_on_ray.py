"""Latent diffusion on a real local Ray: each stage is killed, and its end has equal bits."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddpm_ray.assembly.set_encoder_loading import set_encoder
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.packing import encoded_packer
from ddpm_ray.runs import encode as encoding
from tests.data.latent_sets import TINY_UNET, encode_noise, write_autoencoder
from tests.faults.lives import TINY_AUTOENCODER, Life, hashes
from tests.limits import JOB_S
from tests.noise import pack
from tests.runs.job import Job, check_rows
from tests.runs.test_encode import contrastive_run, files
from tests.runs.test_runs_on_ray import kill_a_worker

STEPS = 240
TRAINING = (
    "cluster.num_workers=2",
    f"training.steps={STEPS}",
    "training.global_batch_size=16",
    "training.checkpoint_every_steps=40",
    "training.log_every_steps=20",
    "training.grid_every_steps=100",
    "training.warmup_steps=10",
    "training.ema_decay_per_step=0.9",
)
AUTOENCODER = (
    "name=autoencoder",
    *TINY_AUTOENCODER,
    "autoencoder.discriminator_from_step=100",
    "evaluation.num_images=32",
    "evaluation.features=none",
    *TRAINING,
)
LATENTS = (
    "name=latents",
    "schedule.num_steps=60",
    "sampling.steps=2",
    "evaluation.num_images=0",
    "evaluation.validation_every_steps=60",
    "evaluation.validation_images=16",
    "data.flip=true",
    *TINY_UNET,
    *TRAINING,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(6 * JOB_S),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


def kill_the_driver(driver: int) -> None:
    os.kill(driver, signal.SIGKILL)


def train_with_kills(folder: Path, words: tuple[str, ...], name: str) -> Job:
    """Train with kill -9 of the driver, of a worker, and Ctrl-C; the job that reached the end."""
    config = folder / f"{name}.yaml"
    config.write_text("")
    strikes: tuple[tuple[int, Callable[[int], None], int], ...] = (
        (50, kill_the_driver, -signal.SIGKILL),
        (100, lambda driver: os.kill(driver, signal.SIGINT), 130),
        (150, kill_a_worker, 0),
    )
    for at, strike, code in strikes:
        job = Job(folder, words, config=str(config)).run(at=at, strike=strike)
        assert job.code == code, job.reported
    return job


def check_end(job: Job, unbroken: Life) -> None:
    """The end of `job` has the bits and the rows of an unbroken life without Ray."""
    unbroken.drive()
    assert unbroken.live(count=2)
    wanted = unbroken.end()
    assert hashes(job.result["checkpoint"]) == wanted.hashes
    check_rows(job.result, wanted.rows)


def pack_squares(folder: Path, shards: int) -> Dataset:
    """Ten grey squares of noise in each shard; 24 pixels a side suffice for a discriminator."""
    noise = np.random.default_rng(0).integers(0, 256, (10 * shards, 24, 24, 1)).astype(np.uint8)
    return pack(folder, noise, [10] * shards)


def test_an_autoencoder_survives_its_kills(tmp_path: Path) -> None:
    pixels = pack_squares(tmp_path / "pixels", 10)
    words = (*AUTOENCODER, f"data.url={pixels.url}")
    job = train_with_kills(tmp_path, words, "autoencoder")
    check_end(job, Life(tmp_path / "unbroken", pixels.url, AUTOENCODER))


@pytest.mark.parametrize("codec", ["latents", "embeddings"])
def test_an_encoding_survives_its_kills(codec: str, tmp_path: Path) -> None:
    pixels = pack_squares(tmp_path / "pixels", 400)
    network, encoded_to = str(tmp_path / "network"), tmp_path / "set"
    if codec == "latents":
        write_autoencoder(Path(network), side=24)
    else:
        contrastive_run(Path(network), pixels)
    options = EncodeConfig(flipped=codec == "latents", batch_size=100)
    flipped = f"flipped={str(options.flipped).lower()}"
    words = (pixels.url, str(encoded_to), flipped, "batch_size=100")
    for at in (1, 1000, 2000):
        killed = Job(tmp_path, words, "encode.py", network)
        killed.run(at=at, strike=kill_the_driver)
        assert killed.code == -signal.SIGKILL, killed.reported
        assert not (encoded_to / "manifest.json").exists()
    finished = Job(tmp_path, words, "encode.py", network).run()
    assert finished.code == 0, finished.reported
    assert finished.result["codec"] == codec
    assert finished.result["encoded"] < finished.result["samples"]
    loaded = set_encoder(network)
    plan = encoded_packer.make_encoding_plan(pixels, str(tmp_path / "whole"), loaded, options)
    with encoding.reproducible("cpu"):
        encoded = [encoded_packer.encode_shard(plan, n, loaded) for n in range(plan.shards)]
    encoded_packer.finish_encoded(plan, encoded)
    assert files(encoded_to) == files(tmp_path / "whole")


def test_a_model_of_latents_survives_its_kills(tmp_path: Path) -> None:
    url = encode_noise(tmp_path, images=100, side=24)
    job = train_with_kills(tmp_path, (*LATENTS, f"data.url={url}"), "latents")
    check_end(job, Life(tmp_path / "unbroken", url, LATENTS))
