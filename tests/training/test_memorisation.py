"""Planted copies are found beside what they are copies of; brute force, and any workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_ray.data.shards import Dataset
from ddpm_ray.generation.grids import GUTTER_PIXELS, LEGIBLE_PIXELS, MARGIN_PIXELS
from ddpm_ray.training import memorisation
from ddpm_ray.training.memorisation import NEIGHBOURS, SHOWN, nearest
from ddpm_ray.training.workers import Workers
from tests.noise import pack
from tests.training.conftest import OnWorkers

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
    """Distances in numpy's float64; chunks cut shards as well."""
    monkeypatch.setattr(memorisation, "CHUNK", 33)
    found = nearest(SAMPLES, dataset, Workers())
    x, y = (images.reshape(len(images), -1) / 127.5 - 1 for images in (SAMPLES.numpy(), DATA))
    distance = np.linalg.norm(x[:, None] - y, axis=2)
    order = distance.argsort(1)[:, :NEIGHBOURS]
    assert (found.position.numpy() == order).all()
    expected = np.take_along_axis(distance, order, 1)
    np.testing.assert_allclose(found.distance, expected, rtol=1e-4, atol=1e-5)
    assert (found.images.numpy() == DATA[order[:, :SHOWN]]).all()


def test_copies_are_told_from_new_images(dataset: Dataset) -> None:
    found = nearest(SAMPLES, dataset, Workers())
    assert found.position[6:9, 0].tolist() == list(COPIES)
    assert (found.distance[6:9, 0] == 0).all()
    assert found.position[9, 0] == 40  # paler, and still itself
    assert (found.ratio[:6] > 0.7).all()
    assert (found.ratio[6:9] == 0).all()
    assert 0 < found.ratio[9] < 0.5
    assert found.metrics["eval/memorised_share"] == 0.4
    assert found.metrics["eval/nearest_ratio"] == found.ratio.median()


@pytest.mark.parametrize("count", [2, 3, 6])
def test_any_number_of_workers_finds_what_one_finds(
    count: int, dataset: Dataset, on_workers: OnWorkers
) -> None:
    """Of six workers some have no shard."""
    one = nearest(SAMPLES, dataset, Workers())
    for other in on_workers(count, lambda workers: nearest(SAMPLES, dataset, workers)):
        assert torch.equal(other.position, one.position)
        torch.testing.assert_close(other.distance, one.distance)
        assert torch.equal(other.images, one.images)


def test_fewer_images_than_neighbours_are_all_of_them(tmp_path: Path) -> None:
    few = pack(tmp_path, DATA[:7], [3, 4])
    found = nearest(torch.from_numpy(DATA[:1]), few, Workers())
    assert sorted(found.position[0].tolist()) == list(range(7))
    assert found.distance.isfinite().all()


def test_the_picture_shows_the_most_suspicious_first_beside_its_copy(dataset: Dataset) -> None:
    picture = np.asarray(nearest(SAMPLES, dataset, Workers()).picture(4))
    cell = LEGIBLE_PIXELS // 6 + 1  # enlarged by a whole factor to at least 64 pixels
    side, gap = cell * 6, GUTTER_PIXELS
    assert picture.shape == (
        MARGIN_PIXELS + 4 * (side + gap) + gap, MARGIN_PIXELS + 6 * (side + gap) + gap, 3,
    )  # fmt: skip
    row = picture[MARGIN_PIXELS + gap :][:side:cell, MARGIN_PIXELS + gap :]
    sample, copy = row[:, :side:cell], row[:, side + gap :][:, :side:cell]
    assert (sample == copy).all()
    assert any((sample == DATA[i]).all() for i in COPIES)


def test_data_of_another_shape_or_too_little_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samples are \[6, 6, 1\] and .* \[6, 6, 3\]"):
        nearest(SAMPLES[..., :1], dataset, Workers())
    with pytest.raises(ValueError, match="holds 5 images; it needs 6"):
        nearest(SAMPLES, pack(tmp_path, DATA[:5], [5]), Workers())
