"""More workers than there is work: where it is shared out, some get none and all find the same."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_ray.assembly import training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.evaluation.memorisation import nearest_images, spread
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.runs import load_model
from ddpm_ray.runs.evaluation import evaluate_worker
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import SamplingPlan, draw_uint8
from ddpm_ray.training.sample_grids import GRID_IMAGES, SampleGridLogger
from ddpm_ray.training.validation_loss import Validator
from tests.evaluation.test_sample_quality import net
from tests.noise import pack
from tests.training.test_sample_grids import Wall

OnWorkers = Callable[[int, Callable[[Workers], Any]], list[Any]]
SCHEDULE = NoiseSchedule(schedules.cosine(10))
PLAN = SamplingPlan((10, 5, 0), SamplingSettings(seed=4))
MANY = 9  # workers, for 2 shards, 3 images, 2 groups of validation images


def blind(x_t: Tensor, t: Tensor) -> Tensor:
    """A pointwise denoiser: its images do not depend on how they were batched."""
    return 0.6 * x_t


def packed(folder: Path, side: int) -> str:
    ground = np.random.default_rng(0).integers(0, 256, (12, side, side, 1))
    pack(folder, ground.astype(np.uint8), [7, 5])
    return str(folder)


def test_no_image_is_an_empty_batch() -> None:
    drawn = draw_uint8(
        Denoiser.of_noise(blind, SCHEDULE), PLAN, range(3, 3), ImageShape(4, 6, 2), "cpu", 8
    )
    assert drawn.shape == (0, 4, 6, 2)
    assert drawn.dtype == np.uint8


def test_a_grid_is_the_same_by_more_workers_than_it_has_images(
    on_workers: OnWorkers, tmp_path: Path
) -> None:
    def picture(workers: Workers) -> bytes:
        wall = Wall()
        SampleGridLogger(
            Denoiser.of_noise(blind, SCHEDULE),
            PLAN,
            ImageShape(4, 4, 1),
            workers,
            str(tmp_path / str(workers.rank)),
            wall if workers.is_main else None,
        ).log_grid(0)
        return wall.pictures["samples", 0].tobytes() if workers.is_main else b""

    assert on_workers(GRID_IMAGES + 1, picture)[0] == picture(Workers())


def test_a_model_is_scored_the_same_by_more_workers_than_images(
    on_workers: OnWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances, bits per dimension, likelihood, and the nearest training images."""
    model = TrainedModel(
        Denoiser.of_noise(blind, SCHEDULE),
        ImageShape(8, 8, 1),
        {"config": to_dict(RunConfig()), "step": 3, "weights_sha256": "a" * 64},
    )
    wanted = EvaluationConfig(
        num_images=3,
        features="digits",
        kernel_distance_images=2,
        memorisation_images=3,
        bits_per_dim_images=3,
        likelihood_images=3,
        likelihood_steps=4,
        held_out_url=packed(tmp_path / "held-out", 8),
    )
    config = EvaluateConfig(data_url=packed(tmp_path / "data", 8), evaluation=wanted)
    config = replace(config, sampling=replace(config.sampling, steps=2))
    here = threading.local()
    monkeypatch.setattr(load_model, "load_to_draw", lambda *_, **__: model)
    monkeypatch.setattr(evaluate_worker, "distributed_context", lambda: here.workers)

    def metrics(workers: Workers) -> dict[str, float]:
        here.workers = workers
        settings = {"model_uri": "", "tracking_uri": ""}
        found = evaluate_worker._scores(config, settings, lambda progress: None)
        return dict(found["metrics"])

    alone = metrics(Workers())
    assert {"eval/fd_digits", "eval/bits_per_dim", "eval/likelihood_bits_per_dim"} < alone.keys()
    for found in on_workers(MANY, metrics):
        assert found == pytest.approx(alone, rel=1e-5)  # float32 features, other batches


def test_a_data_set_is_read_by_more_workers_than_shards(
    on_workers: OnWorkers, tmp_path: Path
) -> None:
    dataset = pack(tmp_path, np.full((12, 6, 6, 1), 7, np.uint8), [7, 5])

    def read(workers: Workers) -> tuple[int, int, list[int]]:
        known = reference(dataset, net(5), workers, kernel_images=4)
        samples = spread(dataset, 2, workers)
        near = nearest_images(samples, dataset, workers)
        return known.count, known.kernel_images, near.position[0].tolist()

    assert on_workers(MANY, read) == [read(Workers())] * MANY


def test_a_validation_loss_is_the_same_by_more_workers_than_groups(
    on_workers: OnWorkers, tmp_path: Path
) -> None:
    config = load_config(
        RunConfig,
        None,
        [
            "name=tiny",
            f"data.url={packed(tmp_path, 4)}",
            "evaluation.validation_images=32",
            "model.base_channels=4",
            "model.groups=2",
            "model.channel_mults=[1]",
            "model.blocks_per_level=1",
            "model.attention_resolutions=[]",
        ],
    )
    dataset = open_dataset(config.data.url)
    state = training_run.training_state(config, ImageShape(4, 4, 1), torch.device("cpu"), {})

    def validate(workers: Workers) -> float:
        grid_logger = SampleGridLogger(
            Denoiser.of_noise(blind, SCHEDULE),
            PLAN,
            ImageShape(4, 4, 1),
            workers,
            str(tmp_path),
            None,
        )
        own = replace(state, validation_losses=[])
        validator: Validator = training_run.validator(config, dataset, own, grid_logger)
        validator.validate(1)
        return float(own.validation_losses[0]["loss"])

    alone = validate(Workers())
    assert on_workers(MANY, validate) == pytest.approx([alone] * MANY, rel=1e-6)
