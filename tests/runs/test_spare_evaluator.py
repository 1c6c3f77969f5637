"""Stored weights, evaluated elsewhere: the rows, scores, provenance and pictures of the step."""

import copy
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import pytest
import torch
from torch import nn

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
from ddpm_ray.runs.training_outputs import TrainingOutputs, training_outputs
from ddpm_ray.runs.worker_process import facts_of_run
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.ema import EMA
from ddpm_ray.training.evaluation_store import EvaluationResult, EvaluationStore
from ddpm_ray.training.state import TrainingState
from tests.fixtures.threaded_workers import OnWorkers
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
            self.config, self.settings, dataset, codec, self.state, Workers(), self.here
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
    activities = list[str]()
    evaluate = spare_evaluator(run.settings, activities.append)
    other = run.request | {"step": STEP - 10}
    run.store.save_weights(STEP - 10, {k: v + 1 for k, v in run.state.ema.state_dict().items()})
    others = run.store.result(STEP - 10, evaluate(other))
    digest = evaluate(run.request)
    assert_equal(run.store.result(STEP, digest), run.here)
    assert activities == ["draws the grid", "draws the strip", "computes scores"] * 2
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

    writer = CheckpointWriter(CheckpointStore(str(tmp_path / "checkpoints")))
    evaluate_on_workers(run.state, run.outputs, Workers(), writer, str(tmp_path), commit)
    writer.wait()
    assert left_at_commit == [True]
    assert not stored.exists()
    run.here.scores = run.state.scores
    assert_equal(run.here, first)
    assert run.state.outstanding == []
    assert "changes" not in run.state.facts
    assert all(torch.equal(trained[k], v) for k, v in run.state.ema.state_dict().items())


class Resumed:
    """A worker at STEP with weights of 7 that draws nothing but what its weights are."""

    def __init__(self, folder: Path, workers: Workers, *outstanding: int) -> None:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 7)
        self.state = TrainingState(model, EMA(model), torch.optim.SGD(model.parameters()), {})
        self.state.step = STEP
        self.state.outstanding = [
            {"step": step, "outputs": ["grid", "scores"], "history": {}} for step in outstanding
        ]
        self.seen: list[tuple[str, int, float]] = []
        self.commits = 0
        self.folder, self.workers = folder, workers
        self.writer = CheckpointWriter(CheckpointStore(str(folder / "checkpoints")))

    def evaluate(self) -> None:
        def see(output: str, step: int) -> None:
            (weight,) = self.state.ema.state_dict().values()
            self.seen.append((output, step, weight.item()))

        def commit() -> None:
            self.commits += 1
            self.workers.gather(None)

        outputs = TrainingOutputs(
            partial(see, "grid"), partial(see, "strip"), partial(see, "scores"), print
        )
        args = self.state, outputs, self.workers, self.writer, str(self.folder), commit
        evaluate_on_workers(*args)
        self.writer.wait()


def stored(folder: Path, *steps: int) -> EvaluationStore:
    """The run's evaluations, with the weights of these steps, which are the step's number."""
    store = evaluation_store(str(folder))
    for step in steps:
        store.save_weights(step, {"weight": torch.full((1, 1), float(step))})
    return store


def both(step: int, weight: float) -> list[tuple[str, int, float]]:
    return [("grid", step, weight), ("scores", step, weight)]


def test_weights_that_are_gone_do_not_keep_workers_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after falling back to an older checkpoint; those of the run's step are its own."""
    stored(tmp_path, 10, 20, STEP)
    for damaged in (20, STEP):
        (tmp_path / f"evaluations/step-{damaged:08d}/ema.safetensors").write_bytes(b"")
    run = Resumed(tmp_path, Workers(), 10, 20, 30, STEP)
    run.evaluate()
    assert run.seen == [*both(10, 10), *both(STEP, 7)]
    assert (run.state.outstanding, run.commits) == ([], 1)
    (weight,) = run.state.ema.state_dict().values()
    assert weight.item() == 7
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("evaluation of step 20 is given up: ")
    assert "ema.safetensors: is damaged; evaluate a checkpoint of the step" in lines[0]
    assert "step-00000030/ema.safetensors: is missing; evaluate" in lines[1]
    assert lines[1].endswith("the run goes on without its grid and scores")
    assert not list((tmp_path / "evaluations").iterdir())


@pytest.mark.parametrize("unreadable", [0, 1])
def test_workers_agree_on_what_one_of_them_cannot_read(
    unreadable: int,
    on_workers: OnWorkers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else that one raises, and the other waits in the first sum of the evaluation."""
    stored(tmp_path, 10, 20)
    failing = local()  # the worker of this thread
    weights = EvaluationStore.weights

    def read(store: EvaluationStore, step: int) -> Any:
        if step == 10 and failing.rank == unreadable:
            raise CheckpointError("ema.safetensors", "is damaged", "evaluate a checkpoint")
        return weights(store, step)

    monkeypatch.setattr(EvaluationStore, "weights", read)

    def resume(workers: Workers) -> Resumed:
        failing.rank = workers.rank
        run = Resumed(tmp_path, workers, 10, 20)
        run.evaluate()
        return run

    for run in on_workers(2, resume):
        assert run.seen == both(20, 20)
        assert (run.state.outstanding, run.commits) == ([], 1)
    assert [record.getMessage() for record in caplog.records] == [
        "evaluation of step 10 is given up: ema.safetensors: is damaged; evaluate a checkpoint; "
        "the run goes on without its grid and scores"
    ]


def test_an_outage_is_raised_by_all_workers_and_gives_nothing_up(
    on_workers: OnWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray then starts them again; the evaluation is still in the checkpoint."""
    away = StorageError("s3://b", "no answer", "wait")
    failing = local()

    def read(store: EvaluationStore, step: int) -> Any:
        if failing.rank:
            raise away
        return {"weight": torch.zeros(1, 1)}

    monkeypatch.setattr(EvaluationStore, "weights", read)

    def resume(workers: Workers) -> Resumed:
        failing.rank = workers.rank
        run = Resumed(tmp_path, workers, 10)
        with pytest.raises(StorageError, match="s3://b: no answer; wait"):
            run.evaluate()
        return run

    for run in on_workers(2, resume):
        assert (run.seen, run.commits) == ([], 0)
        assert len(run.state.outstanding) == 1


def test_a_start_without_a_spare_process_deletes_what_others_left(tmp_path: Path) -> None:
    """Also of later steps, as after falling back; it evaluates in its steps."""
    stored(tmp_path, 10, STEP + 10)
    run = Resumed(tmp_path, Workers())
    run.evaluate()
    assert not list((tmp_path / "evaluations").iterdir())
    assert run.commits == 0
