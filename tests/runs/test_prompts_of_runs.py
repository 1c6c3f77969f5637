"""The prompts of a run: those that its data lacks are marked, those that are cut are logged."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly import training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.runs.run_tokenizer import run_tokenizer, text_settings
from ddpm_ray.runs.training_outputs import training_outputs
from ddpm_ray.sampling.image_grid import grid_of_samples
from ddpm_ray.storage.errors import StorageError
from tests.data.captioned_sets import SHAPE, write_captioned
from tests.test_sampled_as_configured import TEXT, TINY
from tests.training.test_sample_grids import Wall

CAPTIONS = [["a cat", "a dog"], [], ["a bird"]]
CPU = torch.device("cpu")


def configured(*keys: str) -> RunConfig:
    return load_config(RunConfig, None, [*TINY, *TEXT, "model.num_classes=0", *keys])


def test_the_grid_of_a_run_marks_prompts_that_its_data_lacks(tmp_path: Path) -> None:
    """The driver finds them: the workers have no shards to read here.

    An untrained network draws the same images for all prompts, so the texts alone differ.
    """
    config = configured("sampling.prompts=[a dog,a fish]", "sampling.steps=1")
    dataset = write_captioned(tmp_path / "set", CAPTIONS, 2)
    facts: dict[str, Any] = {"config": to_dict(config), "image_shape": list(SHAPE)}
    settings = text_settings(config, dataset, Tokenizer.trained(["a cat"], 300, 6))
    for shard in (tmp_path / "set").glob("*shard*"):
        shard.unlink()
    facts |= settings["tokenizer"]
    state = training_run.training_state(config, SHAPE, CPU, facts)
    wall = Wall()
    settings["folder"] = str(tmp_path / "run")
    alone = Workers(0, 1, CPU)
    outputs = training_outputs(config, settings, dataset, PIXELS, state, alone, wall)
    with torch.inference_mode():
        outputs.draw_grid(0)
    drawn = np.asarray(wall.pictures["samples", 0])
    images = np.zeros((64, *SHAPE), np.uint8)
    marked, plain = (
        np.asarray(grid_of_samples(images, ["a dog", "a fish"], held))
        for held in ({"a fish"}, set[str]())
    )
    assert drawn.shape[1] == marked.shape[1] > plain.shape[1]
    left_columns = slice(0, 60)  # with the texts
    assert np.array_equal(drawn[-len(marked) :, left_columns], marked[:, left_columns])


def test_a_run_without_grids_does_not_read_the_captions(tmp_path: Path) -> None:
    """Nor does one without prompts; the shards are not there."""
    dataset = write_captioned(tmp_path / "set", CAPTIONS, 2)
    tokenizer = Tokenizer.trained(["a cat"], 300, 6)
    asking = configured("sampling.prompts=[a fish]")
    assert text_settings(asking, dataset, tokenizer)["held_out_prompts"] == ["a fish"]
    for shard in (tmp_path / "set").glob("*shard*"):
        shard.unlink()
    for keys in (("sampling.prompts=[a fish]", "training.grid_every_steps=0"), ()):
        assert text_settings(configured(*keys), dataset, tokenizer)["held_out_prompts"] == []
    with pytest.raises(StorageError, match="shard"):
        text_settings(asking, dataset, tokenizer)


def test_prompts_that_a_run_cuts_are_logged_at_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With their number, at the first start and at the next."""
    dataset = write_captioned(tmp_path / "set", CAPTIONS, 2)
    for start, prompt in enumerate(("a cat and a dog and a bird", "a dog and a cat and a bird")):
        config = configured(f"sampling.prompts=[a cat,{prompt}]")
        caplog.clear()
        run_tokenizer(config, dataset, str(tmp_path / "run"))
        (line,) = (one.message for one in caplog.records if one.levelno == logging.WARNING)
        assert line.startswith("1 of 2 prompts have more than text.length=6 tokens"), start
