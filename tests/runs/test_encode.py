"""The job encode, from a diffusers folder to a set of latents; on Ray the same bytes."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.assembly.set_encoder_loading import set_encoder
from ddpm_ray.cli.job import DONE, FAILED
from ddpm_ray.cli.main import main
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.data.encoding_record import COST
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.loader import read_images
from ddpm_ray.data.packing import encoded_packer, packer
from ddpm_ray.jobs.encode import JOB
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.runs import encode as encoding
from ddpm_ray.storage import object_store
from tests.data.latent_sets import commit
from tests.fixtures.job_script import result_of

SPEC = AutoencoderSpec(1, 2, 4, (1, 1), 1, 2, middle_attention=False)


@pytest.fixture
def autoencoder(tmp_path: Path) -> str:
    """A random autoencoder of factor 2, saved by diffusers' layout."""
    torch.manual_seed(0)
    folder = tmp_path / "autoencoder"
    tensors = Autoencoder(SPEC).state_dict()
    autoencoder_kl.write_folder(folder, SPEC, tensors, (8, 8), object_store.write_bytes)
    return str(folder)


def digits(folder: Path, shards: int = 1) -> Dataset:
    """The digits, 8 x 8, in this many shards."""
    plan = packer.make_plan("digits", str(folder), PackConfig())
    samples = -(-1797 // shards)
    plan = packer.PackPlan(plan.source, str(folder), plan.options, plan.recipe, shards, samples)
    return packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in range(shards)])


def files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.iterdir() if path.is_file() and path.name != COST)
    return {path.name: path.read_bytes() for path in files}


def test_one_shard_is_encoded_here_and_then_found(
    autoencoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, threads = digits(tmp_path / "digits"), torch.get_num_threads()
    words = [autoencoder, source.url, str(tmp_path / "set"), "batch_size=256", "flipped=true"]
    (first, _), (again, err) = (result_of(JOB, words, capsys) for _ in range(2))
    assert not ray.is_initialized()
    assert torch.get_num_threads() == threads
    assert (first["samples"], first["encoded"], again["encoded"]) == (1797, 1797, 0)
    assert first["images_per_second"] > 0
    changing = ("encoded", "seconds", "images_per_second")
    assert {k: first[k] for k in first if k not in changing} == {
        k: again[k] for k in again if k not in changing
    }
    assert (first["latent_shape"], first["views"]) == ([2, 4, 4], ["plain", "flipped"])
    assert 0 <= first["preview_r_squared"] <= 1
    assert "encoded: 1797 samples, plain and flipped, images 8x8x1, latents 2x4x4" in err
    dataset = open_dataset(first["destination"])
    codec = LatentCodec.of(dataset.manifest).bound(trained_autoencoder(autoencoder))
    (stored,), (images,) = read_images(dataset, [0]), read_images(source, [0])
    model = trained_autoencoder(autoencoder).model
    with torch.no_grad():
        expected = PIXELS.decode(model.decode(model.encode(PIXELS.encode(images.images)).mean))
    decoded = codec.decode(codec.encode(stored.images)).astype(int)
    assert np.abs(decoded - expected).max() <= 1  # float16 and rounding


def test_another_autoencoder_is_refused_in_one_line(
    autoencoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = digits(tmp_path / "digits")
    words = [autoencoder, source.url, str(tmp_path / "set"), "batch_size=256"]
    assert main(JOB, words) == DONE
    tensors = Autoencoder(SPEC).state_dict()
    autoencoder_kl.write_folder(autoencoder, SPEC, tensors, (8, 8), object_store.write_bytes)
    before, _ = files(tmp_path / "set"), capsys.readouterr()
    assert main(JOB, words) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "a different data set is already here (encoded by the autoencoder of sha256 " in line
    assert files(tmp_path / "set") == before


def test_an_actor_refuses_weights_that_changed(autoencoder: str) -> None:
    actor = encoding.EncoderActor(autoencoder, "0" * 64, "cpu")
    with pytest.raises(Exception, match="its weights changed while images were being encoded"):
        actor.ready()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


def contrastive_run(folder: Path, source: Dataset) -> str:
    """A contrastive run on the images of `source` that has not trained."""
    pytest.importorskip("tokenizers", reason="needs the extra [text]")
    from tests.runs.test_contrastive_scores import begun, config_on

    return commit(begun(config_on(source), source), folder)


@pytest.mark.ray
@pytest.mark.parametrize("codec", ["latents", "embeddings"])
def test_actors_write_what_one_process_writes(
    codec: str, cluster: None, autoencoder: str, tmp_path: Path
) -> None:
    source = digits(tmp_path / "digits", shards=5)
    config = EncodeConfig(batch_size=100)
    model = autoencoder if codec == "latents" else contrastive_run(tmp_path / "run", source)
    loaded = set_encoder(model)
    plan = encoded_packer.make_encoding_plan(source, str(tmp_path / "here"), loaded, config)
    with encoding.reproducible("cpu"):
        encoded = [encoded_packer.encode_shard(plan, n, loaded) for n in range(plan.shards)]
    encoded_packer.finish_encoded(plan, encoded)
    partly = encoded_packer.make_encoding_plan(source, str(tmp_path / "ray"), loaded, config)
    with encoding.reproducible("cpu"):
        encoded_packer.encode_shard(partly, 3, loaded)  # by a job that was then killed
    said: list[tuple[int, int, str]] = []
    result = encoding.encode_dataset(
        model, source.url, str(tmp_path / "ray"), config, lambda *now: said.append(now)
    )
    assert len(said) == 5  # the start and 4 shards
    assert (said[0][0], said[-1][0]) == (360, 1797)
    assert said[-1][2].endswith(" images/s")
    assert (result.encoded, result.dataset.manifest.codec) == (1797 - 360, codec)
    assert files(tmp_path / "ray") == files(tmp_path / "here")
