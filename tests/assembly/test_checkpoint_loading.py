"""Models go to diffusers and come back as they were; a classifier is not taken for a model."""

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ddpm_ray
from benchmarks.gpu.tiny import config_of
from benchmarks.gpu.tiny_keys import AUTOENCODER
from ddpm_ray.assembly import (
    checkpoint_loading,
    classifier_loading,
    diffusers_export,
    diffusion,
    networks,
    run_config,
    training_run,
)
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.assembly.newest_checkpoint import usable_device
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.codec import PIXELS, PixelCodec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.interop import diffusers_folders
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.runs.evaluation.evaluate_autoencoder import (
    autoencoder_run,
    require_reconstruction_scores,
)
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.storage.file_formats import NewerFormatError
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CheckpointStore
from tests.golden import old_runs

CPU = torch.device("cpu")

TINY_UNET = (
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[4]",
)
TINY_DIT = ("model.depth=2", "model.hidden_size=8", "model.heads=2")


def configured(*overrides: str) -> RunConfig:
    keys = (
        "name=a",
        "data.url=b",
        "schedule.num_steps=30",
        "sampling.steps=5",
    )
    network = TINY_DIT if "model.network=dit" in overrides else TINY_UNET
    return load_config(RunConfig, None, [*keys, *network, *overrides])


def trained(config: RunConfig) -> TrainedModel:
    """As loaded from a checkpoint, with weights that are not zero."""
    torch.manual_seed(3)
    network = networks.network(config, ImageShape(8, 8, 3))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    denoiser = diffusion.denoiser(config, network.eval().requires_grad_(False), CPU, PIXELS)
    provenance = {"config": to_dict(config), "checkpoint": "", "step": 0, "weights_sha256": ""}
    return TrainedModel(denoiser, ImageShape(8, 8, 3), provenance)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.num_classes=3", "schedule.kind=cosine"),
        ("objective.prediction=v", "schedule.kind=sigmoid"),
        ("objective.prediction=x_0", "schedule.zero_terminal_snr=true"),
        ("objective.variance=learned_range", "objective.loss=hybrid"),
        ("objective.weighting=uncertainty", "schedule.kind=linear", "schedule.rescale=false"),
        ("model.head_channels=2", "model.num_classes=3"),
    ],
    ids=str,
)
def test_a_model_comes_back_from_diffusers_format_drawing_the_same(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    model = trained(configured(*overrides))
    diffusers_export.write_diffusers(model, SamplingSettings(), tmp_path / "given")
    back = checkpoint_loading.trained_model(str(tmp_path / "given"))
    assert back.image_shape == model.image_shape
    torch.testing.assert_close(back.denoiser.schedule.alpha_bar, model.denoiser.schedule.alpha_bar)
    assert (back.sample(4, steps=5, seed=2) == model.sample(4, steps=5, seed=2)).all()
    heads = [one.provenance["config"]["model"]["head_channels"] for one in (back, model)]
    assert heads[0] == heads[1]
    diffusers_export.write_diffusers(back, SamplingSettings(), tmp_path / "again")
    name = "unet/diffusion_pytorch_model.safetensors"
    once, twice = (load_file(tmp_path / folder / name) for folder in ("given", "again"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_a_model_of_diffusers_goes_back_as_the_network_that_it_was(tmp_path: Path) -> None:
    """With the eps of theirs, which our configs have no key for."""
    model = trained(configured())
    diffusers_export.write_diffusers(model, SamplingSettings(), tmp_path / "ours")
    config = tmp_path / "ours/unet/config.json"
    changed = json.loads(config.read_text()) | {"norm_eps": 1e-2, "attention_head_dim": 4}
    config.write_text(json.dumps(changed))
    theirs = checkpoint_loading.trained_model(str(tmp_path / "ours"))
    assert (theirs.sample(4, steps=5) != model.sample(4, steps=5)).any()
    diffusers_export.write_diffusers(theirs, SamplingSettings(), tmp_path / "again")
    again = checkpoint_loading.trained_model(str(tmp_path / "again"))
    assert (again.sample(4, steps=5) == theirs.sample(4, steps=5)).all()
    kept = json.loads((tmp_path / "again/unet/config.json").read_text())
    assert {key: kept[key] for key in changed} == changed


@pytest.mark.parametrize(
    "sampling, pipeline, scheduler, missing",
    [
        (SamplingSettings(steps=5, seed=4), "DDIMPipeline", "DDIMScheduler", ()),
        (
            SamplingSettings(sampler="ancestral", steps=30, variance="fixed_large"),
            "DDPMPipeline",
            "DDPMScheduler",
            (),
        ),
        (
            SamplingSettings(sampler="dpm_solver_pp", steps=10, clip=False),
            "DDPMPipeline",
            "DPMSolverMultistepScheduler",
            (),
        ),
        (
            SamplingSettings(sampler="unipc", steps=7, spacing="log_snr", guidance_scale=2.0),
            "DDPMPipeline",
            "DDPMScheduler",
            ("sampler=unipc", "spacing=log_snr", "guidance_scale=2"),
        ),
        (
            SamplingSettings(steps=7, labels=(1,)),
            "DDIMPipeline",
            "DDIMScheduler",
            ("steps=7", "labels=[1]"),
        ),
        (
            SamplingSettings(steps=5, dynamic_quantile=0.9),
            "DDIMPipeline",
            "DDIMScheduler",
            ("dynamic_quantile",),
        ),
    ],
    ids=str,
)
def test_a_runs_sampling_settings_go_to_diffusers_and_come_back(
    sampling: SamplingSettings,
    pipeline: str,
    scheduler: str,
    missing: tuple[str, ...],
    tmp_path: Path,
) -> None:
    export = diffusers_export.write_diffusers(trained(configured()), sampling, tmp_path / "given")
    assert (export.pipeline, export.scheduler["_class_name"]) == (pipeline, scheduler)
    assert tuple(line.split(" (")[0] for line in export.no_equivalent) == missing
    assert export.call["num_inference_steps"] == sampling.steps
    back = checkpoint_loading.trained_model(str(tmp_path / "given"))
    assert back.settings == replace(sampling, clip=sampling.clip is not False)
    config = tmp_path / "given/scheduler/scheduler_config.json"
    text = json.loads(config.read_text())
    for wrong in ({"steps": "many"}, {"no_such_key": 1}, {"eta": 7}):
        config.write_text(json.dumps(text | {"_ddpm_ray_sampling": wrong}))
        with pytest.raises(UnsupportedModelError, match="|".join(wrong)):
            checkpoint_loading.trained_model(str(tmp_path / "given"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs: numpy 2
@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpm_solver_pp", "dpm_solver_pp_sde"])
def test_the_pipeline_that_an_export_names_draws(sampler: Any, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="pip install 'ddpm-ray[dev]'")
    sampling = SamplingSettings(sampler=sampler, steps=5)
    export = diffusers_export.write_diffusers(trained(configured()), sampling, tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline).__name__ == export.pipeline
    assert type(pipeline.scheduler).__name__ == export.scheduler["_class_name"]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, output_type="np", **export.call).images
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()


def test_what_diffusers_has_no_name_for_is_refused_with_nothing_written(tmp_path: Path) -> None:
    model = trained(configured("objective.prediction=edm"))
    with pytest.raises(UnsupportedModelError, match="prediction"):
        diffusers_export.write_diffusers(model, SamplingSettings(), tmp_path / "given")
    assert not (tmp_path / "given").exists()


def committed(config: RunConfig, folder: Path, **more: Any) -> str:
    """The folder of a run that was saved once, at step 0, with `more` facts."""
    facts = {"config": to_dict(config), "image_shape": [8, 8, 3], "data_fingerprint": "", **more}
    state = training_run.training_state(config, ImageShape(8, 8, 3), CPU, facts)
    CheckpointStore(str(folder / "checkpoints")).save(state.snapshot([]))
    return str(folder)


def test_the_run_of_an_autoencoder_encodes_and_draws_no_images(tmp_path: Path) -> None:
    folder = committed(config_of([*AUTOENCODER]), tmp_path)
    with pytest.raises(ConfigError, match=r"holds an autoencoder, which draws no images: train a"):
        checkpoint_loading.trained_model(folder)
    with pytest.raises(ConfigError, match=r"holds no classifier: train one"):
        classifier_loading.trained_classifier(folder)
    found = trained_autoencoder(folder)
    (weights,) = tmp_path.glob("checkpoints/step-*/ema.safetensors")
    assert found.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    images = np.zeros((2, 8, 8, 3), np.uint8)
    assert found.encode_uint8(images).mean.shape == (2, 4, 4, 4)
    assert autoencoder_run(folder) == config_of([*AUTOENCODER])


def test_scores_of_denoisers_are_refused_for_an_autoencoder() -> None:
    wanted = EvaluationConfig(num_images=9, likelihood_images=5, precision_recall=True)
    with pytest.raises(ConfigError, match=r"likelihood_images is 5.*\n.*precision_recall is True"):
        require_reconstruction_scores(wanted)


CLASSIFIER = (
    "task=classifier",
    "model.num_classes=3",
    "training.grid_every_steps=0",
)


def test_a_classifier_and_a_model_are_not_taken_for_each_other(tmp_path: Path) -> None:
    classifier = committed(configured(*CLASSIFIER), tmp_path / "classifier")
    unet = committed(configured(), tmp_path / "unet")
    with pytest.raises(ConfigError, match=r"holds a classifier, which draws no images"):
        checkpoint_loading.trained_model(classifier)
    with pytest.raises(ConfigError, match=r"holds no classifier: train one with task=classifier"):
        classifier_loading.trained_classifier(unet)
    logits = classifier_loading.trained_classifier(classifier)(
        torch.zeros(2, 3, 8, 8), torch.tensor([1, 30])
    )
    assert logits.shape == (2, 3)
    assert checkpoint_loading.trained_model(unet).sample(2, steps=2).dtype == np.uint8


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step-00000000-*"])
def test_a_folder_is_loaded_by_reading_the_bytes_of_its_average_alone(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run, its checkpoints, or one: model, EMA and optimiser are four times as many."""
    run = Path(committed(configured("model.base_channels=32"), tmp_path / "run"))
    (folder,) = run.glob(below) if below else [run]
    (average,) = run.rglob("ema.safetensors")
    read: list[int] = []
    read_bytes = object_store.read_bytes

    def counted(url: str, *rest: int) -> bytes:
        read.append(len(data := read_bytes(url, *rest)))
        return data

    monkeypatch.setattr(object_store, "read_bytes", counted)
    assert checkpoint_loading.trained_model(str(folder)).sample(2, steps=2).dtype == np.uint8
    assert 1 <= sum(read) / average.stat().st_size <= 1.05


@pytest.mark.parametrize("refused", range(4))
def test_an_export_to_a_full_disk_leaves_whole_files_and_no_index(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On commit d926ba0 `[Errno 28] No space left on device`, and a folder with half a file."""
    model, synced, fsync = trained(configured()), itertools.count(), os.fsync
    diffusers_export.write_diffusers(model, SamplingSettings(), whole := tmp_path / "whole")

    def full(file: int) -> None:
        if next(synced) == refused:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr("ddpm_ray.storage.object_store.os.fsync", full)
    with pytest.raises(StorageError, match=r"begun/.*: the disk is full; free some space or cho"):
        diffusers_export.write_diffusers(model, SamplingSettings(), begun := tmp_path / "begun")
    left = [path for path in begun.rglob("*") if path.is_file()]
    assert len(left) == refused
    for path in left:
        assert path.read_bytes() == (whole / path.relative_to(begun)).read_bytes()
    assert not (begun / diffusers_folders.MODEL_INDEX).exists()


def test_an_average_that_is_not_there_is_reported_with_those_that_are(tmp_path: Path) -> None:
    unet = committed(configured(), tmp_path / "unet")
    with pytest.raises(CheckpointError, match=r"it has no average 'ema-0\.5'; it has ema$"):
        checkpoint_loading.trained_model(unet, ema="ema-0.5")


@pytest.mark.parametrize("uri", ["", " ", 3, None, b"runs/a"])
def test_a_name_that_can_be_no_models_is_reported(uri: object) -> None:
    with pytest.raises(ValueError, match=r"^uri is .*; name a run's folder"):
        ddpm_ray.load(uri)  # type: ignore[arg-type]


@pytest.mark.parametrize("uri", ["runs/none", "runs:/none/model"])
@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta", 99, 2.5, "cuda:-1", torch])
def test_a_device_that_is_not_there_is_reported_before_anything_is_read(
    uri: str, device: object
) -> None:
    with pytest.raises(ValueError, match=r"^device is .*, which is not usable here; choose .*cpu"):
        ddpm_ray.load(uri, device)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [None, "", "cpu", torch.device("cpu")])
def test_a_device_that_is_there_is_taken(device: torch.device | str | None) -> None:
    here = usable_device(device)
    assert here.type == ("cuda" if torch.cuda.is_available() and not device else "cpu")


@dataclass(frozen=True)
class HalfRange(PixelCodec):
    """A codec of images in [-0.5, 0.5], to be told from PIXELS."""

    levels_per_unit = 255.0


def test_the_stored_codec_is_used_to_train_and_to_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = HalfRange()
    monkeypatch.setattr(run_config, "PIXELS", other)
    config = configured()
    run = committed(config, tmp_path / "run", codec="pixels")
    assert checkpoint_loading.trained_model(run).denoiser.codec is other
    state = training_run.training_state(config, ImageShape(8, 8, 3), CPU, {"codec": "pixels"})
    assert diffusion.objective(config, state, CPU).noising.codec is other


@pytest.mark.parametrize("facts", [{}, {"codec": "pixels"}], ids=str)
def test_a_checkpoint_without_a_codec_holds_pixels(facts: Mapping[str, Any]) -> None:
    assert run_config.saved_codec(facts, "run") is PIXELS


@pytest.mark.parametrize("name", old_runs.RUNS)
def test_a_checkpoint_of_an_earlier_commit_is_of_pixels(name: str) -> None:
    (state,) = (old_runs.FOLDER / name).rglob("state.json")
    assert "codec" not in json.loads(state.read_text())
    assert checkpoint_loading.trained_model(str(state.parent)).denoiser.codec is PIXELS


@pytest.mark.parametrize("codec", ["frames", None, 3, ["pixels"], {}], ids=str)
@pytest.mark.parametrize("task", ["model", "classifier"])
def test_an_unknown_codec_is_refused_with_the_checkpoint_and_the_remedy(
    task: str, codec: object, tmp_path: Path
) -> None:
    config = configured(*CLASSIFIER) if task == "classifier" else configured()
    of = classifier_loading if task == "classifier" else checkpoint_loading
    load_it = getattr(of, f"trained_{task}")
    with pytest.raises(NewerFormatError, match="its codec is") as raised:
        load_it(committed(config, tmp_path / "run", codec=codec))
    line = str(raised.value)
    assert "\n" not in line
    assert str(tmp_path / "run/checkpoints/step-00000000-") in line
    assert f"its codec is {codec!r}, and ddpm_ray" in line
    assert line.endswith(
        "knows pixels, latents, embeddings; upgrade ddpm_ray to the version that wrote it"
    )
