"""The job export on models of latents and autoencoders: what it writes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ddpm_ray
from benchmarks.gpu.tiny import config_of
from benchmarks.gpu.tiny_keys import ADVERSARY, AUTOENCODER
from ddpm_ray.assembly import checkpoint_loading, training_run
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.cli.job import DONE, FAILED, WRONG_CONFIG, Job
from ddpm_ray.cli.main import main
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.jobs import export, import_model, sample
from ddpm_ray.models.interop import diffusers_folders, diffusers_pipelines
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.training.state import TrainingState
from tests.data.latent_sets import TINY_UNET, commit, encode_noise, initial_run
from tests.fixtures.full_disk import fill_disk
from tests.fixtures.job_script import refused

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
DIT = ("model.network=dit", "model.depth=1", "model.hidden_size=8", "model.heads=2")


@pytest.fixture
def encoded(tmp_path: Path) -> str:
    return encode_noise(tmp_path, images=12)


def committed(folder: Path, state: TrainingState) -> str:
    """The folder of a run that was saved once, without a weight that is 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in state.ema.model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return commit(state, folder)


def pixel_run(folder: Path, config: RunConfig) -> str:
    """The folder of a run on images of 8 x 8, without a data set."""
    facts = {"config": to_dict(config), "image_shape": [8, 8, 1], "data_fingerprint": ""}
    return committed(folder, training_run.training_state(config, ImageShape(8, 8, 1), CPU, facts))


def latent_run(folder: Path, url: str, *overrides: str, **facts: Any) -> str:
    keys = ("name=a", f"data.url={url}", "schedule.num_steps=10", "sampling.steps=5")
    config = load_config(RunConfig, None, [*keys, *(overrides or TINY_UNET)])
    return committed(folder, initial_run(config, **facts))


def done(capsys: pytest.CaptureFixture[str], job: Job[Any], *words: object) -> dict[str, Any]:
    code = main(job, [str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == DONE, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "overrides, pipeline, call",
    [
        (TINY_UNET, "LDMPipeline", {"eta": 0.0, "num_inference_steps": 5}),
        (
            (*DIT, "model.num_classes=3", "model.mlp_norm_eps=1e-5"),  # as in published ones
            "DiTPipeline",
            {"class_labels": [2], "guidance_scale": 2.0, "num_inference_steps": 5},
        ),
    ],
    ids=["unet", "dit"],
)
def test_a_run_of_latents_is_exported_and_comes_back_as_a_run(
    overrides: tuple[str, ...],
    pipeline: str,
    call: dict[str, Any],
    encoded: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("crane", "tulip, red", "crane") if "class_labels" in call else None
    run = latent_run(tmp_path / "run", encoded, *overrides, label_names=names or [])
    out = tmp_path / "out"
    given = ["sampling.labels=[2]", "sampling.guidance_scale=2"] if names else []
    result = done(capsys, export.JOB, run, "--out", out, *given)
    assert (result["pipeline"], result["call"]) == (pipeline, call)
    assert result["no_equivalent"] == []
    assert result["average"] is None
    back = done(capsys, import_model.JOB, out, tmp_path / "back", "layout=diffusers")
    part = "vqvae" if pipeline == "LDMPipeline" else "vae"
    assert back["autoencoder"]["url"] == str(out / part)
    drawn = done(capsys, sample.JOB, out, "--out", tmp_path / "grid.png", "num_images=1")
    assert (drawn["step"], drawn["checkpoint"]) == (None, str(out))  # a folder names no step
    models = [ddpm_ray.load(str(one), "cpu") for one in (run, out, tmp_path / "back")]
    assert repr(models[1]) == f"TrainedModel({out}, 8x8x1, cpu)"
    images = [one.sample(4).astype(int) for one in models]
    if not given:
        assert np.abs(images[0] - images[1]).max() <= 1
    assert (images[1] == images[2]).all()
    assert models[2].image_shape == (8, 8, 1)
    assert [one.label_names for one in models] == [names] * 3
    assert checkpoint_loading.label_names(*checkpoint_loading.run_facts(str(out))) == names
    line = refused(
        capsys, import_model.JOB, WRONG_CONFIG, out, tmp_path / "b", "sampling.clip=true"
    )
    assert "sampling.clip is true, but latents have no range to clip to" in line


def test_an_autoencoder_that_is_gone_or_another_one_is_one_line(
    encoded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = latent_run(tmp_path / "run", encoded), tmp_path / "out"
    (tmp_path / "autoencoder").rename(tmp_path / "moved")
    line = refused(capsys, export.JOB, FAILED, run, "--out", out)
    assert "the autoencoder of these latents does not load" in line
    assert "autoencoder=" in line
    result = done(capsys, export.JOB, run, "--out", out, f"autoencoder={tmp_path / 'moved'}")
    assert result["pipeline"] == "LDMPipeline"
    weights = tmp_path / "moved" / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    line = refused(
        capsys, export.JOB, FAILED, run, "--out", f"{out}2", f"autoencoder={tmp_path / 'moved'}"
    )
    assert "these latents were encoded by the autoencoder of sha256" in line
    assert not Path(f"{out}2").exists()


def test_a_destination_that_holds_something_is_refused(
    encoded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier export would be mixed with this one where the job is killed."""
    run, out = latent_run(tmp_path / "run", encoded), tmp_path / "out"
    out.mkdir()
    (out / "unet").touch()
    line = refused(capsys, export.JOB, WRONG_CONFIG, run, "--out", out)
    assert f"--out is {out}, which holds unet: name a new folder" in line
    (out / "unet").unlink()
    assert done(capsys, export.JOB, run, "--out", out)["folder"] == str(out)


def test_an_export_onto_a_full_disk_leaves_nothing(
    encoded: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second file finds no space; the same command works once there is some."""
    run, out = latent_run(tmp_path / "run", encoded), tmp_path / "out"
    (out / "unet").mkdir(parents=True)  # as an earlier version left it
    with monkeypatch.context() as patch:
        fill_disk(patch, after=1)
        line = refused(capsys, export.JOB, FAILED, run, "--out", out)
    assert "the disk is full; free some space" in line
    assert not out.exists()
    assert done(capsys, export.JOB, run, "--out", out)["folder"] == str(out)


def test_clipping_latents_is_refused(
    encoded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = latent_run(tmp_path / "run", encoded)
    words = run, "--out", tmp_path / "out", "sampling.clip=true"
    line = refused(capsys, export.JOB, WRONG_CONFIG, *words)
    assert "sampling.clip is true, but latents have no range to clip to" in line


def test_the_average_of_the_weights_is_named(
    encoded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a checkpoint that jobs/average.py wrote."""
    run = latent_run(tmp_path / "run", encoded, average={"width": 0.1})
    assert done(capsys, export.JOB, run, "--out", tmp_path / "out")["average"] == {"width": 0.1}


def test_the_run_of_an_autoencoder_becomes_an_autoencoder_of_diffusers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its discriminator; the folder encodes as the run does."""
    config, out = config_of([*AUTOENCODER, *ADVERSARY]), tmp_path / "out"
    run = pixel_run(tmp_path / "run", config)
    line = refused(capsys, export.JOB, WRONG_CONFIG, run, "--out", out, "sampling.steps=3")
    assert "sampling.steps: an autoencoder is exported without options" in line
    result = done(capsys, export.JOB, run, "--out", out)
    ours, theirs = trained_autoencoder(run), trained_autoencoder(str(out))
    assert result["model"] == "AutoencoderKL"
    assert result["weights_sha256"] == ours.sha256
    assert json.loads((out / "config.json").read_text())["scaling_factor"] == 1
    weights = theirs.model.state_dict()
    assert all(torch.equal(weights[key], one) for key, one in ours.model.state_dict().items())
    line = refused(capsys, import_model.JOB, FAILED, out, tmp_path / "back", "layout=diffusers")
    assert "it holds an autoencoder, which draws no images: give it to `ddpm-ray encode`" in line
    (tmp_path / "whole").mkdir()
    out.rename(tmp_path / "whole/vae")  # as a part of a pipeline is downloaded
    with pytest.raises(ConfigError, match="whole holds an autoencoder, which draws no images: tr"):
        ddpm_ray.load(str(tmp_path / "whole"), "cpu")


def test_an_autoencoder_for_a_model_of_pixels_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(RunConfig, None, ["name=a", "data.url=b", *TINY_UNET])
    run = pixel_run(tmp_path / "run", config)
    line = refused(
        capsys, export.JOB, WRONG_CONFIG, run, "--out", tmp_path / "out", "autoencoder=ae"
    )
    assert "holds a model of pixels: leave it out" in line


@pytest.mark.parametrize(
    "file, key, value, says",
    [
        ("vqvae/config.json", "scaling_factor", 0, "scaling_factor is 0; it must be above 0"),
        ("vqvae/config.json", "shift_factor", 0.1, "shift_factor is 0.1; .* only None"),
        ("vqvae/config.json", "latent_channels", 4, "have 4 channels, but the network draws 2"),
        ("vqvae/config.json", "_class_name", "VQModel", "'VQModel'; supported is AutoencoderKL"),
        (
            "scheduler/scheduler_config.json",
            "_ddpm_ray_sampling",
            {"clip": True, "variance": "fixed_small"},
            "clip_sample is True, but latents have no range",
        ),
    ],
)
def test_a_folder_whose_parts_do_not_fit_together_is_refused(
    file: str,
    key: str,
    value: object,
    says: str,
    encoded: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done(capsys, export.JOB, latent_run(tmp_path / "run", encoded), "--out", tmp_path / "out")
    config = tmp_path / "out" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(UnsupportedModelError, match=says):
        diffusers_folders.read_folder(tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=says):
        ddpm_ray.load(str(tmp_path / "out"), "cpu")


@pytest.mark.parametrize("names", [{"0": "a", "1": "b"}, {"0": "a", "2": "b"}, ["a"], {"0": 1}])
def test_names_that_are_not_those_of_the_classes_are_not_read(names: object) -> None:
    """As without names: labels are numbers then."""
    assert diffusers_folders.class_names_of({"id2label": names}, 3) is None
    assert diffusers_folders.class_names_of({"id2label": {"1": "b", "0": "a"}}, 2) == ("a", "b")


def test_what_a_pipeline_cannot_do_for_a_model_is_named() -> None:
    facts: dict[str, dict[str, Any]] = {
        "schedule": {"kind": "linear", "num_steps": 10},
        "objective": {"prediction": "epsilon"},
        "sampling": {"variance": "fixed_small", "clip": False, "sampler": "ddim", "eta": 0.5},
    }
    of = diffusers_pipelines.ModelTraits(latents=True, image_size=(4, 6), condition_channels=3)
    found = diffusers_pipelines.to_pipeline(facts, of).no_equivalent
    named = [one.split(" (")[0] for one in found]
    assert named == ["conditioning images", "latents of 4 x 6"]
    dit = replace(of, network="transformer", image_size=(4, 4), condition_channels=0)
    (line,) = diffusers_pipelines.to_pipeline(facts, dit).no_equivalent
    assert line == "eta=0.5 (DiTPipeline: 0)"
    learned = {**facts, "objective": {"prediction": "epsilon", "variance": "learned_range"}}
    learned["sampling"] = {"variance": "learned", "clip": False, "steps": 5}
    (line,) = diffusers_pipelines.to_pipeline(
        learned, diffusers_pipelines.ModelTraits()
    ).no_equivalent
    assert line == "steps=5 (a learned variance adds noise to the last step, too)"
    (line,) = diffusers_pipelines.to_pipeline(learned, dit).no_equivalent
    assert line == "variance=learned (DDPMScheduler: fixed_small)"
    solver = {**learned, "sampling": {**facts["sampling"], "sampler": "dpm_solver_pp"}}
    for channels, scheduler in ((3, "DPMSolverMultistepScheduler"), (4, "DDPMScheduler")):
        of_channels = diffusers_pipelines.ModelTraits(latents=True, channels=channels)
        made = diffusers_pipelines.to_pipeline(solver, of_channels).scheduler
        assert made["_class_name"] == scheduler
    guided = {**facts, "sampling": {**facts["sampling"], "eta": 0, "guidance_scale": 3.0}}
    many = replace(dit, num_classes=1001)
    (line,) = diffusers_pipelines.to_pipeline(guided, many).no_equivalent
    assert line == "guidance_scale=3 (DiTPipeline guides models with labels, at most 1000)"
