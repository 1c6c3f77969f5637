"""A packed set, a run and a sweep of an earlier commit go on as they went on there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.packing import pack_report
from tests.golden import made_by_820f16a as made
from tests.golden.old_runs import cpu_model

ENDS: dict[str, Any] = json.loads((made.FOLDER / "ends.json").read_text())

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports


@pytest.fixture
def home(tmp_path: Path) -> Path:
    shutil.copytree(made.FOLDER, tmp_path / "home")
    return tmp_path / "home"


def require_this_cpu() -> None:
    if ENDS["cpu"] != cpu_model():
        pytest.skip(f"it ended, but its bits are those of another CPU ({ENDS['cpu']})")


def test_the_packed_set_streams_the_same_bytes_in_the_same_order() -> None:
    url = str(made.FOLDER / "data")
    dataset = open_dataset(url)
    assert dataset.fingerprint == ENDS["fingerprint"]
    assert dataset.manifest.label_names == made.CLASSES
    record = pack_report.read_record(dataset)
    assert record is not None
    assert sum(record.report.class_samples) == made.IMAGES
    assert made.streamed(url) == ENDS["streamed"]


def test_the_run_continues_to_the_same_bits(home: Path) -> None:
    ended = made.train(home, made.STEPS)
    assert ended.keys() == ENDS["run"].keys()
    require_this_cpu()
    assert ended == ENDS["run"]


def test_the_sweep_continues_with_the_trial_that_is_half_done(home: Path) -> None:
    """The finished one is not run again, and the others end with the same scores and weights."""
    finished = home / "quick/trials/00000.json"
    before = finished.read_bytes()
    begun, trials = made.run_sweep(home)
    assert begun == ENDS["begun"] == [1, 2]
    assert finished.read_bytes() == before
    ends = made.trial_ends(trials)
    assert [(end["values"], end["status"]) for end in ends] == [
        (end["values"], "finished") for end in ENDS["trials"]
    ]
    require_this_cpu()
    assert ends == ENDS["trials"]
    weights = [made.digests(trial.outcome["checkpoint"]) for trial in trials[1:]]
    assert weights == ENDS["weights"][1:]
