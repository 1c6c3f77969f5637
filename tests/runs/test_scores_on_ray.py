"""jobs/evaluate.py and jobs/average.py whole, on a local Ray, to the scores."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import given_keys, load_config
from ddpm_ray.jobs.command import JOBS as COMMANDS
from ddpm_ray.runs.evaluation import evaluate_worker
from tests.runs.test_ema_search import KEPT, alone, wandering

OWN = {"sampler": "ancestral", "steps": 3, "seed": 7}  # what the run is sampled with
SCORED = (
    "data_url=data",
    "evaluation.held_out_url=data",
    "evaluation.features=digits",
    "evaluation.num_images=20",
    "evaluation.kernel_distance=false",
    "cluster.num_workers=1",
    "cluster.max_failures=0",
)
JOBS = {
    "evaluate": (
        "evaluation.bits_per_dim_images=4",
        "evaluation.bits_per_dim_terms=3",
        "evaluation.likelihood_images=4",
        "evaluation.likelihood_steps=3",
        "evaluation.memorisation_images=4",
        *SCORED,
    ),
    "average": ("widths=[0.1,0.25]", *SCORED),
}

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Train's, of Ray Data
]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def result_of(name: str, run: Path) -> Any:
    """What the job prints, in plain JSON, for the model in `run`, from the folder above it."""
    job, keys = COMMANDS[name], list(JOBS[name])
    given = given_keys(job.config, keys)
    place = Namespace(run=run.name, model_uri=run.name, out="", given=given)
    assert job.prepare is not None
    config = job.prepare(load_config(job.config, None, keys), place)
    return json.loads(json.dumps(job.run(config, place)))


@pytest.mark.parametrize("name", JOBS)
def test_a_worker_on_ray_scores_a_run_by_its_own_sampling(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As this process does without Ray; places are relative, and the worker's folder another."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    wandering(run, *KEPT, *(f"sampling.{key}={value}" for key, value in OWN.items()))
    found = result_of(name, run)
    alone(monkeypatch)
    monkeypatch.setattr(evaluate_worker, "distributed_context", Workers)
    known = result_of(name, run)
    numbers = {"evaluate": ("metrics",), "average": ("scores", "misfits")}[name]
    for key in numbers:
        assert found.pop(key) == pytest.approx(known.pop(key), rel=1e-6)
    assert OWN.items() <= found["certificate"]["samples"].items()
    assert found == known
