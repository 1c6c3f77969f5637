"""A model in MLflow that somebody else has put there: its weights are read, its code is not."""

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from ddpm_ray.assembly import checkpoint_loading, training_run
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.runs import load_model
from ddpm_ray.tracking import run_lookup
from ddpm_ray.tracking.mlflow_runs import TrackingError
from ddpm_ray.training.checkpoints import CheckpointStore

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports

# What MLflow's own loader would do: import `evil` from the model's folder, and unpickle its object.
MLMODEL = """\
artifact_path: model
flavors:
  python_function:
    loader_module: evil
    code: code
    python_model: python_model.pkl
    env: {virtualenv: python_env.yaml}
model_uuid: 0123456789abcdef0123456789abcdef
"""


class Bomb:
    """A pickle that, once believed, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    config = load_config(
        RunConfig,
        None,
        [
            "name=tiny",
            "data.url=/shards",
            "schedule.num_steps=9",
            "sampling.steps=3",
            "model.base_channels=4",
            "model.groups=2",
            "model.channel_mults=[1]",
            "model.blocks_per_level=1",
            "model.attention_resolutions=[]",
        ],
    )
    facts = {"config": to_dict(config), "image_shape": [4, 4, 3], "data_fingerprint": "f" * 64}
    state = training_run.training_state(config, ImageShape(4, 4, 3), torch.device("cpu"), facts)
    return CheckpointStore(str(tmp_path / "run/checkpoints")).save(state.snapshot([]))


def test_code_beside_the_weights_is_not_run(
    checkpoint: str, mlflow_database: str, tmp_path: Path
) -> None:
    ran, model = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(checkpoint, model / "data/checkpoint")
    (model / "code").mkdir()
    (model / "code/evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    (model / "MLmodel").write_text(MLMODEL)
    for place in ("python_model.pkl", "data/model.pth", "data/checkpoint/extra.pkl"):
        (model / place).parent.mkdir(exist_ok=True)
        (model / place).write_bytes(pickle.dumps(Bomb(ran)))
    run = run_lookup.find_or_create_run(mlflow_database, "hostile", "a", "a", str(tmp_path / "art"))
    MlflowClient(tracking_uri=mlflow_database).log_artifacts(run.run_id, str(model), "model")
    read = load_model.load(f"runs:/{run.run_id}/model", "cpu", mlflow_database)
    expected = checkpoint_loading.trained_model(checkpoint).sample(2, steps=3)
    assert (read.sample(2, steps=3) == expected).all()
    assert not ran.exists()
    assert "evil" not in sys.modules


def test_a_model_that_is_code_alone_is_none_of_ours(mlflow_database: str, tmp_path: Path) -> None:
    ran, model = tmp_path / "ran", tmp_path / "model"
    model.mkdir()
    (model / "MLmodel").write_text(MLMODEL)
    (model / "python_model.pkl").write_bytes(pickle.dumps(Bomb(ran)))
    run = run_lookup.find_or_create_run(mlflow_database, "hostile", "b", "b", str(tmp_path / "art"))
    MlflowClient(tracking_uri=mlflow_database).log_artifacts(run.run_id, str(model), "model")
    with pytest.raises(TrackingError, match="this model has no ddpm_ray checkpoint"):
        load_model.load(f"runs:/{run.run_id}/model", "cpu", mlflow_database)
    assert not ran.exists()
