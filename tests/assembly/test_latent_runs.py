"""Training on latents ends like any run, draws and edits pixels, and refuses what it cannot do."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddpm_ray
from ddpm_ray.assembly import diffusion, latents, run_config, training_run
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.collectives import Workers
from ddpm_ray.config.guidance import GuidanceConfig
from ddpm_ray.config.jobs.edit import EditConfig
from ddpm_ray.config.jobs.ema_search import AverageConfig
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.jobs.export import ExportConfig
from ddpm_ray.config.jobs.sample import SampleConfig
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import DatasetError, open_dataset
from ddpm_ray.data.encoding_record import read_encoding
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.packing import encoded_packer
from ddpm_ray.data.packing.latent_encoder import LatentEncoder
from ddpm_ray.runs import load_model
from ddpm_ray.runs.train import run_training
from ddpm_ray.runs.training_data import check_model
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.training.checkpoint_folder import CheckpointError, read_checkpoint
from ddpm_ray.training.checkpoints import CheckpointStore
from tests.data.latent_sets import (
    TINY_UNET,
    commit,
    encode_noise,
    initial_run,
    write_autoencoder,
)

CPU = torch.device("cpu")
TINY = (
    "name=tiny",
    "schedule.num_steps=20",
    *TINY_UNET,
    "sampling.steps=2",
)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return encode_noise(tmp_path_factory.mktemp("encoded"))


def configured(url: str, *overrides: str) -> RunConfig:
    return load_config(RunConfig, None, [*TINY, f"data.url={url}", *overrides])


@pytest.fixture(scope="module")
def model(encoded: str, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return ddpm_ray.load(committed(encoded, tmp_path_factory.mktemp("run")), "cpu")


def committed(url: str, folder: Path, **more: Any) -> str:
    """The folder of a run on the latents at `url`, as it begins, with `more` facts."""
    return commit(initial_run(configured(url), **more), folder)


def other_autoencoder(folder: Path) -> str:
    write_autoencoder(folder, side=16)  # the same weights
    weights = folder / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return str(folder)


def test_x_0_is_drawn_anew_in_each_step_from_the_view_that_the_flip_says(encoded: str) -> None:
    """It lies about the stored mean of that view, at the stored standard deviation."""
    config, dataset = configured(encoded, "data.flip=true"), open_dataset(encoded)
    codec = latents.codec_of_data(config.data, dataset)
    assert isinstance(codec, LatentCodec)
    facts = latents.codec_facts(codec)
    state = training_run.training_state(config, dataset.manifest.diffused_shape, CPU, facts)
    recipe = diffusion.objective(config, state, CPU).noising
    batch = training_run.fixed_images(config.data, dataset, range(8), 8)
    stored = batch.images
    positions = torch.arange(8)
    draws = [recipe.noisy_batch(batch, step, positions, CPU).x_0 for step in range(400)]
    z = torch.stack([codec.latents(x_0) for x_0 in draws]).double()
    assert len({float(one[0, 0, 0, 0]) for one in z}) > 300
    views = [stored[:, 0, view].double() for view in (0, 1)]
    wanted = (views[0] + views[1]) / 2
    spread = (stored[:, 1].double().exp().mean(1) + ((views[0] - views[1]) / 2) ** 2).sqrt()
    error = (z.mean(0) - wanted) / spread * len(z) ** 0.5  # a standard normal
    assert float(error.square().mean()) == pytest.approx(1, abs=0.5)


def test_a_checkpoint_rebuilds_its_codec_and_draws_pixels_without_the_data(
    encoded: str, tmp_path: Path
) -> None:
    run = committed(encoded, tmp_path)
    model = ddpm_ray.load(run, "cpu")
    assert model.sample(3).shape == (3, 8, 8, 1)
    assert model.sample(3).dtype == np.uint8
    codec = model.denoiser.codec
    assert isinstance(codec, LatentCodec)
    dataset = open_dataset(encoded)
    record = read_encoding(dataset)
    assert record is not None
    wanted = replace(LatentCodec.of(dataset.manifest), preview=record.preview)
    assert replace(codec, autoencoder=None) == wanted
    facts = CheckpointStore(str(tmp_path / "checkpoints")).load()
    assert facts is not None
    assert run_config.saved_codec(facts[1].facts) == replace(codec, autoencoder=None)


def test_a_preview_shows_each_latent_as_a_square_of_one_colour(model: TrainedModel) -> None:
    """By the map of the training data, not the decoder; an earlier checkpoint's are decoded."""
    seen: list[torch.Tensor] = []
    model.sample(2, on_step=lambda t, x_t, x_0: seen.append(x_t.clone()))
    shown = model.preview(seen[0])
    assert shown.shape == (2, 8, 8, 1)
    assert (shown == shown[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)).all()
    codec = model.denoiser.codec
    assert isinstance(codec, LatentCodec)
    older = replace(model, denoiser=replace(model.denoiser, codec=replace(codec, preview=None)))
    np.testing.assert_array_equal(older.preview(seen[0]), codec.decode(seen[0]))


def test_samples_are_not_clipped(model: TrainedModel) -> None:
    assert model.denoiser.codec.clip() is None
    assert model.with_settings(clip=False).settings.clip is False


@pytest.mark.parametrize("given", [{"clip": True}, {"dynamic_quantile": 0.9}])
def test_clipping_latents_is_refused(
    given: dict[str, Any], model: TrainedModel, encoded: str
) -> None:
    wanted = f"{next(iter(given))} is .*, but latents have no range to clip to: leave it out"
    with pytest.raises(ValueError, match=wanted):
        model.sample(1, **given)
    keys = [f"sampling.{key}={str(value).lower()}" for key, value in given.items()]
    with pytest.raises(ConfigError, match=f"sampling.{wanted}"):
        check_model(configured(encoded, *keys), open_dataset(encoded))


def test_another_autoencoder_is_refused(encoded: str, tmp_path: Path) -> None:
    other = other_autoencoder(tmp_path / "other")
    config = configured(encoded, f"data.autoencoder={other}")
    with pytest.raises(DatasetError, match=f"encoded by the autoencoder of sha256 .*{other} is"):
        run_training(config, tmp_path, lambda progress: None)  # before Ray and MLflow
    run = committed(encoded, tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"encoded by the autoencoder of sha256 .*{other} is"):
        ddpm_ray.load(run, "cpu", autoencoder=other)


def test_a_model_whose_autoencoder_was_moved_is_loaded_with_its_new_place(
    encoded: str, tmp_path: Path
) -> None:
    place = Path(encoded).parent / "autoencoder"
    sha256 = open_dataset(encoded).manifest.autoencoder_sha256
    run = committed(encoded, tmp_path, autoencoder={"url": "gone", "sha256": sha256})
    with pytest.raises(CheckpointError, match=r"does not load: .*; name .* as in autoencoder=runs"):
        ddpm_ray.load(run, "cpu")
    assert ddpm_ray.load(run, "cpu", autoencoder=str(place)).sample(1).shape == (1, 8, 8, 1)
    kinds: list[Any] = [SampleConfig, EditConfig, EvaluateConfig, ExportConfig, AverageConfig]
    for kind in kinds:
        given = load_config(kind, None, [f"autoencoder={place.name}"])
        job: Any = load_model.as_trained(given, run, (), place.parent)
        assert job.autoencoder == str(place)


@pytest.mark.parametrize("kind", ["run", "diffusers"])
def test_a_copy_of_a_checkpoint_with_its_autoencoder_loads_without_the_first_one(
    kind: str, tmp_path: Path
) -> None:
    url = encode_noise(tmp_path, images=12)
    place = tmp_path / "autoencoder"
    if kind == "run":
        shutil.rmtree(tmp_path / "latents")
        url = encoded_by_run(tmp_path)
        place = tmp_path / "ae"
    run = committed(url, tmp_path / "run")
    wanted = ddpm_ray.load(run, "cpu").sample(2)
    (checkpoint,) = Path(run).glob("checkpoints/step-*")
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    latents.copy_autoencoder(read_checkpoint(str(copy), groups=()).facts, copy)
    place.rename(tmp_path / "gone")
    np.testing.assert_array_equal(ddpm_ray.load(copy, "cpu").sample(2), wanted)
    with pytest.raises(CheckpointError, match="does not load"):
        ddpm_ray.load(run, "cpu")
    other = other_autoencoder(tmp_path / "other")
    with pytest.raises(CheckpointError, match="encoded by the autoencoder of sha256"):
        ddpm_ray.load(copy, "cpu", autoencoder=other)
    weights = next(copy.glob("autoencoder/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="sha256"):
        ddpm_ray.load(copy, "cpu")


def encoded_by_run(folder: Path) -> str:
    """Encode the images in pixels/ by the run of an autoencoder in ae/; the URL of the latents."""
    keys = ["name=ae", "task=autoencoder", f"data.url={folder / 'pixels'}"]
    keys += [
        "autoencoder.base_channels=4",
        "autoencoder.groups=2",
        "autoencoder.channel_mults=[1,1]",
    ]
    config = load_config(RunConfig, None, [*keys, "autoencoder.latent_channels=2"])
    encoder = LatentEncoder(trained_autoencoder(commit(initial_run(config), folder / "ae")))
    source = open_dataset(str(folder / "pixels"))
    plan = encoded_packer.make_encoding_plan(
        source, str(folder / "latents"), encoder, EncodeConfig()
    )
    parts = [encoded_packer.encode_shard(plan, n, encoder) for n in range(plan.shards)]
    return encoded_packer.finish_encoded(plan, parts).url


def test_an_autoencoder_for_a_model_without_one_is_refused(encoded: str, tmp_path: Path) -> None:
    run = committed(encoded, tmp_path, codec="pixels", image_shape=[8, 8, 3])
    with pytest.raises(ConfigError, match=r"autoencoder is 'ae', but .* holds a model of pixels"):
        ddpm_ray.load(run, "cpu", autoencoder="ae")


def test_a_guidance_model_of_other_latents_is_refused(
    encoded: str, model: TrainedModel, tmp_path: Path
) -> None:
    """One of the same latents guides even where its own autoencoder is gone."""
    sha256 = open_dataset(encoded).manifest.autoencoder_sha256
    same, other = (
        committed(encoded, tmp_path / one[0], autoencoder={"url": "gone", "sha256": one})
        for one in (sha256, "-" * 64)
    )
    guidance = GuidanceConfig(autoguidance_model=same)
    assert load_model.configured(model, model.settings, guidance).sample(1).shape == (1, 8, 8, 1)
    with pytest.raises(ConfigError, match=r"guidance.autoguidance_model is .*sha256 ------------"):
        load_model.configured(model, model.settings, GuidanceConfig(autoguidance_model=other))


def test_latents_without_a_known_autoencoder_are_refused(tmp_path: Path) -> None:
    url = encode_noise(tmp_path, images=12)
    config = configured(url)
    (tmp_path / "autoencoder").rename(tmp_path / "moved")
    with pytest.raises(DatasetError, match=r"autoencoder of these latents does not load.*; name"):
        latents.codec_of_data(config.data, open_dataset(url))
    (tmp_path / "latents" / "encoding.json").unlink()
    with pytest.raises(DatasetError, match=r"is unknown, as there is no encoding.json; name its"):
        latents.codec_of_data(config.data, open_dataset(url))
    moved = configured(url, f"data.autoencoder={tmp_path / 'moved'}")
    assert latents.codec_of_data(moved.data, open_dataset(url)).name == "latents"


def test_an_autoencoder_of_pixels_is_refused(tmp_path: Path) -> None:
    encode_noise(tmp_path, images=12)
    url = str(tmp_path / "pixels")
    config = configured(url, f"data.autoencoder={tmp_path / 'autoencoder'}")
    with pytest.raises(ConfigError, match=r"data.autoencoder is .*, but data.url holds pixels"):
        latents.codec_of_data(config.data, open_dataset(url))


def test_low_resolution_of_latents_is_refused(encoded: str) -> None:
    config = configured(encoded, "objective.low_resolution_pixels=4")
    with pytest.raises(
        ConfigError, match="latents, and the small image is made of pixels: set it to 0, or"
    ):
        check_model(config, open_dataset(encoded))


@pytest.mark.parametrize("height, width", [(8, 8), (11, 9), (12, 16)])
def test_known_pixels_come_back_to_the_bit(
    height: int, width: int, model: TrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(height)
    images = rng.integers(0, 256, (2, height, width, 1), np.uint8)
    keep = rng.random((2, height, width)) < 0.7
    with caplog.at_level(logging.INFO, "ddpm_ray"):
        painted = model.inpaint(images, keep, resamples=1, jump_length=1)
    assert painted.shape == images.shape
    assert (painted[keep] == images[keep]).all()
    assert (painted[~keep] != images[~keep]).any()
    assert ("are padded to" in caplog.text) == bool(height % 2 or width % 2)


def test_all_edits_take_and_return_pixels(model: TrainedModel) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 1), np.uint8)
    assert model.outpaint(images, right=3, method="replacement").shape == (2, 8, 12, 1)
    assert (model.outpaint(images, top=2, method="replacement")[:, 2:] == images).all()
    assert model.image_to_image(images, 0.5).shape == images.shape
    assert model.interpolate(0, 1, 3).shape == (3, 8, 8, 1)


def test_an_edit_of_no_steps_to_speak_of_is_the_autoencoder_s_own_loss(model: TrainedModel) -> None:
    """DDIM inversion there and back is exact for a network whose last layer is still 0."""
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    codec = model.denoiser.codec
    x_0 = codec.encode_images(torch.from_numpy(images))
    np.testing.assert_array_equal(model.reconstruct(images), codec.decode(x_0))


def test_validation_images_have_variance_1(encoded: str) -> None:
    codec = LatentCodec.of(open_dataset(encoded).manifest)
    assert codec.variance([1.0]) == codec.mean_square([1.0], [1.0]) == 1
    assert PIXELS.variance([127.5]) == 1


def test_a_worker_without_images_reads_none(encoded: str) -> None:
    dataset, config = open_dataset(encoded), configured(encoded)
    images, labels = training_run.fixed_images(config.data, dataset, range(0), 4).tensors
    assert images.shape == (0, *dataset.manifest.sample_shape)
    assert len(labels) == 0
    manifest = replace(dataset.manifest, captioned=True)
    captioned = replace(dataset, manifest=manifest)
    assert training_run.fixed_images(config.data, captioned, range(0), 4).captions == []
    assert Workers().is_main
