"""Runs that an earlier commit began are continued by this one, to the same bits."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ddpm_ray
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from tests.golden import old_runs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports


@pytest.fixture(params=old_runs.RUNS)
def begun(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """The name of a run of commit c58b265 that stands at half its steps, and a copy of its home."""
    home = tmp_path / "home"
    shutil.copytree(old_runs.FOLDER / request.param, home)
    return request.param, home


def test_an_old_run_ends_as_the_old_code_ended_it(begun: tuple[str, Path]) -> None:
    """Weights, averages and moments, bit for bit, on the CPU that the golden files were made on."""
    name, home = begun
    ended = old_runs.train(name, home, old_runs.STEPS)
    newest = CheckpointStore(str(home / name / CHECKPOINTS)).load(groups=())
    assert newest is not None
    assert newest[1].facts["codec"] == "pixels"  # which the checkpoint that it continues lacks
    with safe_open(home / "end.safetensors", "pt") as expected:
        assert set(ended) == set(expected.keys())
        if (made_on := expected.metadata()["cpu"]) != old_runs.cpu_model():
            pytest.skip(f"it ended, but its bits are those of another CPU ({made_on})")
        different = [key for key in ended if not torch.equal(ended[key], expected.get_tensor(key))]
    assert not different


def test_an_old_run_folder_is_loaded_and_sampled(begun: tuple[str, Path]) -> None:
    name, home = begun
    assert ddpm_ray.load(str(home / name)).sample(2, steps=2).shape == (2, 4, 4, 1)
