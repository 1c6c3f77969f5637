"""Runs with a text encoder of transformers: killed and continued, loaded, copied, refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [text]")
pytest.importorskip("transformers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly import frozen_text
from ddpm_ray.assembly.portable_models import copy_model
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.runs.run_text_model import run_text_model, run_texts
from ddpm_ray.training.checkpoint_folder import CheckpointError, read_checkpoint
from ddpm_ray.training.loop import train_loop
from tests.config.test_task_options import complaints
from tests.data.captioned_sets import write_captioned
from tests.fixtures.same_bits import assert_same_bits
from tests.models.test_open_clip_text import write as write_open_clip
from tests.models.transformers_folders import L, write_folder
from tests.training.test_loop import (
    Killed,
    _closed_streams,  # noqa: F401  # a fixture that each test of this file uses
    begin,
    bits,
    configured,
    dies_before_update,
    finished,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports
ENCODER = ("text.encoder=transformers", f"text.length={L}", "objective.label_dropout=0.4")


def test_a_killed_run_ends_like_an_unbroken_one_and_holds_no_tensor_of_the_encoder(
    tmp_path: Path,
) -> None:
    """Its model draws by prompts, and its copy for MLflow without the folder of the encoder."""
    data, folder = tmp_path / "data", write_folder(tmp_path / "encoder", "T5EncoderModel")
    write_captioned(data, [[f"a {'cat' if n % 2 else 'dog'}"] for n in range(20)], 10)
    config = configured(str(data), *ENCODER, f"text.model={folder}", "training.steps=4")
    wanted, _ = finished(config, tmp_path / "whole/checkpoints")
    run = begin(config, tmp_path / "died/checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        dies_before_update(run, 4, patch)
        with pytest.raises(Killed, match="step 4"):
            train_loop(run)
    run.checkpoints.wait()
    torch.manual_seed(99)
    again = begin(config, tmp_path / "died/checkpoints")
    assert again.state.step == 3
    assert train_loop(again)
    assert_same_bits(bits(again), wanted)
    for group in wanted.tensors.values():
        assert not [name for name in group if name.startswith("text.encoder")]
    assert wanted.tensors["ema"]["text.pooled.weight"].shape[1] == 12
    drawn = ddpm_ray.load(tmp_path / "whole", "cpu").sample(2, prompts=["a cat"], steps=2)
    (checkpoint,) = (tmp_path / "whole/checkpoints").glob("step-00000004*")
    copy = tmp_path / "copy"
    assert not copy_model(str(checkpoint), copy)
    folder.rename(tmp_path / "moved")
    found = ddpm_ray.load(copy, "cpu").sample(2, prompts=["a cat"], steps=2)
    np.testing.assert_array_equal(found, drawn)
    with pytest.raises(CheckpointError, match=r"there is no such folder .*; name the one that it"):
        ddpm_ray.load(tmp_path / "whole", "cpu")
    moved = ddpm_ray.load(tmp_path / "whole", "cpu", text_model=str(tmp_path / "moved"))
    np.testing.assert_array_equal(moved.sample(2, prompts=["a cat"], steps=2), drawn)
    facts = read_checkpoint(str(checkpoint), groups=()).facts
    file = tmp_path / "moved/config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match="trained with the text encoder of sha256"):
        frozen_text._checked(facts, str(tmp_path / "moved"))


def test_a_run_on_a_folder_of_open_clip_starts_again_with_its_padding(tmp_path: Path) -> None:
    """The run's tokenizer.json does not say that token 0 fills rows."""
    encoder, run = tmp_path / "encoder", str(tmp_path / "run")
    encoder.mkdir()
    write_open_clip(encoder, "gelu")
    data = write_captioned(tmp_path / "data", [["a cat"], ["a dog"]] * 4, 4)
    config = configured(str(tmp_path / "data"), *ENCODER, f"text.model={encoder}")
    first, again = (run_texts(config, data, run) for _ in range(2))
    assert first.tokenizer is not None
    assert again.tokenizer is not None
    assert (again.tokenizer.pad, again.tokenizer.sha256) == (0, first.tokenizer.sha256)
    assert again.settings == first.settings
    (row,) = again.tokenizer.encode(["a"]).tolist()
    assert row[-1] == 0
    (tmp_path / "other").mkdir()
    write_folder(tmp_path / "other", "CLIPTextModel")
    config = configured(str(tmp_path / "data"), *ENCODER, f"text.model={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match=r"whose tokenizer is of sha256 .*, but the run began"):
        run_texts(config, data, run)


def test_a_name_of_a_hub_is_refused_in_one_line(tmp_path: Path) -> None:
    config = configured("data", *ENCODER, "text.model=openai/clip-vit-large-patch14")
    with pytest.raises(ConfigError, match=r"^text.model: openai/clip.*names of a hub are not look"):
        run_text_model(config, str(tmp_path))
    assert complaints(*ENCODER, "text.model=e", "text.width=8", "text.vocabulary=300") == [
        "text.vocabulary is 300, which the model of text.model defines; leave it out",
        "text.width is 8, which the model of text.model defines; leave it out",
    ]
