"""The tokenizer of a run: from its captions or a file, the same at each start."""

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.cli.main import main
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.jobs import tokenize_captions
from ddpm_ray.runs.run_tokenizer import run_tokenizer
from tests.data.captioned_sets import write_captioned
from tests.data.test_encoded_packing import pixels
from tests.fixtures.job_script import refused

CAPTIONS = [["a red apple", "fruit"], [], ["a green pear on a very long wooden table"], ["a pear"]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A set of four samples with four captions, in two shards."""
    return write_captioned(tmp_path_factory.mktemp("captioned"), CAPTIONS, 3)


def configured(*keys: str) -> RunConfig:
    """A run with text."""
    options = ["name=t", "data.url=captioned", "text.encoder=transformer", "text.length=8", *keys]
    return load_config(RunConfig, None, options)


def test_the_first_start_trains_it_and_the_next_ones_read_it(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is trained on the captions of all shards, and longer captions are logged once."""
    caplog.set_level(logging.INFO)
    made = run_tokenizer(configured(), dataset, str(tmp_path))
    assert made is not None
    expected = Tokenizer.trained([text for texts in CAPTIONS for text in texts], 4096, 8)
    assert made.sha256 == expected.sha256
    logged = [record.message for record in caplog.records if "text.length=8" in record.message]
    (line,) = logged
    assert line.startswith("1 of the first 4 captions have more than text.length=8 tokens")
    again = run_tokenizer(configured("text.vocabulary=300"), dataset, str(tmp_path))
    assert again is not None
    assert again.sha256 == made.sha256
    assert len([one for one in caplog.records if "text.length=8" in one.message]) == 1


def test_a_given_tokenizer_is_kept_and_another_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    """The run keeps a copy, so that the file may go; another one is another run."""
    for name, texts in (("mine", ["red green"]), ("other", ["blue"])):
        made = Tokenizer.trained(texts * 3, 300, 8)
        (tmp_path / f"{name}.json").write_text(made.json)
    keys = [f"text.tokenizer={tmp_path}/{name}.json" for name in ("mine", "other")]
    folder = str(tmp_path / "run")
    first = run_tokenizer(configured(keys[0]), dataset, folder)
    assert first is not None
    (tmp_path / "mine.json").unlink()
    again = run_tokenizer(configured(), dataset, folder)
    assert again is not None
    assert again.sha256 == first.sha256
    with pytest.raises(ConfigError, match=r"other\.json of sha256 .* but the run began with"):
        run_tokenizer(configured(keys[1]), dataset, folder)


def test_images_without_captions_are_refused(tmp_path: Path) -> None:
    """The error says how to pack captions."""
    plain = pixels(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"have no captions: pack them with captions"):
        run_tokenizer(configured(), plain, str(tmp_path))


def test_a_run_without_text_has_none(dataset: Dataset, tmp_path: Path) -> None:
    """And writes none, also on images with captions."""
    config = load_config(RunConfig, None, ["name=t", "data.url=captioned"])
    assert run_tokenizer(config, dataset, str(tmp_path)) is None
    assert not list(tmp_path.iterdir())


def test_the_job_writes_the_bytes_that_a_run_would_train(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run takes its file; the captions that text.length would cut are counted."""
    out = tmp_path / "made" / "tokenizer.json"
    words = [dataset.url, "--out", str(out), "vocabulary=262", "length=8"]
    assert main(tokenize_captions.JOB, words) == 0
    found = json.loads(capsys.readouterr().out)
    made = run_tokenizer(configured("text.vocabulary=262"), dataset, str(tmp_path / "a"))
    assert made is not None
    assert out.read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
    assert found == {
        "tokenizer": str(out),
        "tokens": made.vocabulary,
        "sha256": made.sha256,
        "data_fingerprint": dataset.fingerprint,
        "captions": 4,
        "captions_looked_at": 4,
        "captions_cut": len(made.too_long([text for texts in CAPTIONS for text in texts])),
    }
    assert found["captions_cut"] >= 1
    taken = run_tokenizer(configured(f"text.tokenizer={out}"), dataset, str(tmp_path / "b"))
    assert taken is not None
    assert taken.sha256 == made.sha256


def test_the_job_refuses_images_without_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written."""
    plain = pixels(tmp_path / "plain")
    out = tmp_path / "t.json"
    line = refused(capsys, tokenize_captions.JOB, 2, plain.url, "--out", out)
    assert "whose images have no captions: pack them with captions (docs/packing.md)" in line
    assert not out.exists()
