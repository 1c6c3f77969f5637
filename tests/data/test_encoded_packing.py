"""Encoding to latents or embeddings: equal bytes in any order, resumed after any kill, refusals."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data import encoding_record
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import Dataset, DatasetError, UInt8s, open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.latent_preview import add_grams, fit_preview, gram_of
from ddpm_ray.data.loader import read_captions, read_images
from ddpm_ray.data.manifest import ENCODED_BY, Recipe
from ddpm_ray.data.packing import encoded_packer, packer
from ddpm_ray.data.packing.embedding_encoder import EmbeddingEncoder
from ddpm_ray.data.packing.encoded_packer import EncodePlan
from ddpm_ray.data.packing.latent_encoder import LatentEncoder
from ddpm_ray.data.packing.set_encoder import SetEncoder
from ddpm_ray.data.packing.sources import ArraySource
from ddpm_ray.data.shards import Latents, fetch_shard
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec, Posterior
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import StorageError
from tests.data.captioned_sets import write_captioned
from tests.data.latent_sets import random_latents, write_latents

SAMPLES, PER_SHARD = 11, 3
MakeEncoder: TypeAlias = Callable[..., SetEncoder]
Ints: TypeAlias = tuple[int, ...]


class Killed(BaseException):
    """The process was killed."""


class TinyAutoencoder:
    """A random autoencoder of factor 2, with the interface of TrainedAutoencoder."""

    def __init__(self, seed: int = 0, gain: float = 1.0, url: str = "runs/tiny") -> None:
        torch.manual_seed(seed)
        self.model = Autoencoder(AutoencoderSpec(1, 2, 4, (1, 1), 1, 2, False)).eval()
        self.sha256, self.url, self.gain = f"{seed:064x}", url, gain
        self.device, self.core_seconds = torch.device("cpu"), 500.0

    def latent_shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        return self.model.spec.latent_shape(image_shape[:2])

    @torch.no_grad()
    def encode_uint8(self, images: UInt8s) -> Posterior:
        posterior = self.model.encode(PIXELS.encode(torch.from_numpy(images)))
        return Posterior(posterior.mean * self.gain, posterior.log_variance)


class TinyEncoders:
    """A random image encoder of width 5, with the interface of TrainedEncoders."""

    width = 5

    def __init__(self, seed: int = 0, url: str = "runs/tiny") -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(4, self.width)
        self.sha256, self.url = f"{seed:064x}", url
        self.device, self.core_seconds = torch.device("cpu"), 500.0

    def require_fitting(self, image_shape: ImageShape) -> None:
        if image_shape.height % 2:
            raise ValueError(f"images are {image_shape}")

    @torch.no_grad()
    def image_embeddings(self, images: UInt8s, *, batch_size: int) -> torch.Tensor:
        assert batch_size == len(images) <= 3
        found = self.model(torch.from_numpy(images).float().mean(1).flatten(1))
        return torch.nn.functional.normalize(found, dim=1)


def latent_encoder(seed: int = 0, url: str = "runs/tiny") -> SetEncoder:
    return LatentEncoder(TinyAutoencoder(seed, url=url))


def embedding_encoder(seed: int = 0, url: str = "runs/tiny") -> SetEncoder:
    return EmbeddingEncoder(TinyEncoders(seed, url))


MAKERS = (latent_encoder, embedding_encoder)
each_codec = pytest.mark.parametrize("make", MAKERS)


def pixels(folder: Path, samples: int = SAMPLES, side: int = 6) -> Dataset:
    """Pack grey noise of side x 4 pixels, PER_SHARD images per shard, labels n % 2."""
    noise = np.random.default_rng(3).integers(0, 256, (samples, side, 4, 1), dtype=np.uint8)
    source = ArraySource("n", noise, np.arange(samples) % 2, ("even", "odd"))
    recipe = Recipe(ImageShape(side, 4, 1), "raw", "none", ("even", "odd"), source.digest)
    count = -(-samples // PER_SHARD)
    plan = packer.PackPlan(source, str(folder), PackConfig(), recipe, count, PER_SHARD)
    return packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in range(count)])


@pytest.fixture
def source(tmp_path: Path) -> Dataset:
    return pixels(tmp_path / "pixels")


def plan_of(
    source: Dataset, destination: Path, encoder: SetEncoder, **options: object
) -> EncodePlan:
    usual = {"flipped": encoder.codec == "latents", "batch_size": 2}
    config = EncodeConfig(**{**usual, **options})  # type: ignore[arg-type]
    return encoded_packer.make_encoding_plan(source, str(destination), encoder, config)


def encode(
    source: Dataset, destination: Path, make: MakeEncoder = latent_encoder, order: Ints = ()
) -> Dataset:
    encoder = make()
    plan = plan_of(source, destination, encoder)
    numbers = order or range(plan.shards)
    done = [encoded_packer.encode_shard(plan, n, encoder) for n in numbers]
    return encoded_packer.finish_encoded(plan, done)


@each_codec
def test_captions_are_those_of_the_images(make: MakeEncoder, tmp_path: Path) -> None:
    texts = [[f"{n}" for n in range(k % 3)] for k in range(SAMPLES)]
    source = write_captioned(tmp_path / "pixels", texts, PER_SHARD)
    encode(source, tmp_path / "set", make, order=(3, 0, 2, 1))
    dataset = open_dataset(str(tmp_path / "set"))
    assert (dataset.manifest.captioned, dataset.manifest.captions) == (True, SAMPLES - 1)
    assert list(read_captions(dataset, range(4))) == list(map(tuple, texts))
    found = encoded_packer.find_finished_set(plan_of(source, tmp_path / "set", make()))
    assert found is not None
    plain = pixels(tmp_path / "plain")
    with pytest.raises(DatasetError, match=r"already here \(.*captioned.* differ\)"):
        encoded_packer.find_finished_set(plan_of(plain, tmp_path / "set", make()))


def files(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != encoding_record.COST)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_latents_are_those_of_the_network_with_labels_and_keys(
    source: Dataset, tmp_path: Path
) -> None:
    encode(source, tmp_path / "set")
    dataset = open_dataset(str(tmp_path / "set"))
    assert (dataset.manifest.codec, dataset.manifest.views) == ("latents", ("plain", "flipped"))
    assert dataset.manifest.latent_shape == (2, 3, 2)
    assert dataset.manifest.image_shape == source.manifest.image_shape
    assert dataset.manifest.pixel_mean == source.manifest.pixel_mean
    assert dataset.manifest.source_sha256 == source.fingerprint
    assert dataset.manifest.label_names == ("even", "odd")
    model = TinyAutoencoder().model
    for number in range(4):
        (batch,) = read_images(source, [number])
        before, after = fetch_shard(source, number), fetch_shard(dataset, number)
        assert after.keys.equals(before.keys)
        assert after.labels.tolist() == before.labels.tolist()
        assert isinstance(after.images, Latents)
        for view, images in enumerate([batch.images, batch.images.flip(2)]):
            with torch.no_grad():
                expected = model.encode(PIXELS.encode(images))
            for found, wanted in zip(after.images, expected, strict=True):
                np.testing.assert_allclose(found[:, view], wanted, rtol=1e-3, atol=1e-4)


def test_embeddings_are_those_of_the_network_with_labels_and_keys(
    source: Dataset, tmp_path: Path
) -> None:
    encode(source, tmp_path / "set", embedding_encoder)
    dataset = open_dataset(str(tmp_path / "set"))
    manifest = dataset.manifest
    assert (manifest.codec, manifest.embedding_width) == ("embeddings", 5)
    assert (manifest.encoder_sha256, manifest.source_sha256) == ("0" * 64, source.fingerprint)
    assert manifest.image_shape == source.manifest.image_shape
    assert manifest.pixel_mean == source.manifest.pixel_mean
    network, stored = TinyEncoders(), []
    for number in range(4):
        (batch,) = read_images(source, [number])
        before, after = fetch_shard(source, number), fetch_shard(dataset, number)
        assert after.keys.equals(before.keys)
        assert after.labels.tolist() == before.labels.tolist()
        expected = network.image_embeddings(batch.images.numpy(), batch_size=len(batch.images))
        assert isinstance(after.images, np.ndarray)
        np.testing.assert_allclose(after.images, expected, rtol=1e-3, atol=1e-6)
        stored.append(after.images.astype(np.float64))
    assert manifest.embedding_mean == pytest.approx(np.concatenate(stored).mean(0), rel=1e-12)
    assert manifest.embedding_std == pytest.approx(np.concatenate(stored).std(0), rel=1e-12)


@settings(max_examples=8)
@given(st.permutations(range(4)), st.sampled_from(MAKERS))
def test_any_order_of_the_shards_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], make: MakeEncoder
) -> None:
    """As two or more tasks encode them; a task may also be repeated after its worker was lost."""
    folder = tmp_path_factory.mktemp("sets")
    source = pixels(folder / "pixels")
    encode(source, folder / "one", make)
    encoder = make()
    plan = plan_of(source, folder / "two", encoder)
    done = [encoded_packer.encode_shard(plan, n, encoder) for n in order]
    encoded_packer.encode_shard(plan, order[0], encoder)
    encoded_packer.finish_encoded(plan, done)
    assert files(folder / "one") == files(folder / "two")


WRITES = 4 * 2 + 4  # a shard and its part, four times; record, cost, index, manifest


@pytest.mark.parametrize("at", range(WRITES))
@pytest.mark.parametrize("after", [False, True])
@each_codec
def test_a_job_killed_at_any_write_goes_on(
    make: MakeEncoder, after: bool, at: int, source: Dataset, tmp_path: Path
) -> None:
    """Killed just before or just after its write number `at`."""
    encode(source, tmp_path / "whole", make)
    write, left = object_store.write_bytes, iter(range(at, -1, -1))

    def killed(url: str, data: bytes) -> None:
        stops = next(left) == 0
        if after or not stops:
            write(url, data)
        if stops:
            raise Killed(f"at {url}")

    with mock.patch.object(object_store, "write_bytes", killed), pytest.raises(Killed, match="at "):
        encode(source, tmp_path / "set", make)
    complete = at == WRITES - 1 and after
    assert (tmp_path / "set/manifest.json").exists() == complete
    plan = plan_of(source, tmp_path / "set", make())
    found = encoded_packer.find_finished_set(plan) or encode(source, tmp_path / "set", make)
    whole, there = files(tmp_path / "whole"), files(tmp_path / "set")
    assert found.fingerprint == open_dataset(str(tmp_path / "whole")).fingerprint
    assert {name: there[name] for name in whole} == whole
    assert complete or there.keys() == whole.keys()


@each_codec
def test_finished_shards_are_not_encoded_again(
    make: MakeEncoder, source: Dataset, tmp_path: Path
) -> None:
    encoder = make()
    plan = plan_of(source, tmp_path / "set", encoder)
    for n in (0, 2):
        encoded_packer.encode_shard(plan, n, encoder)
    again = plan_of(source, tmp_path / "set", encoder)
    found = [encoded_packer.find_encoded(again, n) for n in range(4)]
    assert [one is not None for one in found] == [True, False, True, False]
    with mock.patch.object(type(encoder), "encode", side_effect=AssertionError):
        encoded_packer.encode_shard(again, 2, encoder)


def test_parts_without_their_cost_are_encoded_again(source: Dataset, tmp_path: Path) -> None:
    """As earlier commits wrote them: the set would be recorded as cheaper than it was."""
    encoder = latent_encoder()
    plan = plan_of(source, tmp_path / "set", encoder)
    first = encoded_packer.encode_shard(plan, 0, encoder)
    (part,) = (tmp_path / "set/parts").iterdir()
    held = json.loads(part.read_text())
    del held["core_s"]
    part.write_text(json.dumps(held))
    assert encoded_packer.find_all_encoded(plan) == []
    again = encoded_packer.encode_shard(plan, 0, encoder)
    assert again.row == first.row
    assert "core_s" in json.loads(part.read_text())


@pytest.mark.parametrize(
    "make, changed",
    [
        (latent_encoder, {"batch_size": 3}),
        (latent_encoder, {"flipped": False}),
        (embedding_encoder, {"batch_size": 3}),
    ],
)
def test_parts_of_other_options_or_another_network_are_not_used(
    make: MakeEncoder, changed: dict[str, object], source: Dataset, tmp_path: Path
) -> None:
    encoder, place = make(), tmp_path / "set"
    encoded_packer.encode_shard(plan_of(source, place, encoder), 0, encoder)
    assert encoded_packer.find_encoded(plan_of(source, place, make(1)), 0) is None
    assert encoded_packer.find_encoded(plan_of(source, place, encoder, **changed), 0) is None


BATCHES = "encoded with {'batch_size': 2}, now {'batch_size': 3}"


@pytest.mark.parametrize(
    "make, then, changed, message",
    [
        (latent_encoder, latent_encoder(1), {}, "encoded by the autoencoder of sha256 0{12}, and"),
        (latent_encoder, latent_encoder(), {"flipped": False}, "views differ"),
        (latent_encoder, latent_encoder(), {"batch_size": 3}, BATCHES),
        (latent_encoder, embedding_encoder(), {}, "it holds latents, not embeddings"),
        (embedding_encoder, latent_encoder(), {}, "it holds embeddings, not latents"),
        (
            embedding_encoder,
            embedding_encoder(1),
            {},
            "encoded by the encoder of sha256 0{12}, and",
        ),
        (embedding_encoder, embedding_encoder(), {"batch_size": 3}, BATCHES),
    ],
)
def test_a_set_of_another_encoding_is_kept(
    make: MakeEncoder,
    then: SetEncoder,
    changed: dict[str, object],
    message: str,
    source: Dataset,
    tmp_path: Path,
) -> None:
    encode(source, tmp_path / "set", make)
    before = files(tmp_path / "set")
    plan = plan_of(source, tmp_path / "set", then, **changed)
    with pytest.raises(DatasetError, match=rf"already here \({message}.*\); delete it, or choose"):
        encoded_packer.find_finished_set(plan)
    assert files(tmp_path / "set") == before


@each_codec
def test_a_finished_set_is_found_also_if_the_network_was_moved(
    make: MakeEncoder, source: Dataset, tmp_path: Path
) -> None:
    dataset = encode(source, tmp_path / "set", make)
    plan = plan_of(source, tmp_path / "set", make(url="elsewhere"))
    found = encoded_packer.find_finished_set(plan)
    assert found is not None
    assert found.fingerprint == dataset.fingerprint
    record = encoding_record.read_encoding(found)
    assert record is not None
    assert (record.network, record.data) == ("runs/tiny", source.url)


def test_what_cannot_be_encoded_is_refused(source: Dataset, tmp_path: Path) -> None:
    odd, place = pixels(tmp_path / "odd", side=5), tmp_path / "set"
    with pytest.raises(DatasetError, match=r"images are 5 x 4, .* multiples of 2.*; pack the imag"):
        plan_of(odd, place, latent_encoder())
    with pytest.raises(DatasetError, match=r"images are 5x4x1; pack the images again, .* the enc"):
        plan_of(odd, place, embedding_encoder())
    with pytest.raises(ConfigError, match="flipped is true, but sets of embeddings have no"):
        plan_of(source, place, embedding_encoder(), flipped=True)
    for make in MAKERS:
        held = make().codec
        encoded = encode(source, tmp_path / held, make)
        for other in MAKERS:
            says = f"the data set holds {held}, not images; name the images that"
            with pytest.raises(DatasetError, match=says):
                plan_of(encoded, place, other())
        with pytest.raises(DatasetError, match=rf"already here \(it holds images, not {held}\)"):
            encoded_packer.find_finished_set(plan_of(source, Path(source.url), make()))


def test_an_embedding_that_is_not_finite_names_its_image(source: Dataset, tmp_path: Path) -> None:
    encoder = embedding_encoder()
    original = TinyEncoders.image_embeddings

    def broken(self: TinyEncoders, images: UInt8s, *, batch_size: int) -> torch.Tensor:
        found = original(self, images, batch_size=batch_size)
        if len(images) == 1:  # the last image of the shard, in the second batch
            found[0, 2] = torch.nan
        return found

    plan = plan_of(source, tmp_path / "set", encoder)
    with (
        mock.patch.object(TinyEncoders, "image_embeddings", broken),
        pytest.raises(DatasetError, match="sample n-000005: its embedding has values that are not"),
    ):
        encoded_packer.encode_shard(plan, 1, encoder)


def test_a_sample_without_float16_latents_is_named(source: Dataset, tmp_path: Path) -> None:
    """Only the brightest image is beyond 65504."""
    autoencoder = TinyAutoencoder()
    encoder = LatentEncoder(autoencoder)
    largest = [
        float(autoencoder.encode_uint8(batch.images.numpy()[n : n + 1]).mean.abs().max())
        for batch in read_images(source, range(4))
        for n in range(len(batch.images))
    ]
    highest, second = sorted(range(SAMPLES), key=lambda n: -largest[n])[:2]
    autoencoder.gain = 65504 / np.sqrt(largest[highest] * largest[second])
    plan = plan_of(source, tmp_path / "set", encoder, flipped=False)
    with pytest.raises(
        DatasetError,
        match=rf"sample n-{highest:06d}: its latents exceed the range of float16 \(large",
    ):
        encoded_packer.encode_shard(plan, highest // PER_SHARD, encoder)


def test_the_preview_is_the_least_squares_map_with_its_r_squared(tmp_path: Path) -> None:
    """numpy's lstsq on the same pairs, in float64, is the reference."""
    rng = np.random.default_rng(0)
    latents = random_latents(9)
    dataset = write_latents(tmp_path, latents, 4)
    images = rng.integers(0, 256, (9, 4, 8, 3), dtype=np.uint8)
    images[..., 0] = np.clip(128 + 30 * latents.mean[:, 0, 1].repeat(2, 1).repeat(2, 2), 0, 255)
    parts = [gram_of(latents.mean[a:b, 0], images[a:b]) for a, b in ((0, 4), (4, 8), (8, 9))]
    assert add_grams(parts) == add_grams(parts[::-1]) == gram_of(latents.mean[:, 0], images)
    preview = fit_preview(add_grams(parts), dataset.manifest)
    codec = LatentCodec.of(dataset.manifest)
    x_0 = codec.encode(torch.from_numpy(np.stack(latents, axis=1)))
    rows = np.moveaxis(x_0.double().numpy(), 1, -1).reshape(-1, 3)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    colours = images.reshape(9, 2, 2, 4, 2, 3).mean(axis=(2, 4)).reshape(-1, 3)
    solution, *_ = np.linalg.lstsq(rows, colours, rcond=None)
    np.testing.assert_allclose(preview.matrix, solution[:3].T, atol=0.02)
    np.testing.assert_allclose(preview.bias, solution[3], atol=0.02)
    error = np.square(rows @ solution - colours).sum()
    total = np.square(colours - colours.mean(0)).sum()
    assert preview.r_squared == pytest.approx(1 - error / total, abs=1e-4)
    shown = preview.images(x_0)
    assert shown.shape == (9, 2, 4, 3)
    assert np.abs(shown.reshape(-1, 3) - (rows @ solution).clip(0, 255)).max() < 1


def test_a_preview_of_constant_channels_and_images_is_finite(tmp_path: Path) -> None:
    mean = np.full((2, 1, 3, 2, 4), 7, np.float16)
    dataset = write_latents(tmp_path, Latents(mean, np.zeros_like(mean)), 2, views=("plain",))
    images = np.full((2, 4, 8, 1), 90, np.uint8)
    preview = fit_preview(gram_of(mean[:, 0], images), dataset.manifest)
    assert preview.r_squared == 1
    assert (preview.images(torch.zeros(1, 3, 2, 4)) == 90).all()


@each_codec
def test_the_cost_of_all_starts_is_recorded_with_the_set(
    make: MakeEncoder, source: Dataset, tmp_path: Path
) -> None:
    """Each look at the clock is 1 s later, so each shard takes 1 s; one start is killed."""
    seconds, encoder = itertools.count(0.0), make()
    plan = plan_of(source, tmp_path / "set", encoder)
    with mock.patch("time.process_time", seconds.__next__):
        encoded_packer.encode_shard(plan, 2, encoder)
        found = [encoded_packer.encode_shard(plan, n, encoder) for n in range(plan.shards)]
    dataset = encoded_packer.finish_encoded(plan, found)
    cost = encoding_record.read_cost(dataset)
    assert cost == encoding_record.EncodingCost(encoding=plan.shards, network=500.0)
    (tmp_path / "set" / encoding_record.COST).unlink()
    assert encoding_record.read_cost(dataset) is None


@pytest.mark.parametrize(
    "make, key",
    [
        (latent_encoder, "preview"),
        (latent_encoder, "autoencoder"),
        (latent_encoder, "options"),
        (embedding_encoder, "encoder"),
        (embedding_encoder, "encoder_sha256"),
    ],
)
def test_a_damaged_record_is_refused(
    make: MakeEncoder, key: str, source: Dataset, tmp_path: Path
) -> None:
    dataset = encode(source, tmp_path / "set", make)
    where = f"{dataset.url}/{encoding_record.RECORD}"
    held = checksummed_json.read(where)
    checksummed_json.write(where, {name: held[name] for name in held if name != key})
    with pytest.raises(StorageError, match=r"encoding.json: not an encoding record .*; delete"):
        encoding_record.read_encoding(dataset)


def test_a_preview_of_other_channels_is_refused(source: Dataset, tmp_path: Path) -> None:
    dataset = encode(source, tmp_path / "set")
    where = f"{dataset.url}/{encoding_record.RECORD}"
    held = checksummed_json.read(where)
    held["preview"]["matrix"] = [[*row, 1.0] for row in held["preview"]["matrix"]]
    checksummed_json.write(where, held)
    with pytest.raises(StorageError, match=r"not an encoding record \(ValueError\).*; delete"):
        encoding_record.read_encoding(dataset)


def test_a_damaged_cost_is_refused(source: Dataset, tmp_path: Path) -> None:
    dataset = encode(source, tmp_path / "set")
    where = f"{dataset.url}/{encoding_record.COST}"
    checksummed_json.write(where, {"encoding": None, "autoencoder": 1.0})
    with pytest.raises(StorageError, match=r"not the cost of an encoding \(TypeError\).*; delete"):
        encoding_record.read_cost(dataset)


@each_codec
def test_the_manifest_names_no_place(make: MakeEncoder, source: Dataset, tmp_path: Path) -> None:
    """So the fingerprint is the same wherever the network and the images are."""
    dataset = encode(source, tmp_path / "set", make)
    manifest = (tmp_path / "set/manifest.json").read_text()
    assert "runs/tiny" not in manifest
    assert str(tmp_path) not in manifest
    network = ENCODED_BY[dataset.manifest.codec]
    assert json.loads(manifest)[f"{network}_sha256"] == "0" * 64
