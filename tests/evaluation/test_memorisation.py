"""Planted copies are found beside what they are copies of; brute force, and any workers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import NoiseSchedule, schedules
from ddpm_ray.evaluation import nearest_neighbours
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.memorisation import NEIGHBOURS, SHOWN, Neighbours, nearest_images, spread
from ddpm_ray.reporting import Progress
from ddpm_ray.runs import load_model
from ddpm_ray.runs.evaluation import evaluate_worker
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.image_grid import GUTTER_PIXELS, LEGIBLE_PIXELS, MARGIN_PIXELS
from ddpm_ray.sampling.pipeline import TrainedModel
from tests.fixtures.threaded_workers import OnWorkers
from tests.noise import pack

DICE = np.random.default_rng(5)
DATA = DICE.integers(0, 256, (200, 6, 6, 3)).astype(np.uint8)
FRESH = DICE.integers(0, 256, (6, 6, 6, 3)).astype(np.uint8)
COPIES = (17, 90, 199)
SAMPLES = torch.from_numpy(
    np.concatenate(
        [FRESH, DATA[[*COPIES]], np.clip(DATA[40:41] // 2 + 63, 0, 255).astype(np.uint8)]
    )
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return pack(tmp_path_factory.mktemp("data"), DATA, [50, 90, 7, 53])


def test_it_is_what_brute_force_finds(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances in numpy's float64; blocks cut shards and samples as well."""
    monkeypatch.setattr(nearest_neighbours, "_BLOCK", 7 * 108)
    found = nearest_images(SAMPLES, dataset, Workers())
    x, y = (images.reshape(len(images), -1) / 127.5 - 1 for images in (SAMPLES.numpy(), DATA))
    distance = np.linalg.norm(x[:, None] - y, axis=2)
    order = distance.argsort(1)[:, :NEIGHBOURS]
    assert (found.position.numpy() == order).all()
    expected = np.take_along_axis(distance, order, 1)
    np.testing.assert_allclose(found.distance, expected, rtol=1e-12)
    assert (found.images.numpy() == DATA[order[:, :SHOWN]]).all()


def test_copies_are_distinguished_from_new_images(dataset: Dataset) -> None:
    found = nearest_images(SAMPLES, dataset, Workers())
    assert found.position[6:9, 0].tolist() == list(COPIES)
    assert (found.distance[6:9, 0] == 0).all()
    assert found.position[9, 0] == 40  # paler, and still itself
    assert (found.ratio[:6] > 0.7).all()
    assert (found.ratio[6:9] == 0).all()
    assert 0 < found.ratio[9] < 0.5
    assert found.metrics["eval/memorised_share"] == 0.4
    assert found.metrics["eval/nearest_ratio"] == found.ratio.median()


@pytest.mark.parametrize("distance, share", [(0.49, 1), (0.5, 0)])
def test_less_than_half_the_mean_of_fifty_is_a_copy(distance: float, share: int) -> None:
    """Of 49 neighbours at 1 and one nearer: by hand, 0.49 is 0.495 of the mean and 0.5 is 0.505."""
    away = torch.ones(1, NEIGHBOURS, dtype=torch.float64)
    away[0, 0] = distance
    none, image = torch.zeros(1, NEIGHBOURS).long(), torch.zeros(1, 2, 2, 1).byte()
    found = Neighbours(image, away, none, image[:, None].repeat(1, SHOWN, 1, 1, 1))
    assert found.metrics["eval/memorised_share"] == share
    assert found.metrics["eval/nearest_ratio"] == pytest.approx(50 * distance / (49 + distance))


def test_what_is_in_the_data_fifty_times_is_a_copy_too(tmp_path: Path) -> None:
    """All of its neighbours are at 0, as is their mean."""
    often = pack(tmp_path, np.concatenate([DATA[:9], DATA[:1].repeat(60, 0)]), [40, 29])
    found = nearest_images(torch.from_numpy(DATA[:1]), often, Workers())
    assert (found.distance == 0).all()
    assert found.metrics == {"eval/memorised_share": 1, "eval/nearest_ratio": 0}


class Largest(TorchDispatchMode):
    """How many numbers the largest float64 tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_memory_is_bounded_by_the_block(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard has up to 9,720 numbers; in float64 are 7 images, or two lists of each sample."""
    monkeypatch.setattr(nearest_neighbours, "_BLOCK", 7 * 108)
    with Largest() as largest:
        nearest_images(SAMPLES, dataset, Workers())
    assert 7 * 108 <= largest.numbers <= len(SAMPLES) * 2 * NEIGHBOURS


def test_near_duplicates_differ_by_one_grey_level(tmp_path: Path) -> None:
    """A hundred images of 3,072 numbers, each a step from the one before: exact, not to 5e-4."""
    image = DICE.integers(100, 156, (32, 32, 3)).astype(np.uint8)
    steps = np.repeat(image[None], 100, 0)
    for i in range(100):
        steps[i, : i // 10 + 1, i % 10, 0] += 1
    found = nearest_images(
        torch.from_numpy(steps[40:41]), pack(tmp_path, steps, [60, 40]), Workers()
    )
    away = (steps.astype(float) - steps[40]).reshape(100, -1)
    expected = np.sort((away**2).sum(1))[:NEIGHBOURS] ** 0.5 / 127.5
    assert found.position[0, 0] == 40
    np.testing.assert_allclose(found.distance[0], expected, rtol=1e-12)


def of_columns(images: torch.Tensor) -> dict[int, torch.Tensor]:
    """Features that a shift of the image's rows leaves alone."""
    return {18: images.float().mean(1).flatten(1)}


def test_in_features_a_turned_copy_is_one_as_well(dataset: Dataset, on_workers: OnWorkers) -> None:
    net = FeatureNet("digits", (18,), of_columns, {})
    turned = SAMPLES.roll(2, dims=1)
    found = nearest_images(turned, dataset, Workers(), net)
    assert found.position[6:9, 0].tolist() == list(COPIES)
    assert (found.distance[6:9, 0] < 1e-4).all()
    assert nearest_images(turned, dataset, Workers()).metrics["eval/memorised_share"] == 0
    assert found.metrics.keys() == {"eval/memorised_share_digits", "eval/nearest_ratio_digits"}
    assert found.metrics["eval/memorised_share_digits"] >= 0.3
    for other in on_workers(2, lambda workers: nearest_images(turned, dataset, workers, net)):
        assert torch.equal(other.position, found.position)


def test_beside_images_that_were_not_trained_on(
    dataset: Dataset, tmp_path: Path, on_workers: OnWorkers
) -> None:
    """Fresh noise is as far from the data as other fresh noise; copies are not."""
    fresh = DICE.integers(0, 256, (90, 6, 6, 3)).astype(np.uint8)
    held_out = pack(tmp_path, fresh, [20, 50, 20])
    for some in on_workers(2, lambda workers: spread(held_out, 30, workers)):
        assert (some.numpy() == fresh[::3]).all()
    assert len(spread(held_out, 500, Workers())) == 90
    unseen = nearest_images(spread(held_out, 30, Workers()), dataset, Workers())
    new = nearest_images(torch.from_numpy(fresh[1::3]), dataset, Workers()).compared_with(unseen)
    assert new["eval/nearest_to_held_out"] == pytest.approx(1, abs=0.05)
    assert new["eval/memorised_share_held_out"] == 0
    copies = nearest_images(torch.from_numpy(DATA[::9]), dataset, Workers()).compared_with(unseen)
    assert copies["eval/nearest_to_held_out"] == 0


@pytest.mark.parametrize("count", [2, 3, 6])
def test_any_number_of_workers_finds_what_one_finds(
    count: int, dataset: Dataset, on_workers: OnWorkers
) -> None:
    """Of six workers some have no shard."""
    one = nearest_images(SAMPLES, dataset, Workers())
    for other in on_workers(count, lambda workers: nearest_images(SAMPLES, dataset, workers)):
        assert torch.equal(other.position, one.position)
        assert torch.equal(other.distance, one.distance)  # whole numbers: no rounding at all
        assert torch.equal(other.images, one.images)


def test_fewer_images_than_neighbours_are_all_of_them(tmp_path: Path) -> None:
    few = pack(tmp_path, DATA[:7], [3, 4])
    found = nearest_images(torch.from_numpy(DATA[:1]), few, Workers())
    assert sorted(found.position[0].tolist()) == list(range(7))
    assert found.distance.isfinite().all()


def test_the_picture_shows_the_most_suspicious_first_beside_its_copy(dataset: Dataset) -> None:
    picture = np.asarray(nearest_images(SAMPLES, dataset, Workers()).picture(4))
    cell = LEGIBLE_PIXELS // 6 + 1  # enlarged by a whole factor to at least 64 pixels
    side, gap = cell * 6, GUTTER_PIXELS
    height = MARGIN_PIXELS + side + 2 * gap  # of a row with its captions
    left = picture.shape[1] - 6 * (side + gap)  # as wide as its captions
    assert left >= MARGIN_PIXELS + gap
    assert picture.shape[::2] == (4 * height, 3)
    row = picture[MARGIN_PIXELS + gap :][:side:cell, left:]
    sample, copy = row[:, :side:cell], row[:, side + gap :][:, :side:cell]
    assert (sample == copy).all()
    assert any((sample == DATA[i]).all() for i in COPIES)


def test_captions_are_the_ratio_and_the_distances(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the paler image: its row is the fourth, after the three copies."""
    reported: list[tuple[list[str], list[str]]] = []

    def captioned(picture: Image.Image, above: list[str], row_captions: list[str]) -> Image.Image:
        reported.append((above, row_captions))
        return picture

    monkeypatch.setattr("ddpm_ray.evaluation.memorisation.captioned", captioned)
    nearest_images(SAMPLES, dataset, Workers()).picture(4)
    away = np.linalg.norm((SAMPLES[9].numpy() / 127.5 - DATA / 127.5).reshape(200, -1), axis=1)
    away = np.sort(away)[:NEIGHBOURS]
    assert reported[3][0] == ["sample", *(f"{d:.3g}" for d in away[:SHOWN])]
    assert reported[3][1] == [f"{away[0] / away.mean():.2f}"]
    assert reported[0][0][:2] == ["sample", "0"]


def test_facts_name_the_most_suspicious_samples_and_are_plain_json(dataset: Dataset) -> None:
    facts = json.loads(
        json.dumps(nearest_images(SAMPLES, dataset, Workers()).facts, allow_nan=False)
    )
    suspects = facts.pop("most_suspicious")
    assert facts == {"samples": 10, "space": "pixels", "neighbours": 50, "copy_ratio": 0.5}
    assert [of["sample"] for of in suspects[:4]] == [6, 7, 8, 9]
    assert [of["positions"][0] for of in suspects[:4]] == [*COPIES, 40]
    assert {len(of[name]) for of in suspects for name in ("positions", "distances")} == {SHOWN}
    ratios = [of["ratio"] for of in suspects]
    assert ratios == sorted(ratios)


def test_the_job_reports_a_model_that_recites(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its noise estimate leads every walk to training image 90; fresh images are held out."""
    schedule = NoiseSchedule(schedules.linear(50, rescale=True))
    known = torch.from_numpy(DATA[90]).permute(2, 0, 1) / 127.5 - 1

    def recite(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = schedule.at(t, x_t).float()
        return (x_t - a.sqrt() * known) / (1 - a).sqrt()

    provenance = {"config": to_dict(RunConfig())}
    model = TrainedModel(Denoiser.of_noise(recite, schedule), ImageShape(6, 6, 3), provenance)
    monkeypatch.setattr(load_model, "load_to_draw", lambda *_, **__: model)
    monkeypatch.setattr(evaluate_worker, "distributed_context", Workers)
    pack(tmp_path / "held-out", FRESH, [4, 2])
    picture = tmp_path / "nearest.png"
    wanted = EvaluationConfig(
        memorisation_images=5,
        memorisation_picture=str(picture),
        held_out_url=str(tmp_path / "held-out"),
    )
    config = EvaluateConfig(data_url=dataset.url, evaluation=wanted)
    shown: list[Progress] = []
    status = SimpleNamespace(fatal=None)
    control = SimpleNamespace(status=lambda: status, report=shown.append, report_fatal=pytest.fail)
    settings = {"model_uri": "", "tracking_uri": "", "config": to_dict(config), "control": control}
    found = evaluate_worker.evaluate_worker(settings)
    assert (shown[-1].step, shown[-1].steps) == (5, 5)
    assert found["metrics"] == {
        "eval/memorised_share": 1,
        "eval/nearest_ratio": 0,
        "eval/memorised_share_held_out": 0,
        "eval/nearest_to_held_out": 0,
    }
    assert [of["positions"][0] for of in found["memorisation"]["most_suspicious"]] == [90] * 5
    cell = LEGIBLE_PIXELS // 6 + 1
    with Image.open(picture) as drawn:
        assert drawn.height == 5 * (MARGIN_PIXELS + 6 * cell + 2 * GUTTER_PIXELS)


def test_data_of_another_shape_or_too_little_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samples are \[6, 6, 1\] and .* \[6, 6, 3\]"):
        nearest_images(SAMPLES[..., :1], dataset, Workers())
    with pytest.raises(ValueError, match=r"holds 5 images; the search for .* needs at least 6"):
        nearest_images(SAMPLES, pack(tmp_path, DATA[:5], [5]), Workers())
