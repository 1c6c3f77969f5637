"""A model in MLflow is downloaded once by each process of a job."""

import runpy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from ddpm_ray.assembly import training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.guidance import GuidanceConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, from_dict, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.distributed import worker_group
from ddpm_ray.reporting import Progress
from ddpm_ray.runs import load_model
from ddpm_ray.runs.evaluation import evaluate, evaluate_worker
from ddpm_ray.tracking import run_lookup
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CheckpointStore
from tests.noise import pack_noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path, mlflow_database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`runs:/<run id>/model` of a checkpoint, in the MLflow that the environment names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_database)
    monkeypatch.chdir(tmp_path)
    config = load_config(
        RunConfig,
        None,
        [
            "name=tiny",
            f"data.url={tmp_path / 'data'}",
            "schedule.num_steps=9",
            "sampling.steps=3",
            "model.base_channels=4",
            "model.groups=2",
            "model.channel_mults=[1]",
            "model.blocks_per_level=1",
            "model.attention_resolutions=[]",
        ],
    )
    facts = {"config": to_dict(config), "image_shape": [4, 4, 1], "data_fingerprint": "f" * 64}
    state = training_run.training_state(config, ImageShape(4, 4, 1), torch.device("cpu"), facts)
    saved = CheckpointStore(str(tmp_path / "run/checkpoints")).save(state.snapshot([]))
    run = run_lookup.find_or_create_run(
        mlflow_database, "trained", "a", str(tmp_path), str(tmp_path / "artifacts")
    )
    MlflowClient(tracking_uri=mlflow_database).log_artifacts(run.run_id, saved, "model")
    return f"runs:/{run.run_id}/model"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What MLflow is asked to download; temporary files go to the folder `scratch`."""
    seen, ask = [], mlflow.artifacts.download_artifacts

    def download(uri: str, **settings: Any) -> str:
        seen.append(uri)
        return str(ask(uri, **settings))

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return seen


def left(folder: Path) -> list[Path]:
    return list((folder / "scratch").glob("ddpm-ray-model-*"))


@pytest.mark.parametrize("job, out", [("sample", "grid.png"), ("export", "model")])
def test_a_job_downloads_its_model_once(
    job: str,
    out: str,
    model: str,
    downloads: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the run's settings and for its weights."""
    monkeypatch.setattr(sys, "argv", [job, model, "--out", out])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / f"jobs/{job}.py"), run_name="__main__")
    assert (tmp_path / out).exists()
    assert downloads == [model]
    assert not left(tmp_path)


def test_the_driver_of_an_evaluation_and_its_worker_download_once_each(
    model: str, downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_noise(str(tmp_path / "data"), images=8, side=4)
    given = {"evaluation.num_images": 0, "evaluation.bits_per_dim_images": 4}
    words = [f"{key}={value}" for key, value in given.items()]
    config = load_config(EvaluateConfig, None, words)
    shown: list[Progress] = []

    def run(worker: Callable[..., Any], settings: dict[str, Any], *_: Any) -> Any:
        assert downloads == [model]
        assert not left(tmp_path)
        config = from_dict(EvaluateConfig, settings["config"])
        return evaluate_worker._scores(config, settings, shown.append)

    monkeypatch.setattr(worker_group, "run", run)
    monkeypatch.setattr(
        evaluate_worker, "distributed_context", lambda: Workers(0, 1, torch.device("cpu"))
    )
    config = load_model.as_trained(config, model, given, tmp_path)
    evaluate.run_evaluation(model, config, tmp_path)
    assert downloads == [model, model]
    assert not left(tmp_path)
    assert (shown[-1].step, shown[-1].steps) == (4, 4)


@pytest.mark.parametrize(
    "steps, of",
    [("bits_per_dim_terms", "bits_per_dim_images"), ("likelihood_steps", "likelihood_images")],
)
def test_more_steps_than_the_model_has_are_refused_before_ray_starts(
    steps: str, of: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to T = 9, and only where they are taken."""
    pack_noise(str(tmp_path / "data"), images=8, side=4)
    started: list[Any] = []

    def run(_: Any, settings: dict[str, Any], *more: Any) -> dict[str, Any]:
        started.append(settings)
        return {"metrics": {}}

    def evaluated(count: int, images: int) -> None:
        words = [f"evaluation.{steps}={count}", f"evaluation.{of}={images}", "sampling.steps=3"]
        config = load_config(EvaluateConfig, None, words)
        evaluate.run_evaluation(str(tmp_path / "run"), config, tmp_path)

    monkeypatch.setattr(worker_group, "run", run)
    evaluated(9, 4)
    evaluated(10, 0)
    assert len(started) == 2
    says = rf"^evaluation\.{steps} is 10; it cannot exceed the model's T = 9$"
    with pytest.raises(ConfigError, match=says):
        evaluated(10, 4)
    assert len(started) == 2


def test_a_model_guided_by_a_classifier_knows_its_classes(model: str, tmp_path: Path) -> None:
    words = ["name=c", "data.url=d", "task=classifier", "model.num_classes=3"]
    words += ["schedule.num_steps=9", "sampling.steps=3", "model.base_channels=4"]
    words += ["model.groups=2", "model.channel_mults=[1]", "model.blocks_per_level=1"]
    words += ["model.attention_resolutions=[]", "training.grid_every_steps=0"]
    config = load_config(RunConfig, None, words)
    facts = {"config": to_dict(config), "image_shape": [4, 4, 1], "data_fingerprint": "f" * 64}
    state = training_run.training_state(config, ImageShape(4, 4, 1), torch.device("cpu"), facts)
    CheckpointStore(str(tmp_path / "classifier/checkpoints")).save(state.snapshot([]))
    plain = load_model.load(str(tmp_path / "run"))
    guidance = GuidanceConfig(classifier=str(tmp_path / "classifier"))
    settings = replace(plain.settings, labels=(2, 0))
    guided = load_model.configured(plain, settings, guidance)
    assert guided.sample(3, labels=[2, 1]).shape == (3, 4, 4, 1)
    with pytest.raises(ConfigError, match=r"^sampling\.labels has 3; the model knows 0 to 2"):
        load_model.configured(plain, replace(settings, labels=(3,)), guidance)
    with pytest.raises(ConfigError, match=r"the model is trained without labels"):
        load_model.configured(plain, settings, GuidanceConfig())


def test_each_load_of_a_notebook_asks_anew(
    model: str, downloads: list[str], tmp_path: Path
) -> None:
    """An alias may have gone to another version."""
    first, second = (load_model.load(model, "cpu") for _ in range(2))
    assert downloads == [model, model]
    assert (first.sample(1) == second.sample(1)).all()
    assert not left(tmp_path)


@pytest.mark.parametrize(
    "uri, says",
    [
        ("runs:/", r"^runs:/ lacks a run's id; write runs:/<run id>/model$"),
        ("runs:///", r"lacks a run's id"),
        ("runs:/0123abcd", r"lacks the model's name in that run; write runs:/<run id>/model$"),
        ("runs:/0123abcd/", r"lacks the model's name in that run"),
        ("models:/", r"^models:/ lacks a name; write models:/<name>@<alias> or models:/<name>/"),
        ("models:/digits", r"lacks an alias or a version; write "),
        ("models:/digits@", r"lacks an alias or a version"),
        ("models:/digits/", r"lacks an alias or a version"),
        ("models:/@champion", r"lacks a name"),
        ("runs:/0123abcd/model", ""),
        ("runs:/0123abcd/a/b", ""),
        ("models:/digits@champion", ""),
        ("models:/digits/3", ""),
        ("models:/digits/latest", ""),
        ("models:/m-0123456789abcdef0123456789abcdef", ""),
    ],
)
def test_a_uri_that_lacks_a_part_says_which(
    uri: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On commit d926ba0 some were "MLflow's database cannot be used"."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", lambda uri, **_: 1 / 0)
    if says:
        with pytest.raises(ConfigError, match=says):
            load_model.load(uri, "cpu")
    else:  # it is asked for
        with pytest.raises(ZeroDivisionError, match="by zero"):
            load_model.load(uri, "cpu")


@pytest.mark.parametrize(
    "name, says",
    [("none", "there is no such folder"), ("empty", "there is no committed checkpoint here")],
)
def test_a_missing_folder_is_no_folder_without_a_checkpoint(
    name: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: {says}; name a run's folder"):
        load_model.load(str(tmp_path / name), "cpu")
