"""The codec of embeddings: standardised exactly, undone exactly, and no images."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_ray.assembly.latents import codec_facts, codec_of_data
from ddpm_ray.assembly.run_config import saved_codec
from ddpm_ray.config.data import DataConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.data import encoding_record
from ddpm_ray.data.codec import diffused_shape
from ddpm_ray.data.dataset_codec import codec_of
from ddpm_ray.data.embedding_codec import EmbeddingCodec
from ddpm_ray.data.encoding_record import EncodingRecord
from ddpm_ray.data.image_shape import ImageShape
from tests.data.embedding_sets import random_embeddings, write_embeddings
from tests.data.latent_sets import random_latents, write_latents

CODEC = EmbeddingCodec(2, (0.5, 0.25), (0.25, 0.0))  # the second dimension is constant


@settings(max_examples=15)
@given(samples=st.integers(2, 30), seed=st.integers(0, 2**32 - 1))
def test_the_whole_set_has_mean_0_and_variance_1_in_each_dimension(
    tmp_path_factory: pytest.TempPathFactory, samples: int, seed: int
) -> None:
    embeddings = random_embeddings(samples, seed=seed)
    embeddings[:, 3] = 0.3
    dataset = write_embeddings(tmp_path_factory.mktemp("set"), embeddings, 7)
    codec, stored = EmbeddingCodec.of(dataset.manifest), torch.from_numpy(embeddings)
    x_0 = codec.encode(stored)
    assert (x_0.dtype, x_0.shape) == (torch.float32, (samples, 5, 1, 1))
    assert torch.equal(x_0, codec.draw(stored, None, 0, 0, torch.arange(samples)))
    varies = [0, 1, 2, 4]
    flat = x_0.flatten(1).double()
    assert flat[:, varies].mean(0).tolist() == pytest.approx([0] * 4, abs=2e-6)
    assert flat[:, varies].square().mean(0).tolist() == pytest.approx([1] * 4, rel=2e-6)
    assert (flat[:, 3] == 0).all()
    assert torch.equal(codec.embeddings(x_0).half(), stored)  # float16 is coarser than its error


def test_a_dimension_that_hardly_varies_keeps_its_mean(tmp_path: Path) -> None:
    """One of 1000 values differs by a unit in the last place; float32 would round the mean."""
    embeddings = np.full((1000, 1), 0.5, np.float16)
    embeddings[0] = np.nextafter(np.float16(0.5), np.float16(1))
    codec = EmbeddingCodec.of(write_embeddings(tmp_path, embeddings, 1000).manifest)
    x_0 = codec.encode(torch.from_numpy(embeddings)).double()
    assert float(x_0.mean()) == pytest.approx(0, abs=1e-6)
    assert float(x_0[1]) == pytest.approx(-1 / 999**0.5, rel=1e-6)  # of a Bernoulli variable


def test_values_are_those_of_the_closed_form() -> None:
    x_0 = CODEC.encode(torch.tensor([[1.0, 0.25]], dtype=torch.float16))
    assert x_0.flatten().tolist() == [2, 0]
    assert CODEC.embeddings(torch.tensor([-2.0, 9.0]).view(1, 2, 1, 1)).tolist() == [[0, 0.25]]
    assert diffused_shape(CODEC, ImageShape(64, 32, 3)) == (1, 1, 2)
    assert (CODEC.variance([9.0]), CODEC.mean_square([9.0], [9.0]), CODEC.factor) == (1, 1, 1)
    CODEC.clip()  # None, without an error


def test_what_embeddings_cannot_do_is_refused() -> None:
    stored, images = torch.zeros(1, 2), torch.zeros(1, 8, 8, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"data.flip is true, but embeddings .*: set it to false"):
        CODEC.encode(stored, torch.zeros(1, dtype=torch.bool))
    for refuses in (CODEC.decode, CODEC.show_noisy):
        with pytest.raises(ValueError, match="embeddings are no images"):
            refuses(stored)
    with pytest.raises(ValueError, match=r"encodes no images: embed them with ddpm_ray.load_encod"):
        CODEC.encode_images(images)
    with pytest.raises(ValueError, match=r"dynamic_quantile is 0.9, but embeddings have no range"):
        CODEC.clip(0.9)


def test_a_checkpoint_rebuilds_the_codec(tmp_path: Path) -> None:
    dataset = write_embeddings(tmp_path, random_embeddings(6), 4)
    assert codec_of_data(DataConfig(), dataset) == codec_of(dataset.manifest)  # of unknown URL
    record = EncodingRecord("runs/encoders", "b" * 64, "data/images", {"batch_size": 2})
    encoding_record.write_encoding(dataset.url, "embeddings", record)
    assert encoding_record.read_encoding(dataset) == record
    codec = codec_of_data(DataConfig(), dataset)
    assert isinstance(codec, EmbeddingCodec)
    assert codec == dataclasses.replace(
        EmbeddingCodec.of(dataset.manifest), encoder_url="runs/encoders"
    )
    facts = codec_facts(codec)
    assert facts["image_encoder"] == {"url": "runs/encoders", "sha256": "b" * 64}
    assert facts["embeddings"].keys() == {"width", "mean", "std"}
    assert saved_codec(facts) == codec


def test_options_of_other_sets_are_refused(tmp_path: Path) -> None:
    dataset = write_embeddings(tmp_path / "embeddings", random_embeddings(6), 4)
    with pytest.raises(ConfigError, match=r"data.flip is true, but embeddings"):
        codec_of_data(DataConfig(flip=True), dataset)
    with pytest.raises(
        ConfigError, match=r"data.autoencoder is 'runs/ae', but .* embeddings: leav"
    ):
        codec_of_data(DataConfig(autoencoder="runs/ae"), dataset)
    latents = write_latents(tmp_path / "latents", random_latents(4), 4)
    with pytest.raises(ValueError, match="the data set holds latents, not embeddings"):
        EmbeddingCodec.of(latents.manifest)
