"""The job encode, from a contrastive run to a set of embeddings. On Ray: test_encode.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.cli.job import DONE, FAILED, WRONG_CONFIG
from ddpm_ray.cli.main import main
from ddpm_ray.config.jobs.tokenize_captions import TokenizeConfig
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.data.encoding_record import read_encoding
from ddpm_ray.data.loader import read_captions, read_images
from ddpm_ray.jobs.encode import JOB
from ddpm_ray.runs import encode as encoding
from ddpm_ray.runs.run_tokenizer import write_tokenizer
from tests.data.captioned_sets import write_captioned
from tests.data.latent_sets import commit
from tests.fixtures.job_script import result_of
from tests.noise import pack_noise
from tests.runs.test_contrastive_scores import CAPTIONS, begun, config_on
from tests.runs.test_encode import files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven captioned images in one shard, encoded without Ray."""
    return write_captioned(tmp_path_factory.mktemp("captioned"), CAPTIONS, 7, noise=True)


@pytest.fixture
def model(source: Dataset, tmp_path: Path) -> str:
    """A contrastive run that has not trained."""
    return write_run(source, tmp_path / "run", seed=0)


def write_run(source: Dataset, folder: Path, seed: int) -> str:
    return commit(begun(config_on(source, f"seed={seed}"), source), folder)


def test_embeddings_are_those_of_the_trained_encoders(
    model: str, source: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, source.url, str(tmp_path / "set"), "batch_size=3"]
    (first, _), (again, err) = (result_of(JOB, words, capsys) for _ in range(2))
    assert not ray.is_initialized()
    assert (first["samples"], first["encoded"], again["encoded"]) == (7, 7, 0)
    encoders, dataset = trained_encoders(model), open_dataset(first["destination"])
    (stored,), (images,) = read_images(dataset, [0]), read_images(source, [0])
    with encoding.reproducible("cpu"):
        expected = encoders.image_embeddings(images.images, batch_size=3)
    assert stored.images.shape == (7, 6)
    assert torch.equal(stored.images, expected.half())
    assert torch.equal(stored.labels, images.labels)
    found = stored.images.double().numpy()
    assert dataset.manifest.embedding_mean == pytest.approx(found.mean(0), rel=1e-12)
    assert dataset.manifest.embedding_std == pytest.approx(found.std(0), rel=1e-10)
    length = np.sqrt(np.square(found).sum(1).mean())
    assert (first["codec"], first["embedding_width"]) == ("embeddings", 6)
    assert first["embedding_length"] == pytest.approx(length, rel=1e-9)
    assert first["mean_embedding_length"] == pytest.approx(np.linalg.norm(found.mean(0)), rel=1e-9)
    assert first["constant_dimensions"] == 0
    assert first["encoder"] == encoders.url
    assert first["encoder_sha256"] == dataset.manifest.encoder_sha256 == encoders.sha256
    record = read_encoding(dataset)
    assert record is not None
    assert (record.network, record.options) == (encoders.url, {"batch_size": 3})
    assert "embeddings: root mean square length 1; length of their mean" in err
    assert "encoded: 7 samples, images 4x4x1, embeddings of width 6" in err
    assert list(read_captions(dataset, [0])) == list(map(tuple, CAPTIONS))
    tokens = [
        write_tokenizer(url, TokenizeConfig(vocabulary=280), str(tmp_path / f"{n}.json"))["sha256"]
        for n, url in enumerate((source.url, dataset.url))
    ]
    assert tokens[0] == tokens[1]


def test_what_is_not_encoded_is_named_in_one_line(
    model: str, source: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "set")
    assert main(JOB, [model, source.url, place]) == DONE
    before, _ = files(tmp_path / "set"), capsys.readouterr()
    other, again = write_run(source, tmp_path / "other", seed=1), str(tmp_path / "again")
    pack_noise(str(tmp_path / "odd"), 3, 5)
    for words, code, says in (
        ([other, source.url, place], FAILED, "encoded by the encoder of sha256 "),
        ([model, source.url, place, "batch_size=2"], FAILED, "encoded with {'batch_size': 32}, n"),
        ([model, source.url, again, "flipped=true"], WRONG_CONFIG, "flipped is true, but "),
        ([model, place, again], FAILED, "the data set holds embeddings, not images; name the ima"),
        ([model, str(tmp_path / "odd"), again], FAILED, "images are 5 x 5, which 2 levels do not"),
    ):
        assert main(JOB, words) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert files(tmp_path / "set") == before
    assert not Path(again).exists()


def test_embeddings_that_are_all_equal_are_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Group norm makes all grey images the same, for an encoder that has not trained."""
    grey = write_captioned(tmp_path / "grey", CAPTIONS, 7)
    assert main(JOB, [model, grey.url, str(tmp_path / "set")]) == DONE
    printed = capsys.readouterr()
    assert "embeddings: 6 dimensions equal in all images" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["constant_dimensions"] == 6
