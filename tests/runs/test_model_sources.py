"""What a URI of a served model means: it stays the same when a name or a run moves on."""

from pathlib import Path

import numpy as np
import pytest

import ddpm_ray
from ddpm_ray.runs.model_sources import ModelSources
from ddpm_ray.tracking import model_registry, run_lookup
from ddpm_ray.tracking.mlflow_runs import TrackingError
from ddpm_ray.tracking.model_uri import shown_name
from ddpm_ray.tracking.run_info import TrackedRun
from ddpm_ray.training.checkpoint_folder import CheckpointError
from tests.noise import pack_noise
from tests.test_cascade_job import DIFFUSION, trained
from tests.training.test_loop import TINY_UNET

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's, as it imports


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of other seeds."""
    root = tmp_path_factory.mktemp("runs")
    pack_noise(str(root / "data"), 8, 4)
    for seed in (0, 1):
        trained(root / f"run{seed}", str(root / "data"), *TINY_UNET, *DIFFUSION, seed=seed)
    return root


def registered(runs: Path, database: str, seed: int) -> TrackedRun:
    """The run of this seed in MLflow, as champion of `faces`."""
    run = run_lookup.find_or_create_run(database, "served", "run", f"served-{seed}", str(runs))
    checkpoint = ModelSources(runs, database).pinned(f"run{seed}")
    model_registry.log_model(run, checkpoint, "ddpm_ray.tracking.pyfunc_model")
    model_registry.register(database, "faces", run.run_id)
    return run


def test_an_alias_means_a_version_until_it_moves(runs: Path, mlflow_database: str) -> None:
    sources = ModelSources(runs, mlflow_database, "cpu")
    registered(runs, mlflow_database, 0)
    first = sources.source("models:/faces@champion")
    registered(runs, mlflow_database, 1)
    second = sources.source("models:/faces@champion")
    assert [first, second] == ["models:/faces/1", "models:/faces/2"]
    for seed, source in enumerate((first, second)):
        assert sources.source(source) == source
        wanted = ddpm_ray.load(str(runs / f"run{seed}"), "cpu").sample(1, seed=5)
        assert np.array_equal(sources.load(source).sample(1, seed=5), wanted)
    with pytest.raises(TrackingError, match="alias challenger not found"):
        sources.source("models:/faces@challenger")


def test_a_run_means_its_newest_checkpoint_now(runs: Path, mlflow_database: str) -> None:
    sources = ModelSources(runs, mlflow_database, "cpu")
    source = sources.pinned("run0")
    assert source.startswith(f"{runs}/run0/checkpoints/step-")
    assert sources.pinned(source) == sources.source(source) == source
    assert sources.pinned("models:/faces@champion") == "models:/faces@champion"
    assert sources.load(source).provenance["checkpoint"] == source
    with pytest.raises(CheckpointError, match=r"data.*this is a data set"):
        sources.load(sources.pinned(str(runs / "data")))


@pytest.mark.parametrize(
    "uri, name",
    [
        ("models:/faces@champion", "faces"),
        ("models:/faces/3", "faces"),
        ("runs:/0123456789abcdef/model", "01234567"),
        ("/data/runs/digits/", "digits"),
        ("s3://bucket/runs/big faces/checkpoints/step-00000100-00000002-8970ebaf", "big-faces"),
    ],
)
def test_a_model_is_served_by_a_short_name(uri: str, name: str) -> None:
    assert shown_name(uri) == name
