"""The demo keeps README's promises: `make train > out`, then `DDPM_RAY_DEMO=out pytest -m demo`.

The last line of that file is the run's report.
"""

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from PIL import Image

import ddpm_ray
from ddpm_ray.evaluation.features.digits_classifier import load_digits_classifier

pytestmark = [
    pytest.mark.demo,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    stdout = os.environ.get("DDPM_RAY_DEMO")
    if not stdout:
        pytest.skip("set DDPM_RAY_DEMO to the file that `make train` wrote its stdout to")
    parsed: dict[str, Any] = json.loads(Path(stdout).read_text().splitlines()[-1])
    return parsed


def test_its_samples_are_digits(report: dict[str, Any]) -> None:
    """Of 256 EMA samples the project's own classifier is sure of 85 %, and each class appears.

    It is sure of 0.3 % of garbage, and of 96 % of real digits that it was not trained on.
    """
    images = ddpm_ray.load(report["checkpoint"]).sample(256, steps=50, eta=1.0, seed=0)
    confidence, label = load_digits_classifier().logits(torch.tensor(images)).softmax(1).max(1)
    sure = confidence >= 0.9
    assert sure.float().mean() >= 0.85
    assert set(label[sure].tolist()) == set(range(10))


def test_mlflow_has_one_finished_run_with_each_step_once(report: dict[str, Any]) -> None:
    client = mlflow.MlflowClient(report["tracking_uri"])
    run = client.get_run(report["run_id"])
    assert run.info.status == "FINISHED"
    rows = client.get_metric_history(report["run_id"], "train/loss")
    assert sorted(row.step for row in rows) == list(range(1, report["steps"] + 1))
    assert run.data.metrics["eval/fd_digits"] == pytest.approx(report["metrics"]["eval/fd_digits"])
    assert "eval/fid" not in run.data.metrics


@pytest.mark.parametrize("picture", ["samples", "denoising"])
def test_it_leaves_pictures(picture: str, report: dict[str, Any]) -> None:
    with Image.open(report[picture]) as image:
        assert min(image.size) >= 8
        assert len(image.convert("L").getcolors() or []) > 16  # grey values: no empty canvas
