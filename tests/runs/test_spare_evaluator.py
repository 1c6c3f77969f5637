"""Stored weights, evaluated elsewhere: the rows, scores, provenance and pictures of the step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_ray.assembly import latents, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.runs.spare_evaluator import (
    draw_requested,
    evaluate_on_workers,
    evaluation_store,
    spare_evaluator,
)
from ddpm_ray.runs.training_data import open_or_pack
from ddpm_ray.runs.training_outputs import training_outputs
from ddpm_ray.runs.worker_process import facts_of_run
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.training.evaluation_store import EvaluationResult
from ddpm_ray.training.state import TrainingState
from tests.training.test_loop import TINY_AUTOENCODER, TINY_UNET

CPU = torch.device("cpu")
STEP = 70
CHANGES = [{"step": 50, "key": "training.learning_rate", "from": 1e-3, "to": 1e-4}]
TASKS = {
    "denoiser": (
        *TINY_UNET,
        "model.attention_resolutions=[4]",
        "schedule.num_steps=20",
        "sampling.steps=2",
        "evaluation.features=digits",
        "evaluation.kernel_distance_images=8",
        "evaluation.validation_every_steps=10",
    ),
    "autoencoder": ("task=autoencoder", *TINY_AUTOENCODER, "evaluation.features=none"),
}


class Evaluated:
    """A run at a step with some weights, and what it draws and scores there."""

    def __init__(self, task: str, folder: Path, data: str) -> None:
        words = ["name=tiny", f"data.url={data}", "data.source=digits", "evaluation.num_images=16"]
        self.config = load_config(RunConfig, None, [*words, *TASKS[task]])
        dataset = open_or_pack(self.config)
        self.settings: dict[str, Any] = {
            "config": to_dict(self.config),
            "folder": str(folder),
            "identity": "identity",
            "fingerprints": {},
        }
        codec = latents.codec_of_data(self.config.data, dataset)
        facts = facts_of_run(self.settings, dataset, codec) | {"changes": CHANGES}
        shape = dataset.manifest.diffused_shape
        self.state: TrainingState = training_run.training_state(self.config, shape, CPU, facts)
        torch.manual_seed(7)
        for weight in self.state.ema.model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
        self.store = evaluation_store(str(folder))
        self.store.save_weights(STEP, self.state.ema.state_dict())
        outputs = ["grid", "strip", "scores"]
        self.request = {"step": STEP, "outputs": outputs, "history": {"changes": CHANGES}}
        self.here = EvaluationResult()
        self.outputs = training_outputs(
            self.config, str(folder), dataset, codec, self.state, Workers(), self.here
        )
        draw_requested(self.outputs, self.request)
        self.here.scores = self.state.scores


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("data") / "digits")


def assert_equal(one: EvaluationResult, other: EvaluationResult) -> None:
    assert one.metric_rows == other.metric_rows
    assert len(one.metric_rows[0].metrics) > 1
    assert stored_form(one.scores) == stored_form(other.scores)
    shown = [
        [(key, step, image.tobytes()) for key, step, image in each.images] for each in (one, other)
    ]
    assert shown[0] == shown[1]
    assert shown[0]
    assert [path for path, _ in one.documents] == [path for path, _ in other.documents]


def stored_form(scores: dict[str, Any]) -> str:
    return checksummed_json.encode(scores).decode()


@pytest.mark.parametrize("task", TASKS)
def test_elsewhere_the_results_have_the_bits_of_the_step(
    task: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the process computed before; what is stored already is not computed again."""
    run = Evaluated(task, tmp_path, data)
    evaluate = spare_evaluator(run.settings)
    other = run.request | {"step": STEP - 10}
    run.store.save_weights(STEP - 10, {k: v + 1 for k, v in run.state.ema.state_dict().items()})
    others = run.store.result(STEP - 10, evaluate(other))
    digest = evaluate(run.request)
    assert_equal(run.store.result(STEP, digest), run.here)
    assert others.scores["metrics"] != run.here.scores["metrics"]

    def write(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(object_store, "write_bytes", write)
    assert spare_evaluator(run.settings)(run.request) == digest


def test_workers_evaluate_what_an_earlier_start_left_and_go_on_with_their_own_weights(
    data: str, tmp_path: Path
) -> None:
    run = Evaluated("denoiser", tmp_path, data)
    facts, first = run.state.facts, copy.deepcopy(run.here)
    run.here.clear()
    with torch.no_grad():
        for weight in run.state.ema.model.parameters():
            weight.mul_(2)
    trained = {name: one.clone() for name, one in run.state.ema.state_dict().items()}
    run.state.facts = {key: value for key, value in facts.items() if key != "changes"}
    run.state.outstanding = [run.request]
    stored = tmp_path / f"evaluations/step-{STEP:08d}"
    left_at_commit = list[bool]()

    def commit() -> None:
        left_at_commit.append(stored.exists())

    evaluate_on_workers(run.state, run.outputs, Workers(), str(tmp_path), commit)
    assert left_at_commit == [True]
    assert not stored.exists()
    run.here.scores = run.state.scores
    assert_equal(run.here, first)
    assert run.state.outstanding == []
    assert "changes" not in run.state.facts
    assert all(torch.equal(trained[k], v) for k, v in run.state.ema.state_dict().items())
